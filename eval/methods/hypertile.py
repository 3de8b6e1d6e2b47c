"""HyperTile: attention within tiles of the map (tfernd, 2023); the idea, written here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor

import tofu_sd

from .. import EvalError
from ..common.cli import quiet_patches
from .attention import as_square_map, is_unet, swap_attention
from .registry import register_method


class TiledAttention(Attention):  # type: ignore[misc]
    """Each quarter of the map attends to itself only: 2 x 2 tiles."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        square = as_square_map(hidden_states)
        B, side, _, C = square.shape
        tiles = square.view(B, 2, side // 2, 2, side // 2, C).transpose(2, 3).reshape(4 * B, -1, C)
        out = super().forward(tiles).view(B, 2, 2, side // 2, side // 2, -1)
        return out.transpose(2, 3).reshape(B, side * side, -1)


def check_tiles(pipe: Any, latent: int) -> None:
    """EvalError where a latent of this side gives a map that does not divide into tiles."""
    with quiet_patches(), tofu_sd.patched(pipe):
        sizes = [row.size for row in tofu_sd.summary(pipe, (latent, latent)).rows]
    for h, w in sizes:
        if h % 2:
            raise EvalError(f"hypertile cuts maps into 2 x 2 tiles, and this size gives one of {h} x {w} tokens")


@register_method("hypertile", check=check_tiles, fits=is_unet)
def hypertile(pipe: Any) -> AbstractContextManager[Any]:
    """Inside, the pipeline generates with tiled attention."""
    return swap_attention(pipe, TiledAttention)
