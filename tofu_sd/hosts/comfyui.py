"""ComfyUI: the nodes "Token Fusion (ToFu)", which patches a model, and "Token Fusion Map", which shows what it does.

What the nodes take is said once, in `OPTIONS` and `SHOW`; from that they are made for the newer interface (V3), and for
the older one where ComfyUI has no other.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..core.token_map import TokenMap, draw_merge_map
from ._attention_patches import Options
from ._model_patcher import patch_model, record_model_maps
from ._ui_options import CUSTOM, OPTIONS, PRESET, Option, chosen, fusion_of
from .ldm import Place

try:
    from comfy_api.latest import ComfyExtension, io
except ImportError:
    ComfyExtension = io = None

CATEGORY = "model/patch/unet"  # where the program has its own of this kind
ALIASES = ["tome", "token merging", "tomesd", "tofu", "token fusion", "speed", "faster", "acceleration"]
logger = logging.getLogger("tofu_sd")


SHOW = (
    Option("at_percent", 0.5, "At this part of the sampling.", 0.0, 1.0, 0.001),
    Option("map_seed", 0, "Of the noise that the picture is covered with for it.", 0, 2**31 - 1, 1),
)


# --- what the nodes do ------------------------------------------------------------------------------------------------


def fuse(model: Any, preset: str = CUSTOM, **options: Any) -> Any:
    """A clone of the model that fuses tokens. An option that an older workflow lacks is the default.

    One from before there were presets has none, and all its options count.
    """
    values, ignored = chosen(preset, options)
    if ignored:
        logger.warning(f"Token Fusion: {', '.join(ignored)} do not count, as preset is {preset} and not {CUSTOM}")
    config = fusion_of(values)
    sampling = model.get_model_object("model_sampling")
    clone, summary = patch_model(model, config, plain, sampling.percent_to_sigma)
    logger.info(summary.headline)
    return clone


def plain(q: Tensor, k: Tensor, v: Tensor, heads: int, options: Options) -> Tensor:
    """ComfyUI's own attention, whichever was chosen at its start, or what another node has put in its place."""
    override = {"transformer_options": options} if "optimized_attention_override" in options else {}
    return optimized_attention(q, k, v, heads, attn_precision=options.get("attn_precision"), **override)


def show(
    model: Any, positive: Any, latent: dict[str, Any], at_percent: float = 0.5, map_seed: int = 0
) -> tuple[Tensor, str]:
    """Which token stands for which in every fused block at one step of a picture: [blocks, H, W, 3] in 0..1.

    With the names of the blocks, a line for each image: "1: input 1.0", side, number and number in it.

    A colour for each group, dark gray for a token that stands for itself. ValueError for a model that fuses nothing.
    """
    import comfy.sample
    import comfy.samplers

    maps: dict[Place, Tensor] = {}

    def keep(place: Place, map: TokenMap, h: int, w: int) -> None:
        maps.setdefault(place, draw_merge_map(map, h, w)[-1].cpu())

    clone, patches = record_model_maps(model, keep)
    samples = comfy.sample.fix_empty_latent_channels(clone, latent["samples"][:1])
    sigma = clone.get_model_object("model_sampling").percent_to_sigma(at_percent)
    comfy.sample.sample_custom(
        clone, comfy.sample.prepare_noise(samples, map_seed), 1.0, comfy.samplers.sampler_object("euler"),
        torch.tensor([sigma, 0.0]), positive, positive, samples, disable_pbar=True, seed=map_seed,
    )  # fmt: skip
    if not maps:
        raise ValueError(f"nothing is fused at {at_percent:g} of the sampling: {'; '.join(sorted(patches.reasons))}")
    h, w = (8 * side for side in samples.shape[-2:])
    pictures = [F.interpolate(colours[None], size=(h, w), mode="nearest")[0] for colours in maps.values()]
    names = (f"{n}: {side} {number}.{index}" for n, (side, number, index) in enumerate(maps, 1))
    return torch.stack(pictures).permute(0, 2, 3, 1), "\n".join(names)


# --- the nodes --------------------------------------------------------------------------------------------------------

ABOUT_FUSE = (
    "Makes self-attention cheaper without training: like tokens are fused before it and unfolded after it (ToFu, WACV "
    "2024). The picture changes a little. Works on SD 1.x, 2.x and SDXL. The middle block is never fused, and a block "
    "whose self-attention another node replaces or changes is left to that node."
)
ABOUT_SHOW = (
    "Which token stands for which, a picture for each fused block: a colour for each group, gray for one alone."
)


def _kind(option: Option) -> str:
    return "COMBO" if option.names else {bool: "BOOLEAN", int: "INT", float: "FLOAT"}[type(option.default)]


def _limits(option: Option) -> dict[str, Any]:
    limits = {"min": option.least, "max": option.most, "step": option.step}
    return {name: value for name, value in limits.items() if value is not None}


if io is not None:

    def _inputs(options: tuple[Option, ...]) -> list[Any]:
        kinds = {"COMBO": io.Combo, "BOOLEAN": io.Boolean, "INT": io.Int, "FLOAT": io.Float}
        inputs = []
        for option in options:
            more = {"options": list(option.names)} if option.names else _limits(option)
            # optional, so that a workflow from before there was such an input loads
            made = kinds[_kind(option)].Input(
                option.name, default=option.default, tooltip=option.tooltip, optional=True, **more
            )
            if option.advanced:
                made.extra_dict = {"advanced": True}  # which is no argument in older ones
            inputs.append(made)
        return inputs

    # newer ones search for them
    _found_by = {"search_aliases": ALIASES} if "search_aliases" in getattr(io.Schema, "__annotations__", ()) else {}

    class TokenFusionNode(io.ComfyNode):  # type: ignore[misc]
        @classmethod
        def define_schema(cls) -> Any:
            return io.Schema(
                node_id="TokenFusion", display_name="Token Fusion (ToFu)", category=CATEGORY, description=ABOUT_FUSE,
                inputs=[io.Model.Input("model"), *_inputs((PRESET, *OPTIONS))], outputs=[io.Model.Output()],
                **_found_by,
            )  # fmt: skip

        @classmethod
        def execute(cls, model: Any, **options: Any) -> Any:
            return io.NodeOutput(fuse(model, **options))

    class TokenFusionMapNode(io.ComfyNode):  # type: ignore[misc]
        @classmethod
        def define_schema(cls) -> Any:
            return io.Schema(
                node_id="TokenFusionMap", display_name="Token Fusion Map", category=CATEGORY, description=ABOUT_SHOW,
                inputs=[io.Model.Input("model"), io.Conditioning.Input("positive"), io.Latent.Input("latent"),
                        *_inputs(SHOW)],
                outputs=[io.Image.Output(), io.String.Output(display_name="blocks")], **_found_by,
            )  # fmt: skip

        @classmethod
        def execute(cls, model: Any, positive: Any, latent: Any, **options: Any) -> Any:
            return io.NodeOutput(*show(model, positive, latent, **options))

    class TokenFusionExtension(ComfyExtension):  # type: ignore[misc]
        async def get_node_list(self) -> list[Any]:
            return [TokenFusionNode, TokenFusionMapNode]

    async def comfy_entrypoint() -> Any:
        return TokenFusionExtension()

else:

    def _asked(options: tuple[Option, ...]) -> dict[str, Any]:
        def more(o: Option) -> dict[str, Any]:
            advanced = {"advanced": True} if o.advanced else {}
            return {"default": o.default, "tooltip": o.tooltip, **_limits(o), **advanced}

        return {o.name: (list(o.names) if o.names else _kind(o), more(o)) for o in options}

    class TokenFusionNode:  # type: ignore[no-redef]
        RETURN_TYPES, FUNCTION, CATEGORY, DESCRIPTION = ("MODEL",), "execute", CATEGORY, ABOUT_FUSE
        SEARCH_ALIASES = ALIASES

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"model": ("MODEL",)}, "optional": _asked((PRESET, *OPTIONS))}

        def execute(self, model: Any, **options: Any) -> tuple[Any]:
            return (fuse(model, **options),)

    class TokenFusionMapNode:  # type: ignore[no-redef]
        RETURN_TYPES, FUNCTION, CATEGORY, DESCRIPTION = ("IMAGE", "STRING"), "execute", CATEGORY, ABOUT_SHOW
        RETURN_NAMES, SEARCH_ALIASES = ("IMAGE", "blocks"), ALIASES

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            required = {"model": ("MODEL",), "positive": ("CONDITIONING",), "latent": ("LATENT",)}
            return {"required": required, "optional": _asked(SHOW)}

        def execute(self, model: Any, positive: Any, latent: Any, **options: Any) -> tuple[Tensor, str]:
            return show(model, positive, latent, **options)

    NODE_CLASS_MAPPINGS = {"TokenFusion": TokenFusionNode, "TokenFusionMap": TokenFusionMapNode}
    NODE_DISPLAY_NAME_MAPPINGS = {"TokenFusion": "Token Fusion (ToFu)", "TokenFusionMap": "Token Fusion Map"}
