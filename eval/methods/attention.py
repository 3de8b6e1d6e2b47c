"""The self-attention of the highest resolution, for methods that replace it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

import tofu_sd

from .. import EvalError
from ..common.cli import quiet_patches


def as_square_map(tokens: Tensor) -> Tensor:
    """Tokens [B, N, C] of a square map as [B, side, side, C]; the images of an evaluation are square."""
    side = math.isqrt(tokens.shape[1])
    return tokens.view(tokens.shape[0], side, side, -1)


def is_unet(denoiser: type[Any]) -> bool:
    """Whether a class is that of a UNet."""
    return issubclass(denoiser, UNet2DConditionModel)


def unet_of(pipe: Any) -> Any:
    """The UNet of a pipeline, or the UNet itself. EvalError for a pipeline or model without one."""
    unet = getattr(pipe, "unet", pipe)
    if not hasattr(unet, "down_blocks"):
        raise EvalError(f"it changes layers of a UNet, and {type(pipe).__name__} has none")
    return unet


def top_attentions(unet: Any, ratio: float = 0.5, latent: tuple[int, int] | None = None) -> list[tuple[Any, int]]:
    """(self-attention, tokens after merging) of each block of the highest resolution that has attention."""
    with quiet_patches(), tofu_sd.patched(unet, ratio):
        rows = tofu_sd.summary(unet, latent).rows
    return [(unet.get_submodule(row.name).attn1, row.after) for row in rows]


@contextmanager
def swap_attention(pipe: Any, attention: type[Attention]) -> Iterator[Any]:
    """Inside, the self-attention of the highest resolution is of another class."""
    own = [(module, type(module)) for module, _ in top_attentions(unet_of(pipe))]
    for module, _ in own:
        module.__class__ = attention
    try:
        yield pipe
    finally:
        for module, kind in own:
            module.__class__ = kind
