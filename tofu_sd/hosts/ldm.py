"""UNets laid out as in latent diffusion: those of ComfyUI, Forge, reForge and AUTOMATIC1111 (ldm, sgm).

Found by structure and not by class: each of these programs has classes of its own, and none of them is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..patch import Site

STAGES = {"input_blocks": "down", "middle_block": "mid", "output_blocks": "up"}
SIDES = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}  # as patches are told of them
Place = tuple[str, int, int]


def find_sites(unet: Any) -> dict[Place, Site]:
    """All transformer blocks with self-attention over a 4-D map, by their places, in execution order.

    A place is ("input", 1, 0): the side, the number of the block in it, the number of the transformer block
    there, as patches are told.

    ValueError where there is none, saying what was looked for.
    """
    found = [
        (side, number, index, path, downsample, name, canvas, block)
        for side, number, path, downsample, stage, prefix in _stages(unet)
        for name, canvas in stage.named_modules(prefix=prefix)
        if isinstance(getattr(canvas, "transformer_blocks", None), nn.ModuleList)
        for index, block in enumerate(canvas.transformer_blocks)
        if not getattr(block, "disable_self_attn", False)
    ]
    if not found:
        raise ValueError(
            f"no eligible block in {type(unet).__name__}: looked in {', '.join(STAGES)} for transformer_blocks with "
            "self-attention; token fusion acts on Stable Diffusion's UNets (SD 1.x, 2.x, SDXL and their relatives), "
            "diffusion transformers (SD3, Flux) have none"
        )
    levels = sorted({downsample for _, _, _, _, downsample, *_ in found})
    sites = {}
    for depth, (side, number, index, path, downsample, name, canvas, block) in enumerate(found):
        parts = {"norm": block.norm1, "attn": block.attn1, "crossattn": block.attn2, "mlp": block.ff}
        parts = {role: part for role, part in parts.items() if part is not None}
        sites[side, number, index] = Site(
            f"{name}.transformer_blocks.{index}", depth, path, levels.index(downsample), downsample,
            block.norm1.normalized_shape[0], canvas, parts, type(block),
        )  # fmt: skip
    return sites


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
