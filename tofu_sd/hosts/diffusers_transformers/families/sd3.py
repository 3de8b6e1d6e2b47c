"""Stable Diffusion 3 and 3.5. Positions are added to the states, so tokens are merged before the projections.

In attention the image comes first, then the text. Blocks with dual attention have a second attention of the image
alone, which uses the same map. The processors drop masks, so log(n) is added where they call
scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ....core.reductions import unmerge
from ....core.token_map import SoftMap, TokenMap
from ....kernels.operators import is_compiling
from ....patching.block_state import BlockState
from ....patching.host import ATTRIBUTE, MapCall
from ..._norm import NormForMatching
from ...diffusers_layers import MergedFeedForward
from ..family import LATENT, BlockKind, Family, arguments_of, map_of_latent
from ..interception import Intercepted, MergedCall, check_called
from ..processors import check_processor

PROCESSORS = ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0", "SD3IPAdapterJointAttnProcessor2_0")
TEXT_TOKENS = 333  # 77 of CLIP and 256 of T5


class MergedJointAttention(Attention):  # type: ignore[misc]
    """Joint attention on merged image tokens. The processor runs unchanged on fewer of them.

    It calls to_k and to_v with the tokens of the queries. Where keys and values have tokens of their own, both project
    these instead.
    """

    @property
    def to_k(self) -> Any:
        return _projection(self, "to_k")

    @property
    def to_v(self) -> Any:
        return _projection(self, "to_v")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        if state is None:
            return Attention.forward(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        attend = super().forward

        def run(x: Tensor) -> Any:
            return attend(x, encoder_hidden_states, attention_mask, **kwargs)

        layer = "attn2" if encoder_hidden_states is None else "attn"
        if state.normed and layer == "attn":
            state.update_map(hidden_states)
        map = state.pop_map(layer, hidden_states)
        if map is None:
            return run(hidden_states)
        check_processor(self, PROCESSORS)
        return _run_merged(self, map, hidden_states, run)


def _projection(attention: MergedJointAttention, name: str) -> Any:
    """Returns a layer of attention or, while keys have tokens of their own, a function that projects those."""
    layer = attention._modules[name]
    state: BlockState | None = getattr(attention, ATTRIBUTE, None)
    keys = None if state is None else state.current.keys
    return layer if keys is None or layer is None else lambda tokens: layer(keys)


def _run_merged(
    attention: MergedJointAttention, map: TokenMap | SoftMap, x: Tensor, run: Callable[[Tensor], Any]
) -> Any:
    """Runs attention with merged image tokens.

    Args:
        attention: the layer.
        map: of the image tokens.
        x: [B, N, C], the normed image tokens.
        run: takes image tokens to the output of attention: of the image, or (of the image, of the text).

    Returns:
        The output of attention for all N image tokens, with that of the text where there is one.
    """
    state: BlockState = getattr(attention, ATTRIBUTE)
    # one fused projection takes one tensor for queries, keys and values, which are then merged after it
    projected = attention.fused_projections and (state.kv_only or state.separate_kv)
    call = MergedCall(state, map, 0, projected)
    queries, state.current.keys = (x, None) if projected else state.queries_and_keys(x, map)
    try:
        if not projected and not state.proportional and not is_compiling():
            out = run(queries)
        else:
            with Intercepted(call):
                out = run(queries)
            check_called(call, attention.processor)
    finally:
        state.current.keys = None
    if projected or state.kv_only:
        return out
    return (unmerge(out[0], map), *out[1:]) if isinstance(out, tuple) else unmerge(out, map)


def _probe(attention: Any, x: Tensor) -> Any:
    """Runs joint attention with as many text tokens as the pipeline gives."""
    return attention(x, x.new_zeros(len(x), TEXT_TOKENS, attention.added_kv_proj_dim))


def _read_map(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MapCall:
    return map_of_latent(module, LATENT.get(args, kwargs))


FAMILY = Family(
    kinds=(
        BlockKind(
            blocks="transformer_blocks",
            block_class=JointTransformerBlock,
            layers={"norm": "norm1.norm", "attn": "attn", "attn2": "attn2", "mlp": "ff"},
            swaps={
                "norm": (nn.LayerNorm, NormForMatching),
                "attn": (Attention, MergedJointAttention),
                "attn2": (Attention, MergedJointAttention),
                "mlp": (FeedForward, MergedFeedForward),
            },
            probe=_probe,
        ),
    ),
    arguments=arguments_of(3, _read_map),
    processors=PROCESSORS,
    text_tokens=TEXT_TOKENS,
    merges_states=True,
    defaults={"proportional": True},
    refused={"merge_crossattn": "its blocks have no cross-attention"},
)
