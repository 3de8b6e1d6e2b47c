"""UNets with the layout of latent diffusion: those of ComfyUI, Forge, reForge and AUTOMATIC1111 (ldm, sgm).

They are found by structure: each of these programs has classes of its own, and none of them is imported here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from ..config import TokenFusionConfig
from ..core.proportional import proportional_attention
from ..core.token_map import SoftMap, TokenMap
from ..patching.block_state import BlockState, block_states
from ..patching.host import ATTRIBUTE, Argument, ArgumentNames, BlockInfo, Host
from ..patching.patch import attach, detach, patch_of, plan
from ._norm import NormForMatching, check_forward

ARGUMENTS = ArgumentNames(
    latent=Argument(0, ("x",)),
    timestep=Argument(1, ("timesteps",)),
    conditioning=Argument(2, ("context",)),
    tokens=Argument(0, ("x",)),
    keys="context",
)
STAGES = {"input_blocks": "down", "middle_block": "mid", "output_blocks": "up"}
SIDES = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}  # the names in patch options
Place = tuple[str, int, int]
TEMPORAL = re.compile(r"tempor|motion|time_", re.IGNORECASE)  # in names of modules whose tokens are frames
MIDDLE = 2**31
"""The level of the middle block, which no `levels` reaches: guidance nodes (SAG, SEG, PAG) replace its self-attention,
and merging its few tokens does not pay."""


def find_blocks(unet: Any) -> list[BlockInfo]:
    """Returns all transformer blocks with self-attention over a 4-D map, in execution order. See `find_places`."""
    return list(find_places(unet).values())


def find_places(unet: Any) -> dict[Place, BlockInfo]:
    """Returns all transformer blocks with self-attention over a 4-D map, by their places, in execution order.

    A place is ("input", 1, 0): the side, the number of the block in it, the number of the transformer block there, as
    these programs write it in the options of patches. Blocks over time are left out: AnimateDiff's motion modules and
    the time stack of Stable Video Diffusion.

    Raises:
        ValueError: there is none. Names what was looked for.
    """
    blocks = [
        ((side, number, index), path, downsample, name, spatial_module, block)
        for side, number, path, downsample, stage, prefix in _stages(unet)
        for name, spatial_module in _transformers(stage, prefix)
        for index, block in enumerate(spatial_module.transformer_blocks)
        if _has_self_attention(block)
    ]
    if not blocks:
        raise ValueError(
            f"no eligible block in {type(unet).__name__}: looked in {', '.join(STAGES)} for transformer_blocks with "
            "self-attention; token fusion patches Stable Diffusion's UNets (SD 1.x, 2.x, SDXL and their relatives), "
            "diffusion transformers (SD3, Flux) have none"
        )
    levels = sorted({downsample for _, _, downsample, *_ in blocks})
    infos = {}
    for depth, (place, path, downsample, name, spatial_module, block) in enumerate(blocks):
        layers = {
            "norm": block.norm1, "attn": block.attn1, "crossattn": getattr(block, "attn2", None),
            "mlp": getattr(block, "ff", None),
        }  # fmt: skip
        layers = {key: layer for key, layer in layers.items() if layer is not None}
        level = MIDDLE if path == "mid" else levels.index(downsample)
        infos[place] = BlockInfo(
            f"{name}.transformer_blocks.{place[2]}", depth, path, level, downsample,
            block.norm1.normalized_shape[0], spatial_module, layers, type(block),
        )  # fmt: skip
    return infos


def _transformers(stage: nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields (name, module) of every transformer over a map in a stage, except inside temporal modules."""
    temporal: list[str] = []
    for name, module in stage.named_modules(prefix=prefix):
        if any(name.startswith(f"{outer}.") for outer in temporal):
            continue
        if TEMPORAL.search(type(module).__name__) or TEMPORAL.search(name.rpartition(".")[2]):
            temporal.append(name)
        elif isinstance(getattr(module, "transformer_blocks", None), nn.ModuleList):
            yield name, module


def _has_self_attention(block: Any) -> bool:
    """Whether a transformer block has the layers of Stable Diffusion's, and its first attention is self-attention."""
    if TEMPORAL.search(type(block).__name__) or getattr(block, "disable_self_attn", False):
        return False
    layers = ("to_q", "to_k", "to_v", "to_out")
    normalized = hasattr(getattr(block, "norm1", None), "normalized_shape")
    return normalized and all(hasattr(getattr(block, "attn1", None), layer) for layer in layers)


def _stages(unet: Any) -> Iterator[tuple[str, int, str, int, nn.Module, str]]:
    """Yields (side, number, path, downsample, module, its name) of every block in execution order."""
    downsample = 1
    for attribute, path in STAGES.items():
        blocks = getattr(unet, attribute, None)
        if not isinstance(blocks, nn.Module):
            return
        single = attribute == "middle_block"
        for number, block in enumerate([blocks] if single else blocks.children()):
            name = attribute if single else f"{attribute}.{number}"
            yield SIDES[attribute], number, path, downsample, block, name
            # a block changes the size of its map at its end
            kinds = {type(module).__name__ for module in block.modules()}
            downsample = downsample * 2 if "Downsample" in kinds else downsample
            downsample = downsample // 2 if "Upsample" in kinds and path == "up" else downsample


def latent_size(unet: Any) -> None:
    """Returns None: these UNets do not say for which size they were made."""


@dataclass(frozen=True)
class PatchSummary:
    """Which blocks of a model are merged. The size of the map is unknown until an image is generated.

    Args:
        model: class of the UNet.
        blocks: number of its transformer blocks.
        config: how tokens are merged.
        merged: name of the reduction of each merged block, by the block's name.
    """

    model: str
    blocks: int
    config: TokenFusionConfig
    merged: dict[str, str]

    @property
    def headline(self) -> str:
        fewest = self.config.min_tokens
        skipped = f", maps of fewer than {fewest} tokens skipped" if fewest else ""
        if fewest == "auto":
            skipped = ", on maps where that is faster"
        return f"{self.model}: {self.config.slug} on {len(self.merged)} of {self.blocks} transformer blocks{skipped}"

    def __str__(self) -> str:
        width = max(map(len, self.merged), default=0)
        return "\n".join([self.headline, *(f"  {name:<{width}}  {how}" for name, how in self.merged.items())])


def summarize(unet: Any, blocks: Collection[BlockInfo], config: TokenFusionConfig) -> PatchSummary:
    """Returns which of a UNet's blocks a configuration merges."""
    merged = {block.name: state.reductions.label for block, state in block_states(list(blocks), config)}
    return PatchSummary(type(unet).__name__, len(blocks), config, merged)


# --- patching in place, for AUTOMATIC1111 -----------------------------------------------------------------------------


def apply(unet: Any, config: TokenFusionConfig) -> PatchSummary:
    """Patches a UNet of AUTOMATIC1111 for one sampling. A patch that it already has is replaced.

    Raises:
        ValueError, RuntimeError: it cannot be patched. The UNet is then without a patch.
    """
    restore(unet)
    blocks = find_blocks(unet)
    host = cast(Host, sys.modules[__name__])
    attach(unet, plan(unet, blocks, config, host, train_steps=1000, one_sampling=True))
    return summarize(unet, blocks, config)


def restore(unet: Any) -> None:
    """Undoes `apply`; a UNet without a patch stays unchanged."""
    if patch_of(unet) is not None:
        detach(unet)


def swap_class(block: BlockInfo, layer: str, swapped: Collection[nn.Module] = ()) -> type[nn.Module]:
    """Returns the subclass that replaces the class of a block's layer.

    Raises:
        ValueError: the layer is neither the norm nor self-attention.
        RuntimeError: something else has wrapped the layer.
    """
    module = block.layers[layer]
    if layer not in ("norm", "attn"):
        raise ValueError(f"{layer} layers cannot be merged here, only self-attention")
    merged: type[nn.Module]
    merged = NormForMatching if layer == "norm" else merged_attention(type(module))  # type: ignore[arg-type]
    if module not in swapped:
        check_forward(module, f"{block.name}'s {layer} layer", merged)
    return merged


@cache
def merged_attention(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns a subclass of a program's attention, forward(x, context, mask), that attends over merged tokens.

    It looks up its parent's `forward` at every call: these programs replace it when they start, for example by
    xformers', and the replacement then runs on merged tokens.
    """

    class MergedAttention(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **more: Any) -> Tensor:
            attend = super().forward
            state: BlockState | None = getattr(self, ATTRIBUTE, None)
            if state is None:
                return attend(x, context=context, mask=mask, **more)

            def full() -> Tensor:
                return attend(x, context=context, mask=mask, **more)

            def merged(queries: Tensor, keys: Tensor | None, map: TokenMap | SoftMap) -> Tensor:
                if not state.needs_bias(map):
                    return attend(queries, context=keys, **more)
                # the program's own attention has no additive mask
                source = queries if keys is None else keys
                q, k, v = self.to_q(queries), self.to_k(source), self.to_v(source)
                return self.to_out(proportional_attention(q, k, v, self.heads, map.log_size, state.size_classes(map)))

            can_merge = context is None and mask is None and not any(more.values())
            return state.run_attention(x, full, merged, lambda: can_merge)

    MergedAttention.__name__ = f"Merged{kind.__name__}"
    return MergedAttention
