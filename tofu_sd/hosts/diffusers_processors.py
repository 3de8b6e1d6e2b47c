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
_SDPA = (AttnProcessor2_0, FusedAttnProcessor2_0)  # others look closely at their mask (xformers), or add it themselves
_UPCASTING = (AttnProcessor, SlicedAttnProcessor)  # they add the bias to scores in float32 under upcast_attention
_STOCK = Attention.__module__  # processors of diffusers itself, which tell cross-attention by nothing
_reads_mask: dict[type[Any], bool] = {}  # whether processors of a class heed their mask


def _check_processor(attention: Attention, state: BlockState) -> None:
    """RuntimeError for a processor that does not attend to the keys and weights it is given."""
    if not (state.kv_only or state.proportional):
        return
    processor = attention.processor
    name = type(processor).__name__
    if name.startswith("PAG") or "CrossFrame" in name:  # they split the batch, or take the keys of another frame
        option = "kv_only" if state.kv_only else "proportional"
        raise RuntimeError(f"{option} does not work with {name}, which takes keys of its own: leave {option} off")
    if state.kv_only and isinstance(processor, FusedAttnProcessor2_0):
        raise RuntimeError(
            "kv_only fuses keys and values apart from the queries, which fuse_qkv_projections() has made one "
            "projection: call unfuse_qkv_projections() first, or leave kv_only off"
        )
    if state.kv_only and type(processor).__module__ != _STOCK:
        raise RuntimeError(
            f"kv_only gives self-attention keys of its own, by which {name} may take it for cross-attention: leave "
            "kv_only off, or set a processor of diffusers.models.attention_processor"
        )
    if state.proportional and not is_compiling():
        check_kernel(attention.to_q.weight.device, attention.to_q.weight.dtype)
        if type(processor).__module__ != _STOCK and not _heeds_mask(attention):
            raise RuntimeError(
                f"proportional adds log(n) to the logits as an attention mask, which {name} does not heed: leave "
                "proportional off, or set a processor that does"
            )


def _check_cross_processor(processor: Any) -> None:
    """RuntimeError for a processor that may read maps of words, which have a row for each pixel."""
    if type(processor).__module__ != _STOCK:
        raise RuntimeError(
            f"merge_crossattn gives {type(processor).__name__} fewer queries than the map has pixels, and it may read "
            "attention maps: leave merge_crossattn off, or set a processor of diffusers.models.attention_processor"
        )


def _heeds_mask(attention: Attention) -> bool:
    """Whether a processor's result depends on its mask, found once for each class on a copy of it."""
    kind = type(attention.processor)
    if kind not in _reads_mask:
        weight = attention.to_q.weight
        x = torch.linspace(-1, 1, 4 * attention.query_dim, dtype=weight.dtype, device=weight.device).sin()
        x = x.view(1, 4, attention.query_dim)
        mask = x.new_tensor([0.0, 0.0, 0.0, 8.0]).view(1, 1, 4)
        with torch.no_grad():
            one, other = (copy.deepcopy(attention.processor)(attention, x, attention_mask=m) for m in (0 * mask, mask))
        _reads_mask[kind] = not torch.equal(one, other)
    return _reads_mask[kind]


def _keeps_maps(processor: Any) -> bool:
    """Whether a processor keeps attention maps, which its pipeline reads as images (self-attention guidance)."""
    return "Store" in type(processor).__name__


_reported: set[type[Any]] = set()


def _report_left_alone(processor: Any) -> None:
    if type(processor) not in _reported:
        _reported.add(type(processor))
        logger.warning(
            f"{type(processor).__name__} keeps attention maps for its pipeline: blocks that have it are not merged"
        )
