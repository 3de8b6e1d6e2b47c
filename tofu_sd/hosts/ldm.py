"""UNets laid out as in latent diffusion: those of ComfyUI, Forge, reForge and AUTOMATIC1111 (ldm, sgm).

Found by structure and not by class: each of these programs has classes of its own, and none of them is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..config import TokenFusionConfig
from ..core.proportional import weighted_attention
from ..core.reductions import unmerge
from ..patching.block_info import ATTRIBUTE, BlockInfo
from ..patching.block_state import BlockState, fusions
from ..patching.patch import attach, detach, patch_of, plan
from ._norm import FusedNorm, refuse_wrapped

STAGES = {"input_blocks": "down", "middle_block": "mid", "output_blocks": "up"}
SIDES = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}  # as patches are told of them
Place = tuple[str, int, int]
TEMPORAL = re.compile(r"tempor|motion|time_", re.IGNORECASE)  # in names of modules whose tokens are frames
MIDDLE = 2**31
"""The level of the middle block, which no `levels` reaches: guidance nodes (SAG, SEG, PAG) replace its self-attention,
and it has too few tokens for merging to pay."""


def find_blocks(unet: Any) -> dict[Place, BlockInfo]:
    """All transformer blocks with self-attention over a 4-D map, by their places, in execution order.

    A place is ("input", 1, 0): the side, the number of the block in it, the number of the transformer block
    there, as patches are told. Blocks over time, such as AnimateDiff's motion modules and the time stack of Stable
    Video Diffusion, are no sites.

    ValueError where there is none, saying what was looked for.
    """
    found = [
        (side, number, index, path, downsample, name, spatial_module, block)
        for side, number, path, downsample, stage, prefix in _stages(unet)
        for name, spatial_module in _transformers(stage, prefix)
        for index, block in enumerate(spatial_module.transformer_blocks)
        if _attends_to_itself(block)
    ]
    if not found:
        raise ValueError(
            f"no eligible block in {type(unet).__name__}: looked in {', '.join(STAGES)} for transformer_blocks with "
            "self-attention; token fusion acts on Stable Diffusion's UNets (SD 1.x, 2.x, SDXL and their relatives), "
            "diffusion transformers (SD3, Flux) have none"
        )
    levels = sorted({downsample for _, _, _, _, downsample, *_ in found})
    infos = {}
    for depth, (side, number, index, path, downsample, name, spatial_module, block) in enumerate(found):
        parts = {
            "norm": block.norm1, "attn": block.attn1, "crossattn": getattr(block, "attn2", None),
            "mlp": getattr(block, "ff", None),
        }  # fmt: skip
        parts = {role: part for role, part in parts.items() if part is not None}
        level = MIDDLE if side == "middle" else levels.index(downsample)
        infos[side, number, index] = BlockInfo(
            f"{name}.transformer_blocks.{index}", depth, path, level, downsample,
            block.norm1.normalized_shape[0], spatial_module, parts, type(block),
        )  # fmt: skip
    return infos


def _transformers(stage: nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """(name, module) of every transformer over a map in a stage; one inside a temporal module is none."""
    temporal: list[str] = []
    for name, module in stage.named_modules(prefix=prefix):
        if any(name.startswith(f"{outer}.") for outer in temporal):
            continue
        if TEMPORAL.search(type(module).__name__) or TEMPORAL.search(name.rpartition(".")[2]):
            temporal.append(name)
        elif isinstance(getattr(module, "transformer_blocks", None), nn.ModuleList):
            yield name, module


def _attends_to_itself(block: Any) -> bool:
    """Whether a transformer block has the layers of Stable Diffusion's, and its first attention is self-attention."""
    if TEMPORAL.search(type(block).__name__) or getattr(block, "disable_self_attn", False):
        return False
    layers = ("to_q", "to_k", "to_v", "to_out")
    normalized = hasattr(getattr(block, "norm1", None), "normalized_shape")
    return normalized and all(hasattr(getattr(block, "attn1", None), layer) for layer in layers)


def _stages(unet: Any) -> Iterator[tuple[str, int, str, int, nn.Module, str]]:
    """(side, number, path, downsample, module, its name) of every block in execution order."""
    downsample = 1
    for attribute, path in STAGES.items():
        blocks = getattr(unet, attribute, None)
        if not isinstance(blocks, nn.Module):
            return
        single = attribute == "middle_block"
        for number, block in enumerate([blocks] if single else blocks.children()):
            name = attribute if single else f"{attribute}.{number}"
            yield SIDES[attribute], number, path, downsample, block, name
            # a block makes its map smaller or larger at its end
            kinds = {type(module).__name__ for module in block.modules()}
            downsample = downsample * 2 if "Downsample" in kinds else downsample
            downsample = downsample // 2 if "Upsample" in kinds and path == "up" else downsample


def number_of_tokens(fusion: TokenFusionConfig) -> int:
    """min_tokens, which is measured on diffusers models alone: ValueError for "auto"."""
    if fusion.min_tokens == "auto":
        raise ValueError("min_tokens is 'auto', which is measured in diffusers alone: give a number of tokens here")
    return int(fusion.min_tokens)


@dataclass(frozen=True)
class PatchSummary:
    """Which blocks of a model are merged. The size of the map is unknown until an image is generated.

    model: class of the UNet. blocks: how many transformer blocks it has. merged: the merged ones, by name, each with
    the name of its reduction.
    """

    model: str
    blocks: int
    fusion: TokenFusionConfig
    merged: dict[str, str]

    @property
    def headline(self) -> str:
        least = self.fusion.min_tokens
        skipped = f", maps of fewer than {least} tokens left alone" if least else ""
        return f"{self.model}: {self.fusion.slug} on {len(self.merged)} of {self.blocks} transformer blocks{skipped}"

    def __str__(self) -> str:
        width = max(map(len, self.merged), default=0)
        return "\n".join([self.headline, *(f"  {name:<{width}}  {how}" for name, how in self.merged.items())])


def summarize(unet: Any, infos: dict[Place, BlockInfo], fusion: TokenFusionConfig) -> PatchSummary:
    """What is merged in a UNet with these sites under `fusion`."""
    merged = {info.name: state.reduction.__name__ for info, state in fusions(list(infos.values()), fusion)}
    return PatchSummary(type(unet).__name__, len(infos), fusion, merged)


# --- patching in place, where a program has no patches ----------------------------------------------------------------


def apply(unet: Any, fusion: TokenFusionConfig) -> PatchSummary:
    """Fuses tokens in a UNet of AUTOMATIC1111 for one sampling, in the place of what was applied before.

    ValueError or RuntimeError where it cannot be; the UNet is then without a patch.
    """
    restore(unet)
    number_of_tokens(fusion)
    infos = find_blocks(unet)
    attach(unet, plan(unet, list(infos.values()), fusion, swap, train_steps=1000, one_sampling=True))
    return summarize(unet, infos, fusion)


def restore(unet: Any) -> None:
    """The UNet as it was before `apply`; one without a patch stays as it is."""
    if patch_of(unet) is not None:
        detach(unet)


def swap(info: BlockInfo, role: str) -> type[nn.Module]:
    """The class that takes the place of the site's layer `role`."""
    part = info.layers[role]
    if role not in ("norm", "attn"):
        raise ValueError(f"{role} layers cannot be fused here: self-attention alone")
    if "forward" in vars(part):
        refuse_wrapped(f"{info.name}'s {role} layer")
    return FusedNorm if role == "norm" else fused_attention(type(part))  # type: ignore[arg-type]


@cache
def fused_attention(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a program's attention, forward(x, context, mask), that attends over fused tokens.

    It calls its parent's `forward` by name at every call: these programs put another one there when they start, such as
    xformers', and that one runs on fused tokens.
    """

    class FusedAttention(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **more: Any) -> Tensor:
            info: BlockState | None = getattr(self, ATTRIBUTE, None)
            if info is not None and info.normed:
                info.update_map(x)
            map = None if info is None else info.take("attn", x)
            if info is None or map is None or context is not None or mask is not None or any(more.values()):
                out: Tensor = super().forward(x, context=context, mask=mask, **more)
                return out
            fused = info.reduce(x, map)
            queries = x if info.kv_only else fused
            if info.proportional:  # the program's own has no place for weights: its mask is yes or no
                q, k, v = self.to_q(queries), self.to_k(fused), self.to_v(fused)
                out = self.to_out(weighted_attention(q, k, v, self.heads, map.size))
            else:
                out = super().forward(queries, context=fused if info.kv_only else None, **more)
            return out if info.kv_only else unmerge(out, map)

    FusedAttention.__name__ = f"Fused{kind.__name__}"
    return FusedAttention
