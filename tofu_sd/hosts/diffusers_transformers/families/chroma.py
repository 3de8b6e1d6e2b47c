"""Chroma: Flux.1's layout, with a mask that hides padding of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock, ChromaTransformerBlock
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ....kernels.operators import is_compiling
from ....patching.host import Argument, ArgumentNames, MapCall
from ..family import Family
from ..position_ids import version_of
from ..rotary import REFUSED, TEXT_TOKENS, map_of_ids
from .flux import PROCESSORS, MergedFluxAttention, kinds


class MergedChromaAttention(MergedFluxAttention):
    """Flux's attention on merged tokens, with a mask in which all image tokens are visible."""

    takes_mask = True


_LATENT = Argument(0, ("hidden_states",))
_TEXT = Argument(1, ("encoder_hidden_states",))
_IDS = Argument(3, ("img_ids",))
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


def _read_map(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MapCall:
    mask = _MASK.get(args, kwargs)
    if mask is not None:
        _check_mask(mask, _TEXT.get(args, kwargs).shape[1])
    return map_of_ids(module, _LATENT.get(args, kwargs), _IDS.get(args, kwargs))


FAMILY = Family(
    kinds=kinds(ChromaTransformerBlock, ChromaSingleTransformerBlock, MergedChromaAttention),
    arguments=ArgumentNames(
        latent=_LATENT,
        timestep=Argument(2, ("timestep",)),
        conditioning=_TEXT,
        tokens=_LATENT,
        keys="",
        read_map=_read_map,
    ),
    processors=PROCESSORS,
    text_tokens=TEXT_TOKENS,
    timestep_scale=0.001,
    patch=2,
    defaults={"proportional": True},
    refused=REFUSED,
)
