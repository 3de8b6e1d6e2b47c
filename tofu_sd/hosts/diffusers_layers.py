"""The layers of a diffusers UNet, as subclasses that run on merged tokens."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import (
    Attention,
)
from torch import Tensor

from ..core.reductions import unmerge
from ..kernels.operators import is_compiling
from ..patching.block_info import ATTRIBUTE
from ..patching.block_state import BlockState
from .diffusers_processors import (
    _SDPA,
    _UPCASTING,
    _check_cross_processor,
    _check_processor,
    _keeps_maps,
    _report_left_alone,
)


class FusedAttention(Attention):  # type: ignore[misc]
    """Self-attention over fused tokens. The processor, whichever it is, runs untouched on fewer tokens."""

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
        if state.normed:
            state.update_map(hidden_states)
        map = state.take("attn", hidden_states)
        if map is None or encoder_hidden_states is not None or attention_mask is not None:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if _keeps_maps(self.processor):
            if not is_compiling():
                _report_left_alone(self.processor)
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        _check_processor(self, state)
        fused = state.reduce(hidden_states, map)
        bias = state.key_bias(hidden_states, map, sdpa=type(self.processor) in _SDPA)
        if bias is not None and self.upcast_attention and isinstance(self.processor, _UPCASTING):
            bias = bias.float()
        if state.kv_only:
            return super().forward(hidden_states, fused, bias, **kwargs)
        return unmerge(super().forward(fused, attention_mask=bias, **kwargs), map)


class FusedCrossAttention(Attention):  # type: ignore[misc]
    """Cross-attention whose queries are fused tokens."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        if state is None:
            return Attention.forward(self, hidden_states, *args, **kwargs)
        attend = super().forward
        if kwargs.get("ip_adapter_masks") is not None:  # they are laid on the full map
            return attend(hidden_states, *args, **kwargs)
        _check_cross_processor(self.processor)
        return state.run_merged("crossattn", lambda x: attend(x, *args, **kwargs), hidden_states)


class FusedFeedForward(FeedForward):  # type: ignore[misc]
    """Feed-forward on fused tokens. A chunk of the tokens (chunked feed-forward) passes through unfused."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        if state is None:
            return FeedForward.forward(self, hidden_states, *args, **kwargs)
        layer = super().forward
        return state.run_merged("mlp", lambda x: layer(x, *args, **kwargs), hidden_states)
