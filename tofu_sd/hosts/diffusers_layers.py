"""The layers of a diffusers UNet, as subclasses that run on merged tokens."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ..core.token_map import SoftMap, TokenMap
from ..kernels.operators import is_compiling
from ..patching.block_state import BlockState
from ..patching.host import ATTRIBUTE
from .diffusers_processors import (
    _SDPA,
    _UPCASTING,
    _check_cross_processor,
    _check_processor,
    _stores_attention_maps,
    _warn_skipped,
)


class MergedAttention(Attention):  # type: ignore[misc]
    """Self-attention on merged tokens. The processor, whichever it is, runs unchanged on fewer tokens."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        if state is None:
            return Attention.forward(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        attend = super().forward

        def full() -> Tensor:
            return attend(hidden_states, encoder_hidden_states, attention_mask, **kwargs)

        def merged(queries: Tensor, keys: Tensor | None, map: TokenMap | SoftMap) -> Tensor:
            bias = state.key_bias(hidden_states, map, sdpa=type(self.processor) in _SDPA)
            if bias is not None and self.upcast_attention and isinstance(self.processor, _UPCASTING):
                bias = bias.float()
            return attend(queries, keys, bias, **kwargs)

        def can_merge() -> bool:
            return encoder_hidden_states is None and attention_mask is None and self._processor_merges(state)

        return state.run_attention(hidden_states, full, merged, can_merge)

    def _processor_merges(self, state: BlockState) -> bool:
        """Whether the processor runs on merged tokens. Raises RuntimeError where the options do not work with it."""
        if _stores_attention_maps(self.processor):
            if not is_compiling():
                _warn_skipped(self.processor)
            return False
        _check_processor(self, state)
        return True


class MergedCrossAttention(Attention):  # type: ignore[misc]
    """Cross-attention with merged queries."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        if state is None:
            return Attention.forward(self, hidden_states, *args, **kwargs)
        attend = super().forward
        if kwargs.get("ip_adapter_masks") is not None:  # these masks cover the full map
            return attend(hidden_states, *args, **kwargs)
        _check_cross_processor(self.processor)
        return state.run_merged("crossattn", lambda x: attend(x, *args, **kwargs), hidden_states)


class MergedFeedForward(FeedForward):  # type: ignore[misc]
    """Feed-forward on merged tokens. Chunks of the tokens (chunked feed-forward) run without merging."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        if state is None:
            return FeedForward.forward(self, hidden_states, *args, **kwargs)
        layer = super().forward
        return state.run_merged("mlp", lambda x: layer(x, *args, **kwargs), hidden_states)
