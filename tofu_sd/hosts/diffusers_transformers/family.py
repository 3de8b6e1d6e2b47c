"""Family: what differs between the diffusion transformers of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...patching.host import Argument, ArgumentNames, MapCall, Probe, ReadMap

Swaps = Mapping[str, tuple[type[nn.Module], type[nn.Module]]]


@dataclass(frozen=True)
class BlockKind:
    """The transformer blocks in one list of a model.

    Args:
        blocks: the attribute of the model that lists them.
        block_class: their class.
        layers: where each layer is in the block, in the order in which they run; a layer that is None is skipped.
        swaps: for each layer, its class and the subclass that runs on merged tokens.
        probe: runs the block's attention on image tokens, to time it.
        joined: whether its layers get text and image as one sequence.
    """

    blocks: str
    block_class: type[nn.Module]
    layers: Mapping[str, str]
    swaps: Swaps
    probe: Probe
    joined: bool = False


@dataclass(frozen=True)
class Family:
    """A family of diffusion transformers.

    Args:
        kinds: its blocks, in execution order.
        arguments: where the model takes its arguments, and how the map of a call is read from them.
        text_tokens: how many text tokens its pipeline usually gives.
        processors: names of the attention processors that run on merged tokens; () for layers as in UNets, which run
            with any processor.
        timestep_scale: what the scheduler's timesteps are multiplied by before the model gets them.
        merges_states: whether image tokens are merged before their projections to queries, keys and values, instead of
            after.
        patch: side of a token in cells of the latent; None where the model's config has it.
        sample_size: side of the latent where the model's config has none.
        defaults: options that differ from the configuration's own defaults.
        refused: options that do not work with these models, and why.
    """

    kinds: tuple[BlockKind, ...]
    arguments: ArgumentNames
    text_tokens: int
    processors: tuple[str, ...] = ()
    timestep_scale: float = 1.0
    merges_states: bool = False
    patch: int | None = None
    sample_size: int = 128
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def patch_of(self, model: Any) -> int:
        """Returns the side of a token in cells of the latent."""
        return self.patch or int(model.config.patch_size)


LATENT = Argument(0, ("hidden_states",))
TEXT = Argument(1, ("encoder_hidden_states",))


def arguments_of(timestep: int, read_map: ReadMap, keys: str = "") -> ArgumentNames:
    """Returns where a transformer takes its arguments, of which latent and text come first.

    Args:
        timestep: position of the timestep.
        read_map: returns the map of a call.
        keys: see ArgumentNames.
    """
    return ArgumentNames(LATENT, Argument(timestep, ("timestep",)), TEXT, LATENT, keys, read_map)


def map_of_latent(model: Any, latent: Tensor) -> MapCall:
    """Returns the map of a latent [B, C, h, w], of which each whole patch is a token."""
    side = int(model.config.patch_size)
    h, w = latent.shape[-2:]
    return MapCall(len(latent), h // side, w // side, latent.device, latent.dtype)
