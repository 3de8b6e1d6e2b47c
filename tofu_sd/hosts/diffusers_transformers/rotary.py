"""Attention with rotary positions. Queries, keys and values are merged after projection, norm and rotation.

The text comes first, then the image, then reference images, which are not merged; in Z-Image the text comes after the
image. Double blocks get text and image apart, single blocks as one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...patching.block_state import BlockState
from ...patching.host import ATTRIBUTE, Argument, ArgumentNames, MapCall
from .family import LATENT, BlockKind, Family, arguments_of
from .interception import MergedCall, call_mask, check_called
from .position_ids import read_layout
from .processors import check_processor
from .sequence import TextPlace, image_span

TEXT_TOKENS = 512  # of T5 in Flux.1 and Chroma, and of the language models of Flux.2
NATIVE = 64  # side of the map at 1024 px
Check = Callable[[tuple[Any, ...], Mapping[str, Any]], None]

REFUSED = {
    "merge_crossattn": "its blocks have no cross-attention",
    "merge_mlp": "its single blocks project attention and feed-forward together",
}


def run_rotary(
    attention: Any,
    hidden_states: Tensor,
    text: Tensor | None,
    mask: Tensor | None,
    attend: Callable[[Tensor | None], Any],
    *,
    processors: tuple[str, ...],
    takes_mask: bool = False,
    joined: TextPlace = "before",
) -> Any:
    """Runs the attention of a block, on merged image tokens where there is a map.

    Args:
        attention: the layer; its processor passes its mask to scaled_dot_product_attention.
        hidden_states: [B, S, C], the image and its references, or the whole sequence where there is no `text`.
        text: [B, T, C], or None.
        mask: of the host.
        attend: runs the host's attention with a mask.
        processors: names of the processors that work.
        takes_mask: whether the family's masks show all image tokens, as the model's hook has checked.
        joined: where the text is in the whole sequence.

    Raises:
        ValueError: a mask of the caller.
        RuntimeError: a processor or a sequence that does not work.
    """
    state: BlockState | None = getattr(attention, ATTRIBUTE, None)
    span = None if state is None else image_span(state, hidden_states.shape[1], joined if text is None else "apart")
    if state is None or span is None:
        return attend(mask)
    image = hidden_states[:, slice(*span)]
    if state.normed:
        state.update_map(image.contiguous())
    map = state.pop_map("attn", image)
    if map is None:
        return attend(mask)
    check_processor(attention, processors)
    if mask is not None and not takes_mask:
        raise ValueError(
            "attention_mask hides tokens of joint attention by their position, which merging changes: leave it off, "
            "or call tofu_sd.remove_patch"
        )
    before = 0 if text is None else text.shape[1]
    call = MergedCall(state, map, before + span[0], projected=True, mask=mask)
    out = attend(call_mask(call, hidden_states, before + hidden_states.shape[1]))
    check_called(call, attention.processor)
    return out


def _text_of(x: Tensor) -> Tensor:
    return x.new_zeros(len(x), TEXT_TOKENS, x.shape[-1])


def probe_double(attention: nn.Module, x: Tensor) -> Any:
    """Runs the attention of a double block with as many text tokens as the pipeline gives."""
    return attention(x, _text_of(x))


def probe_single(attention: nn.Module, x: Tensor) -> Any:
    """Runs the attention of a single block on text and image."""
    return attention(torch.cat([_text_of(x), x], dim=1))


def rotary_family(
    kinds: tuple[BlockKind, ...],
    arguments: ArgumentNames,
    processors: tuple[str, ...],
    *,
    text_tokens: int = TEXT_TOKENS,
    refused: Mapping[str, str] = REFUSED,
) -> Family:
    """Returns a Family whose model gets timesteps in 0..1 and packs 2 x 2 cells of the latent into a token."""
    return Family(
        kinds, arguments, text_tokens, processors,
        timestep_scale=0.001, patch=2, defaults={"proportional": True}, refused=refused,
    )  # fmt: skip


@dataclass(frozen=True)
class ReadIds:
    """Reads the map of a call from its position ids. A class, as a patch is pickled with its model.

    Args:
        ids: the argument `img_ids`.
        check: raises for arguments of a call with which tokens cannot be merged.
    """

    ids: Argument
    check: Check | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MapCall:
        if self.check is not None:
            self.check(args, kwargs)
        return map_of_ids(model, LATENT.get(args, kwargs), self.ids.get(args, kwargs))


def arguments_with_ids(timestep: int, ids: int, check: Check | None = None) -> ArgumentNames:
    """Returns where a model takes its arguments whose tokens have position ids.

    Args:
        timestep: position of the timestep.
        ids: position of `img_ids`.
        check: see ReadIds.
    """
    return arguments_of(timestep, ReadIds(Argument(ids, ("img_ids",)), check))


def map_of_ids(model: nn.Module, latent: Tensor, ids: Tensor) -> MapCall:
    """Returns the map of a model's tokens [B, M, C] with these position ids."""
    h, w, after = read_layout(ids, NATIVE, model)
    if latent.shape[1] != h * w + after:
        raise ValueError(
            f"img_ids has positions for {h} x {w} tokens and {after} of reference images, and there are "
            f"{latent.shape[1]} image tokens"
        )
    return MapCall(len(latent), h, w, latent.device, latent.dtype, after)
