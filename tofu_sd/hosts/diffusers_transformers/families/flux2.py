"""Flux.2, dev and klein. See `rotary`. The attention of its single blocks contains their feed-forward.

Its KV processors run attention over parts of the sequence, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2ParallelSelfAttention,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)
from torch import Tensor, nn

from ....patching.host import Argument
from ..family import BlockKind
from ..rotary import arguments_with_ids, probe_double, probe_single, rotary_family, run_rotary
from ..sequence import ImageNorm, JoinedNorm

PROCESSORS = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")


class MergedFlux2Attention(Flux2Attention):  # type: ignore[misc]
    """Attention of a double block on merged image tokens."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        def attend(mask: Tensor | None) -> Any:
            return Flux2Attention.forward(self, hidden_states, encoder_hidden_states, mask, image_rotary_emb, **kwargs)

        return run_rotary(self, hidden_states, encoder_hidden_states, attention_mask, attend, processors=PROCESSORS)


class MergedFlux2ParallelAttention(Flux2ParallelSelfAttention):  # type: ignore[misc]
    """Attention of a single block on merged image tokens. Its feed-forward runs on all tokens."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        def attend(mask: Tensor | None) -> Any:
            return Flux2ParallelSelfAttention.forward(self, hidden_states, mask, image_rotary_emb, **kwargs)

        return run_rotary(self, hidden_states, None, attention_mask, attend, processors=PROCESSORS)


_KV_MODE = Argument(9, ("kv_cache_mode",))


def _check_mode(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for a call that caches keys and values of reference images."""
    if _KV_MODE.get(args, kwargs) is not None:
        raise ValueError(
            f"kv_cache_mode is {_KV_MODE.get(args, kwargs)!r}: reference images come first in it, and attention runs "
            "over parts of the sequence, which merging changes; leave it off, or call tofu_sd.remove_patch"
        )


FAMILY = rotary_family(
    kinds=(
        BlockKind(
            blocks="transformer_blocks",
            block_class=Flux2TransformerBlock,
            layers={"norm": "norm1", "attn": "attn"},
            swaps={"norm": (nn.LayerNorm, ImageNorm), "attn": (Flux2Attention, MergedFlux2Attention)},
            probe=probe_double,
        ),
        BlockKind(
            blocks="single_transformer_blocks",
            block_class=Flux2SingleTransformerBlock,
            layers={"norm": "norm", "attn": "attn"},
            swaps={
                "norm": (nn.LayerNorm, JoinedNorm),
                "attn": (Flux2ParallelSelfAttention, MergedFlux2ParallelAttention),
            },
            probe=probe_single,
            joined=True,
        ),
    ),
    arguments=arguments_with_ids(2, 3, _check_mode),
    processors=PROCESSORS,
)
