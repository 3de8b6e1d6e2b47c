"""UNets laid out as in latent diffusion: those of ComfyUI, Forge, reForge and AUTOMATIC1111 (ldm, sgm).

Found by structure and not by class: each of these programs has classes of its own, and none of them is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..patch import ATTRIBUTE, Site, SiteFusion, Summary, attach, detach, patch_of, plan, summarize
from ..policy import TokenFusion
from ..proportional import weighted_attention
from ..reduce import unmerge
from .norm import FusedNorm, refuse_wrapped

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


def number_of_tokens(fusion: TokenFusion) -> int:
    """min_tokens, which is measured on diffusers models alone: ValueError for "auto"."""
    if fusion.min_tokens == "auto":
        raise ValueError("min_tokens is 'auto', which is measured in diffusers alone: give a number of tokens here")
    return int(fusion.min_tokens)


def told(unet: Any, sites: dict[Place, Site], fusion: TokenFusion) -> Summary:
    """What is fused, at the latent of a picture of 512 pixels: these programs say the size when they draw."""
    least = {site.level: number_of_tokens(fusion) for site in sites.values()}
    return summarize(type(unet).__name__, list(sites.values()), fusion, least, (64, 64))


# --- patching in place, where a program has no patches ----------------------------------------------------------------


def apply(unet: Any, fusion: TokenFusion) -> Summary:
    """Fuses tokens in a UNet of AUTOMATIC1111 from now on, in the place of what was applied before.

    ValueError or RuntimeError where it cannot be; the UNet is then without a patch.
    """
    restore(unet)
    number_of_tokens(fusion)
    if fusion.threshold is not None:
        raise ValueError(
            f"threshold is {fusion.threshold!r}, which counts in one step for the next: this program makes its "
            "conditioning anew in every step, so that none is known to follow another"
        )
    sites = find_sites(unet)
    attach(unet, plan(unet, list(sites.values()), fusion, swap, train_steps=1000))
    return told(unet, sites, fusion)


def restore(unet: Any) -> None:
    """The UNet as it was before `apply`; one without a patch stays as it is."""
    if patch_of(unet) is not None:
        detach(unet)


def swap(site: Site, role: str) -> type[nn.Module]:
    """The class that takes the place of the site's layer `role`."""
    part = site.parts[role]
    if role not in ("norm", "attn"):
        raise ValueError(f"{role} layers cannot be fused here: self-attention alone")
    if "forward" in vars(part):
        refuse_wrapped(f"{site.name}'s {role} layer")
    return FusedNorm if role == "norm" else fused_attention(type(part))  # type: ignore[arg-type]


@cache
def fused_attention(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a program's attention, forward(x, context, mask), that attends over fused tokens.

    It calls its parent's `forward` by name at every call: these programs put another one there when they start, such as
    xformers', and that one runs on fused tokens.
    """

    class FusedAttention(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **more: Any) -> Tensor:
            site: SiteFusion | None = getattr(self, ATTRIBUTE, None)
            if site is not None and site.normed:
                site.observe(x)
            map = None if site is None else site.take("attn", x)
            if site is None or map is None or context is not None or mask is not None or any(more.values()):
                out: Tensor = super().forward(x, context=context, mask=mask, **more)
                return out
            fused = site.reduce(x, map)
            queries = x if site.keys_only else fused
            if site.proportional:  # the program's own has no place for weights: its mask is yes or no
                q, k, v = self.to_q(queries), self.to_k(fused), self.to_v(fused)
                out = self.to_out(weighted_attention(q, k, v, self.heads, map.size))
            else:
                out = super().forward(queries, context=fused if site.keys_only else None, **more)
            return out if site.keys_only else unmerge(out, map)

    FusedAttention.__name__ = f"Fused{kind.__name__}"
    return FusedAttention
