"""Chroma: Flux.1's layout, with a mask that hides padding of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock, ChromaTransformerBlock
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ....kernels.operators import is_compiling
from ....patching.host import Argument
from ..family import TEXT
from ..position_ids import version_of
from ..rotary import arguments_with_ids, rotary_family
from .flux import PROCESSORS, MergedFluxAttention, kinds


class MergedChromaAttention(MergedFluxAttention):
    """Flux's attention on merged tokens, with a mask in which all image tokens are visible."""

    takes_mask = True


_MASK = Argument(5, ("attention_mask",))
_HIDES_IMAGE = (
    "attention_mask hides image tokens of Chroma's attention, which merging moves: hide only text, or call "
    "tofu_sd.remove_patch"
)
_checked: Any = WeakIdKeyDictionary()  # of each mask that was read: (its version, text tokens). Reading synchronizes


def _check_mask(mask: Tensor, text: int) -> None:
    """Raises ValueError where a mask [B, S] of text and image hides an image token."""
    if is_compiling():
        torch._assert_async(mask[:, text:].bool().all(), _HIDES_IMAGE)
    elif _checked.get(mask) != (version_of(mask), text):
        if not mask[:, text:].bool().all():
            raise ValueError(_HIDES_IMAGE)
        _checked[mask] = version_of(mask), text


def _check_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    mask = _MASK.get(args, kwargs)
    if mask is not None:
        _check_mask(mask, TEXT.get(args, kwargs).shape[1])


FAMILY = rotary_family(
    kinds(ChromaTransformerBlock, ChromaSingleTransformerBlock, MergedChromaAttention),
    arguments_with_ids(2, 3, _check_call),
    PROCESSORS,
)
