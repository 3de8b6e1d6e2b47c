"""Flux.1 and its Kontext, Fill and Control variants. Positions are applied to queries and keys inside of attention.

So queries, keys and values are merged after the projections, their norms and the rotation. Double blocks get text and
image apart, single blocks as one sequence. In attention the text comes first, then the image, then reference images,
which are not merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from ...patching.block_state import BlockState
from ...patching.host import ATTRIBUTE, Argument, ArgumentNames, MapCall
from .family import BlockKind, Family
from .interception import MergedCall, call_mask, check_called
from .position_ids import read_layout
from .processors import check_processor
from .sequence import ImageNorm, JoinedNorm, image_span

PROCESSORS = ("FluxAttnProcessor", "FluxIPAdapterAttnProcessor")
TEXT_TOKENS = 512
NATIVE = 64  # side of the map at 1024 px


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
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        if state is None:
            return FluxAttention.forward(
                self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )
        attend = super().forward
        joined = encoder_hidden_states is None
        span = image_span(state, hidden_states.shape[1], joined)
        if span is None:
            return attend(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)
        image = hidden_states[:, slice(*span)]
        if state.normed:
            state.update_map(image.contiguous())
        map = state.pop_map("attn", image)
        if map is None:
            return attend(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)
        check_processor(self, PROCESSORS)
        if attention_mask is not None and not self.takes_mask:
            raise ValueError(
                "attention_mask hides tokens of Flux's attention by their position, which merging changes: leave it "
                "off, or call tofu_sd.remove_patch"
            )
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        call = MergedCall(state, map, text + span[0], projected=True, mask=attention_mask)
        mask = call_mask(call, hidden_states, text + hidden_states.shape[1])
        out = attend(hidden_states, encoder_hidden_states, mask, image_rotary_emb, **kwargs)
        check_called(call, self.processor)
        return out


def _text_of(x: Tensor) -> Tensor:
    return x.new_zeros(len(x), TEXT_TOKENS, x.shape[-1])


def _probe_double(attention: nn.Module, x: Tensor) -> Any:
    """Runs the attention of a double block with as many text tokens as the pipeline gives."""
    return attention(x, _text_of(x))


def _probe_single(attention: nn.Module, x: Tensor) -> Any:
    """Runs the attention of a single block on text and image."""
    return attention(torch.cat([_text_of(x), x], dim=1))


_LATENT = Argument(0, ("hidden_states",))
_IDS = Argument(4, ("img_ids",))


def map_of_ids(latent: Tensor, ids: Tensor) -> MapCall:
    """Returns the map of tokens [B, M, C] with these position ids."""
    h, w, after = read_layout(ids, NATIVE)
    if latent.shape[1] != h * w + after:
        raise ValueError(
            f"img_ids has positions for {h} x {w} tokens and {after} of reference images, and there are "
            f"{latent.shape[1]} image tokens"
        )
    return MapCall(len(latent), h, w, latent.device, latent.dtype, after)


def _read_map(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MapCall:
    return map_of_ids(_LATENT.get(args, kwargs), _IDS.get(args, kwargs))


def kinds(
    double: type[nn.Module], single: type[nn.Module], merged: type[MergedFluxAttention]
) -> tuple[BlockKind, BlockKind]:
    """Returns the two kinds of blocks, of Flux.1's layout.

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
            probe=_probe_double,
        ),
        BlockKind(
            blocks="single_transformer_blocks",
            block_class=single,
            layers={"norm": "norm.norm", "attn": "attn"},
            swaps={"norm": (nn.LayerNorm, JoinedNorm), "attn": (FluxAttention, merged)},
            probe=_probe_single,
            joined=True,
        ),
    )


REFUSED = {
    "merge_crossattn": "its blocks have no cross-attention",
    "merge_mlp": "its single blocks project attention and feed-forward together",
}

FAMILY = Family(
    kinds=kinds(FluxTransformerBlock, FluxSingleTransformerBlock, MergedFluxAttention),
    arguments=ArgumentNames(
        latent=_LATENT,
        timestep=Argument(3, ("timestep",)),
        conditioning=Argument(1, ("encoder_hidden_states",)),
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
