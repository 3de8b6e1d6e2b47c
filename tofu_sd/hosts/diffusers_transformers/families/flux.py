"""Flux.1, with its Kontext, Fill and Control variants. See `rotary`."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from ..family import BlockKind
from ..rotary import arguments_with_ids, probe_double, probe_single, rotary_family, run_rotary
from ..sequence import ImageNorm, JoinedNorm

PROCESSORS = ("FluxAttnProcessor", "FluxIPAdapterAttnProcessor")


class MergedFluxAttention(FluxAttention):  # type: ignore[misc]
    """Attention whose processor's call of scaled_dot_product_attention runs on merged image tokens."""

    takes_mask = False

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        def attend(mask: Tensor | None) -> Any:
            return FluxAttention.forward(self, hidden_states, encoder_hidden_states, mask, image_rotary_emb, **kwargs)

        takes_mask = getattr(self, "takes_mask", False)  # a hook may run this after the patch was removed
        return run_rotary(
            self, hidden_states, encoder_hidden_states, attention_mask, attend,
            processors=PROCESSORS, takes_mask=takes_mask,
        )  # fmt: skip


def kinds(
    double: type[nn.Module], single: type[nn.Module], merged: type[MergedFluxAttention]
) -> tuple[BlockKind, BlockKind]:
    """Returns the two kinds of blocks of Flux.1's layout.

    Args:
        double, single: their classes.
        merged: the class of attention on merged tokens.
    """
    return (
        BlockKind(
            blocks="transformer_blocks",
            block_class=double,
            layers={"norm": "norm1.norm", "attn": "attn"},
            swaps={"norm": (nn.LayerNorm, ImageNorm), "attn": (FluxAttention, merged)},
            probe=probe_double,
        ),
        BlockKind(
            blocks="single_transformer_blocks",
            block_class=single,
            layers={"norm": "norm.norm", "attn": "attn"},
            swaps={"norm": (nn.LayerNorm, JoinedNorm), "attn": (FluxAttention, merged)},
            probe=probe_single,
            joined=True,
        ),
    )


FAMILY = rotary_family(
    kinds(FluxTransformerBlock, FluxSingleTransformerBlock, MergedFluxAttention), arguments_with_ids(3, 4), PROCESSORS
)
