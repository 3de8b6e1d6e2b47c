"""No self-attention where tokens would be merged: a reference, which bounds the error of every method there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from .attention import is_unet, swap_attention
from .registry import register_method


class NoAttention(Attention):  # type: ignore[misc]
    """Adds nothing to the tokens."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


@register_method("no-attention", fits=is_unet)
def no_attention(pipe: Any) -> AbstractContextManager[Any]:
    """Inside, the pipeline generates without the self-attention of the highest resolution."""
    return swap_attention(pipe, NoAttention)
