"""Attention over merged tokens, put on a UNet by other means than the patch's: what a patched model has to equal.

The places are written down by hand, block for block, and not searched for; attention is replaced on the instance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tofu_sd.core.matching import bipartite_soft_matching
from tofu_sd.core.partition import partition
from tofu_sd.core.reductions import Reduction, mlerp, prune, unmerge

TOP = {
    "UNet2DConditionModel": (0, -1),
    "ControlNetModel": (0, None),
    "UNetMotionModel": (0, -1),
    "UNetControlNetXSModel": (0, -1),
}
"""Which down_blocks and up_blocks hold the highest resolution that has attention; SDXL's first level has none."""


def blocks(unet: Any) -> Iterator[tuple[nn.Module, nn.Module, Reduction]]:
    """(what sees the 4-D map, its transformer block, what the block does) at the highest resolution with attention."""
    down, up = TOP[type(unet).__name__]
    if unet.config.get("addition_embed_type") == "text_time":
        down, up = 1, 1
    stages = [(unet.down_blocks[down], prune)] + ([(unet.up_blocks[up], mlerp)] if up is not None else [])
    for stage, reduction in stages:
        for spatial_module in getattr(stage, "base_attentions", None) or stage.attentions:
            for block in spatial_module.transformer_blocks:
                yield spatial_module, block, reduction


@contextmanager
def oracle(
    unet: Any, ratio: float = 0.5, *, proportional: bool = False, kv_only: bool = False, match_on: str = "hidden"
) -> Iterator[None]:
    """Inside, the UNet runs ToFu at its highest resolution: pruned on the way down, MLERP on the way up."""
    undo: list[Any] = []
    for spatial_module, block, reduction in blocks(unet):
        undo += _fuse(spatial_module, block, reduction, ratio, proportional, kv_only, match_on)
    try:
        yield
    finally:
        for action in reversed(undo):
            action()


def _fuse(
    spatial_module: Any,
    block: Any,
    reduction: Reduction,
    ratio: float,
    proportional: bool,
    kv_only: bool,
    match_on: str,
) -> list[Any]:
    seen: dict[str, Any] = {}
    plain, attn = block.attn1.forward, block.attn1
    own = "forward" in vars(attn)

    def forward(hidden_states: Tensor, **rest: Any) -> Tensor:
        (h, w), x = seen["size"], hidden_states if match_on == "normed" else seen["tokens"]
        token_map = bipartite_soft_matching(x, partition(h, w, 2, 2, x.device), int(h * w * ratio))
        y = reduction(hidden_states, token_map)
        if proportional:
            counts = [group_idx.bincount(minlength=y.shape[1]) for group_idx in token_map.group_idx]
            rest["attention_mask"] = torch.stack(counts).float().log().to(x.dtype)[:, None]
        if kv_only:
            return plain(hidden_states, encoder_hidden_states=y, **{k: v for k, v in rest.items() if v is not None})
        return unmerge(plain(y, **rest), token_map)

    def size(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["size"] = (args[0] if args else kwargs["hidden_states"]).shape[-2:]

    def tokens(module: nn.Module, args: Any) -> None:
        seen["tokens"] = args[0]

    attn.forward = forward
    handles = [
        spatial_module.register_forward_pre_hook(size, with_kwargs=True),
        block.norm1.register_forward_pre_hook(tokens),
    ]
    restore = (lambda: setattr(attn, "forward", plain)) if own else (lambda: delattr(attn, "forward"))
    return [restore, *(handle.remove for handle in handles)]
