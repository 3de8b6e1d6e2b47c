"""Host: what a model library must provide so that its models can be patched. BlockInfo: one of its blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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


class Argument(NamedTuple):
    """An argument of a host's forward: its position and the keywords that hosts use for it."""

    position: int
    names: tuple[str, ...]

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns the argument of a call, by keyword or by position; None without it."""
        value = next((kwargs[name] for name in self.names if name in kwargs), None)
        return args[self.position] if value is None and len(args) > self.position else value


@dataclass(frozen=True)
class ArgumentNames:
    """Where a host's modules take their arguments.

    Args:
        latent: the latent [B, C, h, w] of the model; for classifiers the images.
        timestep: the timestep or noise level of the model.
        conditioning: the text embedding of the model.
        tokens: the input of a spatial module [B, C, h, w] and of a block's layers [B, N, C].
        keys: the keyword by which an attention layer takes other tokens for keys and values; "" without one.
    """

    latent: Argument
    timestep: Argument
    conditioning: Argument
    tokens: Argument
    keys: str


class Host(Protocol):
    """A model library. Each host is a module with these functions; `patch.plan` and `patch.attach` do the rest."""

    ARGUMENTS: ArgumentNames

    def find_blocks(self, model: Any, /) -> list[BlockInfo]:
        """Returns all transformer blocks with self-attention over a map, in execution order.

        Raises:
            ValueError: there is none. Names what was looked for.
        """
        ...

    def swap_class(self, block: BlockInfo, layer: str, /, swapped: Collection[nn.Module] = ()) -> type[nn.Module]:
        """Returns the subclass that replaces the class of a block's layer.

        Args:
            block: one of `find_blocks`.
            layer: a key of `block.layers`.
            swapped: layers of the patch that is replaced; hooks that others set on them since then are allowed.

        Raises:
            RuntimeError: something else has wrapped the layer.
            ValueError: the host cannot run this layer on merged tokens.
        """
        ...

    def latent_size(self, model: Any, /) -> tuple[int, int] | None:
        """Returns height and width of the latent that a model is made for; None where it is unknown."""
        ...
