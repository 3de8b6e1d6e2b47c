"""Functional linearity of timm's vision transformers (ToFu Eq. 8, Fig. 3), and the depth split that follows from it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.matching import bipartite_soft_matching
from ..kernels import take
from ..patching.host import ATTRIBUTE
from ..patching.linearity import LAYERS, best_split, functional_linearity, merged_pairs
from ..vit.methods import alternating
from .timm import ClassifierPatch, find_blocks

PAIRS = 5  # of an image, in each layer (ToFu section 3.1)


def measured_split(model: nn.Module, images: Tensor) -> int:
    """Returns d (ToFu Eq. 7): the layer from which averaging is better than pruning, by the linearity of the MLPs."""
    layers = linearity(model, images).mean(dim=1).tolist()
    return best_split(dict(enumerate(layers)))


@torch.no_grad()
def linearity(model: nn.Module, images: Tensor, r: int = PAIRS, layer: str = "mlp") -> Tensor:
    """Functional linearity of one layer of each block (ToFu Eq. 8, Fig. 3), the mean over an image's pairs.

    The pairs are the r patch tokens that would be merged first in that block, each with the most similar token. The
    model itself runs without merging. The norm before a layer belongs to it, as tokens are merged before that norm.

    Args:
        model: a vision transformer of timm's without a patch.
        images: [B, 3, H, W], as the model takes them.
        r: number of pairs of an image, at most half of its patch tokens.
        layer: "mlp", or "attn": attention as a function of a query among the keys and values of all tokens.

    Returns:
        [blocks, B], in 0..1.

    Raises:
        ValueError: a value is out of range, or the model is patched or has no such blocks.
    """
    blocks: list[Any] = [block.layers["block"] for block in find_blocks(model)]
    _check(model, r, layer)
    probe = _Probe(int(model.num_prefix_tokens), r, layer)  # type: ignore[arg-type]
    handles = [block.norm1.register_forward_pre_hook(probe.store_input) for block in blocks]
    handles += [block.attn.k_norm.register_forward_hook(probe.store_keys) for block in blocks]
    handles += [block.norm2.register_forward_pre_hook(partial(probe.measure, block)) for block in blocks]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(probe.results)


def _check(model: nn.Module, r: int, layer: str) -> None:
    most = int(model.patch_embed.num_patches) // 2  # type: ignore[union-attr, arg-type]
    if not 1 <= r <= most:
        raise ValueError(f"r is {r}; it must be an integer from 1 to {most}, half of the patch tokens")
    if layer not in LAYERS:
        raise ValueError(f"layer is {layer!r}; it must be {' or '.join(LAYERS)}")
    if isinstance(vars(model).get(ATTRIBUTE), ClassifierPatch):
        raise ValueError(f"{type(model).__name__} is patched; linearity is measured without a patch: call remove_patch")


class _Probe:
    """Hooks that measure one layer of the block that runs."""

    def __init__(self, prefix: int, r: int, layer: str):
        self.prefix, self.r, self.layer = prefix, r, layer
        self.x: Tensor | None = None  # [B, N, C], input of the block
        self.keys: Tensor | None = None  # [B, N, d], of the patch tokens
        self.results: list[Tensor] = []

    def store_input(self, norm1: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.x = args[0]

    def store_keys(self, k_norm: nn.Module, args: Any, out: Tensor) -> None:
        self.keys = out.mean(dim=1)[:, self.prefix :]

    def measure(self, block: Any, norm2: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert self.x is not None and self.keys is not None  # noqa: PT018
        x, keys = self.x, self.keys
        pairs = merged_pairs(bipartite_soft_matching(keys, alternating(keys.shape[1], keys.device), self.r))
        patches = (args[0] if self.layer == "mlp" else x)[:, self.prefix :]
        x1, x2 = (take(patches, position) for position in pairs)

        def run(points: Tensor) -> Tensor:
            if self.layer == "attn":
                return attend_from(block, x, points)
            out: Tensor = block.mlp.forward(block.norm2.forward(points))
            return out

        # `attend_from` calls `store_keys` again, before the next block does
        self.results.append(functional_linearity(run, x1, x2).mean(dim=1))


def attend_from(block: Any, x: Tensor, points: Tensor) -> Tensor:
    """Runs a block's attention over the tokens x [B, N, C] with `points` [B, r, P, C] as further queries.

    The points are appended to the tokens, and a mask hides them as keys.

    Returns:
        The output at the points, of their shape.
    """
    N = x.shape[1]
    tokens = torch.cat([x, points.flatten(1, 2)], dim=1)
    mask = x.new_zeros(tokens.shape[1])
    mask[N:] = -torch.inf
    out: Tensor = block.attn.forward(block.norm1.forward(tokens), attn_mask=mask[None, None, None])
    return out[:, N:].view(points.shape)
