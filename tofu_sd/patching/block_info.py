"""Where a transformer block lies in a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

ATTRIBUTE = "_tofu"


@dataclass(frozen=True)
class BlockInfo:
    """One transformer block of a host model.

    name: the block's name in the model. depth: its place among all transformer blocks in execution order. path: 'down',
    'mid' or 'up'. level: 0 at the highest resolution with attention, 1 at the next. downsample: the latent's side over
    the map's. width: channels of its tokens. canvas: the module that sees the map as [B, C, h, w] before the block
    runs. parts: the block's layers by role ('norm', 'attn', 'crossattn', 'mlp'). block: the block's class.
    """

    name: str
    depth: int
    path: str
    level: int
    downsample: int
    width: int
    spatial_module: nn.Module
    layers: dict[str, nn.Module]
    block_class: type[nn.Module]

    def map_size(self, latent: tuple[int, int]) -> tuple[int, int]:
        """Height and width of its map under a latent's: stride-2 convolutions round up."""
        h, w = latent
        return -(-h // self.downsample), -(-w // self.downsample)
