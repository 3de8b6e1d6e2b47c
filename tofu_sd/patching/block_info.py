"""Where a transformer block is in a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

ATTRIBUTE = "_tofu"  # of patched layers: their state; of a patched model: its patch


@dataclass(frozen=True)
class BlockInfo:
    """One transformer block of a model.

    Args:
        name: the block's name in the model.
        depth: its index among all transformer blocks, in execution order.
        path: 'down', 'mid' or 'up'.
        level: 0 at the highest resolution with attention, 1 at the next.
        downsample: side of the latent divided by the side of the map.
        width: channels of its tokens.
        spatial_module: the module that gets the map as [B, C, h, w] before the block runs.
        layers: the block's layers: 'norm', 'attn', 'crossattn', 'mlp'; in classifiers also 'block', the block itself.
        block_class: the block's class.
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
        """Returns height and width of its map for a latent's: stride-2 convolutions round up."""
        h, w = latent
        return -(-h // self.downsample), -(-w // self.downsample)
