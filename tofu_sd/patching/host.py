"""Host: what a model library must provide so that its models can be patched. BlockInfo: one of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

ATTRIBUTE = "_tofu"  # of patched layers: their state; of a patched model: its patch
EARLY_PATHS = ("down", "first half")  # of the blocks that `depth_split=None` puts before the split

Probe = Callable[[nn.Module, Tensor], Any]


def run_alone(attention: nn.Module, x: Tensor) -> Any:
    """Runs an attention that needs nothing but its tokens x [B, N, C]."""
    return attention(x)


def has_forward_of(layer: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether the `forward` that was set on a layer is only that of one of these classes, left by a removed hook."""
    forward = vars(layer).get("forward")
    functions = [kind.forward for kind in classes]
    return getattr(forward, "__self__", None) is layer and getattr(forward, "__func__", None) in functions


@dataclass(frozen=True)
class BlockInfo:
    """One transformer block of a model.

    Args:
        name: the block's name in the model.
        depth: its index among all transformer blocks, in execution order.
        path: 'down', 'mid' or 'up'; of a model without them 'first half' or 'second half' of its blocks.
        level: 0 at the highest resolution with attention, 1 at the next.
        downsample: side of the latent divided by the side of the map.
        width: channels of its tokens.
        spatial_module: the module that gets the map as [B, C, h, w] before the block runs.
        layers: the block's layers in the order in which they run: 'norm', 'attn', 'attn2' (a second self-attention),
            'crossattn', 'mlp'; in classifiers also 'block', the block itself.
        block_class: the block's class.
        whole_patches: whether the map has a token for each whole patch of the latent; the rest at the edges is cut.
        probe: runs the block's attention on the tokens of a map, to time it.
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
    whole_patches: bool = False
    probe: Probe = run_alone

    def map_size(self, latent: tuple[int, int]) -> tuple[int, int]:
        """Returns height and width of its map for a latent's: stride-2 convolutions round up, patches down."""
        h, w = latent
        if self.whole_patches:
            return h // self.downsample, w // self.downsample
        return -(-h // self.downsample), -(-w // self.downsample)

    def merged_layers(self, merged: tuple[str, ...]) -> tuple[str, ...]:
        """Returns its layers that run on merged tokens, in their order.

        Args:
            merged: which kinds do: 'attn', which includes 'attn2', 'crossattn', 'mlp'.
        """
        second = ("attn2",) if "attn2" in self.layers and "attn" in merged else ()
        return (*merged[:1], *second, *merged[1:]) if second else merged


class Argument(NamedTuple):
    """An argument of a host's forward: its position and the keywords that hosts use for it."""

    position: int
    names: tuple[str, ...]

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns the argument of a call, by keyword or by position; None without it."""
        value = next((kwargs[name] for name in self.names if name in kwargs), None)
        return args[self.position] if value is None and len(args) > self.position else value


class MapCall(NamedTuple):
    """The map of one call of a spatial module.

    Args:
        batch: number of samples.
        h, w: height and width of the map, in tokens.
        device, dtype: of the tokens.
        after: number of other image tokens that follow the map in the sequence (reference images).
    """

    batch: int
    h: int
    w: int
    device: torch.device
    dtype: torch.dtype
    after: int = 0


ReadMap = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], MapCall]


@dataclass(frozen=True)
class ArgumentNames:
    """Where a host's modules take their arguments.

    Args:
        latent: the latent [B, C, h, w] of the model; for classifiers the images.
        timestep: the timestep or noise level of the model.
        conditioning: the text embedding of the model.
        tokens: the input of a spatial module [B, C, h, w] and of a block's layers [B, N, C].
        keys: the keyword by which an attention layer takes other tokens for keys and values; "" without one.
        read_map: returns the map of a call of a spatial module, where that is not the size of its input.
    """

    latent: Argument
    timestep: Argument
    conditioning: Argument
    tokens: Argument
    keys: str
    read_map: ReadMap | None = None

    def map_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MapCall:
        """Returns the map of a call of a spatial module."""
        if self.read_map is not None:
            return self.read_map(module, args, kwargs)
        x = self.tokens.get(args, kwargs)
        return MapCall(x.shape[0], x.shape[-2], x.shape[-1], x.device, x.dtype)


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
