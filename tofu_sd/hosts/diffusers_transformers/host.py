"""The Host of diffusion transformers: finds and patches their blocks by the description of their family."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from ...config import TokenFusionConfig
from ...patching.host import ArgumentNames, BlockInfo
from ...patching.patch import Patch
from .._norm import check_forward
from ..diffusers_unet import check_processors
from ..unwrapping import unwrapped
from .family import BlockKind, Family
from .flops import attention_share, ceilings
from .processors import check_processor


@dataclass(frozen=True)
class TransformerHost:
    """A Host for the models of one family."""

    family: Family

    @property
    def ARGUMENTS(self) -> ArgumentNames:
        return self.family.arguments

    def unwrap(self, model: Any) -> tuple[nn.Module, float]:
        """Returns (the transformer of a pipeline, or the module without its wrappers; the timestep it starts at)."""
        inner = unwrapped(model)
        transformer: nn.Module = unwrapped(getattr(inner, "transformer", inner))
        config = getattr(getattr(model, "scheduler", None), "config", None)
        steps = int(getattr(config, "num_train_timesteps", None) or 1000)
        return transformer, steps * self.family.timestep_scale

    def default_options(self) -> Mapping[str, Any]:
        """Returns the options that differ from the configuration's own defaults."""
        return self.family.defaults

    def check_config(self, model: nn.Module, config: TokenFusionConfig) -> None:
        """Raises ValueError for an option that does not work with the model. Names it and the reason."""
        name = type(model).__name__
        if config.levels > 1:
            raise ValueError(f"levels is {config.levels}, and {name} has one resolution: leave levels off")
        if config.depth_split == "auto":
            raise ValueError(
                f"depth_split is 'auto', which is measured on UNets only, and this is a {name}: give a number; "
                "None splits at half of the blocks"
            )
        for option, reason in self.family.refused.items():
            if getattr(config, option):
                raise ValueError(f"{option} does not work with {name}: {reason}")

    def latent_size(self, model: nn.Module) -> tuple[int, int]:
        """Returns height and width of the latent that the model was made for."""
        size: Any = getattr(getattr(model, "config", None), "sample_size", None) or self.family.sample_size
        return tuple(size) if isinstance(size, list | tuple) else (size, size)

    def find_blocks(self, model: nn.Module) -> list[BlockInfo]:
        """Returns all transformer blocks, in execution order.

        Raises:
            ValueError: there is none.
        """
        found = [
            (f"{kind.blocks}.{i}", kind, block)
            for kind in self.family.kinds
            for i, block in enumerate(getattr(model, kind.blocks, ()))
        ]
        if not found:
            places = " and ".join(kind.blocks for kind in self.family.kinds)
            raise ValueError(f"no eligible block in {type(model).__name__}: {places} holds none")
        patch = self.family.patch_of(model)
        infos = []
        for depth, (name, kind, block) in enumerate(found):
            layers = {key: attrgetter(place)(block) for key, place in kind.layers.items() if _has(block, place)}
            path = "first half" if depth < len(found) // 2 else "second half"
            width = layers["attn"].query_dim
            infos.append(
                BlockInfo(
                    name, depth, path, 0, patch, width, model, layers, type(block), whole_patches=True, probe=kind.probe
                )
            )
        return infos

    def swap_class(self, block: BlockInfo, layer: str, swapped: Collection[nn.Module] = ()) -> type[nn.Module]:
        """Returns the subclass that replaces the class of a block's layer. RuntimeError where something wrapped it."""
        kind = self._kind(block)
        module, (plain, merged) = block.layers[layer], kind.swaps[layer]
        for what, own, expected in (
            (block.name, block.block_class, kind.block_class),
            (f"{block.name}'s {layer} layer", type(module), plain),
        ):
            if own is not expected:
                raise RuntimeError(
                    f"{what} is a {own.__module__}.{own.__qualname__}, not a plain {expected.__name__}: something "
                    "else has already wrapped it; remove that first"
                )
        if layer != "norm" and module not in swapped:
            check_forward(module, f"{block.name}'s {layer} layer", merged)
        return merged

    def _kind(self, block: BlockInfo) -> BlockKind:
        return next(kind for kind in self.family.kinds if kind.blocks == block.name.split(".")[0])

    def check_processors(self, patch: Patch) -> None:
        """Raises RuntimeError for processors that do not work with a patch, before anything is generated."""
        if not self.family.processors:
            check_processors(patch)
            return
        for layer, *_ in patch.swaps:
            if hasattr(layer, "processor"):
                check_processor(layer, self.family.processors)

    def attention_share(self, model: nn.Module, blocks: list[BlockInfo], latent: tuple[int, int]) -> float:
        """Returns the share of a step's FLOPs that self-attention takes."""
        pairs = [(block, self._kind(block)) for block in blocks]
        return attention_share(model, pairs, latent, self.family.text_tokens)

    def ceilings(self, model: nn.Module, latent: tuple[int, int], ratio: float) -> dict[str, float]:
        """Returns the most that merging can speed up a step, by FLOPs, for each form of merging."""
        pairs = [(block, self._kind(block)) for block in self.find_blocks(model)]
        return ceilings(model, pairs, latent, self.family.text_tokens, ratio)


def _has(block: nn.Module, place: str) -> bool:
    """Whether a block has a layer; dual attention, for example, is None in some blocks."""
    return getattr(block, place.split(".")[0], None) is not None
