"""Which attention processors of diffusers work on merged tokens."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)

from ..core.proportional import check_kernel
from ..kernels.operators import is_compiling
from ..patching.block_state import BlockState

logger = logging.getLogger("tofu_sd")
_SDPA = (AttnProcessor2_0, FusedAttnProcessor2_0)  # others check their mask's shape (xformers) or add it themselves
_UPCASTING = (AttnProcessor, SlicedAttnProcessor)  # they add the bias to float32 scores under upcast_attention
_STOCK = Attention.__module__  # processors of diffusers itself do not depend on whether attention is cross-attention
_mask_matters: dict[type[Any], bool] = {}  # whether the result of a class of processors depends on the mask


def _check_processor(attention: Attention, state: BlockState) -> None:
    """Raises RuntimeError for a processor that would ignore the keys or the weights it is given."""
    separate = "kv_only" if state.kv_only else "kv_early or kv_late" if state.separate_kv else ""
    if not (separate or state.proportional):
        return
    processor = attention.processor
    name = type(processor).__name__
    if name.startswith("PAG") or "CrossFrame" in name:  # they split the batch, or use the keys of another frame
        option = separate or "proportional"
        raise RuntimeError(f"{option} does not work with {name}, which uses keys of its own: leave {option} off")
    if separate and isinstance(processor, FusedAttnProcessor2_0):
        raise RuntimeError(
            f"{separate} gives keys and values other tokens than queries, and fuse_qkv_projections() has made them one "
            f"projection: call unfuse_qkv_projections() first, or leave {separate} off"
        )
    if separate and type(processor).__module__ != _STOCK:
        raise RuntimeError(
            f"{separate} gives self-attention separate keys, by which {name} may take it for cross-attention: leave "
            f"{separate} off, or set a processor of diffusers.models.attention_processor"
        )
    if state.proportional and not is_compiling():
        check_kernel(attention.to_q.weight.device, attention.to_q.weight.dtype)
        if type(processor).__module__ != _STOCK and not _uses_mask(attention):
            raise RuntimeError(
                f"proportional adds log(n) to the logits as an attention mask, which {name} ignores: leave "
                "proportional off, or set a processor that uses it"
            )


def _check_cross_processor(processor: Any) -> None:
    """Raises RuntimeError for a processor that may read cross-attention maps, which have a row for each pixel."""
    if type(processor).__module__ != _STOCK:
        raise RuntimeError(
            f"merge_crossattn gives {type(processor).__name__} fewer queries than the map has pixels, and it may read "
            "attention maps: leave merge_crossattn off, or set a processor of diffusers.models.attention_processor"
        )


def _uses_mask(attention: Attention) -> bool:
    """Whether a processor's result depends on its mask; tried once for each class, on a copy of the processor."""
    kind = type(attention.processor)
    if kind not in _mask_matters:
        weight = attention.to_q.weight
        x = torch.linspace(-1, 1, 4 * attention.query_dim, dtype=weight.dtype, device=weight.device).sin()
        x = x.view(1, 4, attention.query_dim)
        mask = x.new_tensor([0.0, 0.0, 0.0, 8.0]).view(1, 1, 4)
        with torch.no_grad():
            plain, masked = (
                copy.deepcopy(attention.processor)(attention, x, attention_mask=m) for m in (0 * mask, mask)
            )
        _mask_matters[kind] = not torch.equal(plain, masked)
    return _mask_matters[kind]


def _stores_attention_maps(processor: Any) -> bool:
    """Whether a processor stores attention maps, which its pipeline reads as images (self-attention guidance)."""
    return "Store" in type(processor).__name__


_warned: set[type[Any]] = set()


def _warn_skipped(processor: Any) -> None:
    if type(processor) not in _warned:
        _warned.add(type(processor))
        logger.warning(f"{type(processor).__name__} stores attention maps for its pipeline: its blocks are not merged")
