"""ComfyUI: the nodes "Token Fusion (ToFu)", which patches a model, and "Token Fusion Map", which shows its maps.

The inputs of the nodes are described once, in `OPTIONS` and `SHOW`. The nodes are made for the newer interface (V3),
or for the older one where ComfyUI has no other.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules import attention as comfy_attention
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..core.token_map import TokenMap, draw_merge_map
from ..utils import show_log
from .ldm import Place
from .programs.call_state import Options
from .programs.model_patcher import patch_model, patch_transformer, record_model_maps
from .programs.transformer_families import family_of
from .programs.ui_options import CUSTOM, OPTIONS, PRESET, Option, apply_preset, config_of

try:
    from comfy_api.latest import ComfyExtension, io
except ImportError:
    ComfyExtension = io = None

CATEGORY = "model/patch/unet"  # the category of the program's own nodes of this kind
ALIASES = ["tome", "token merging", "tomesd", "tofu", "token fusion", "speed", "faster", "acceleration"]
logger = logging.getLogger("tofu_sd")
show_log()


SHOW = (
    Option("at_percent", 0.5, "Which step to show, as a share of the sampling.", 0.0, 1.0, 0.001),
    Option("map_seed", 0, "Seed of the noise that is added to the image for this step.", 0, 2**31 - 1, 1),
)


# --- what the nodes do ------------------------------------------------------------------------------------------------


def patch_with_preset(model: Any, preset: str = CUSTOM, **options: Any) -> Any:
    """Returns a clone of the model that merges tokens.

    An older workflow may lack options, which then have their defaults. One without a preset uses all its options.

    Args:
        model: the program's model patcher.
        preset: name of a recipe, or "custom".
        options: values of OPTIONS by name.

    Raises:
        ValueError: a value is out of range, or the model is not supported. Names what is.
    """
    values, ignored = apply_preset(preset, options)
    if ignored:
        logger.warning(f"Token Fusion: {', '.join(ignored)} are ignored, as preset is {preset} and not {CUSTOM}")
    family = family_of(model.model.diffusion_model)
    percent_to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    if family is None:
        clone, summary = patch_model(model, config_of(values), plain, percent_to_sigma)
    else:
        _check_override()
        if preset != CUSTOM or "proportional" not in options:
            values["proportional"] = True  # text tokens stand for one token each
        clone, summary = patch_transformer(model, family, config_of(values), plain, percent_to_sigma)
    logger.info(summary.headline)
    return clone


def _check_override() -> None:
    """Raises ValueError where this ComfyUI's attention has no override."""
    if not hasattr(comfy_attention, "wrap_attn"):
        raise ValueError(
            "diffusion transformers need a newer ComfyUI, with optimized_attention_override (0.3.64 has it)"
        )


def plain(q: Tensor, k: Tensor, v: Tensor, heads: int, options: Options) -> Tensor:
    """Runs ComfyUI's own attention, as chosen when it started, or its replacement by another node."""
    override = {"transformer_options": options} if "optimized_attention_override" in options else {}
    return optimized_attention(q, k, v, heads, attn_precision=options.get("attn_precision"), **override)


def show(
    model: Any, positive: Any, latent: dict[str, Any], at_percent: float = 0.5, map_seed: int = 0
) -> tuple[Tensor, str]:
    """Draws which tokens each block merges in one step: a colour for each group, dark gray for a token that is alone.

    Returns:
        ([blocks, H, W, 3] in 0..1, the names of the blocks). A line for each: "1: input 1.0" gives the image, the side,
        the number of the block and the number of the transformer block in it.

    Raises:
        ValueError: the model merges nothing in this step.
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
        raise ValueError(f"nothing is merged at {at_percent:g} of the sampling: {'; '.join(sorted(patches.reasons))}")
    h, w = (8 * side for side in samples.shape[-2:])
    images = [F.interpolate(colours[None], size=(h, w), mode="nearest")[0] for colours in maps.values()]
    names = (f"{n}: {side} {number}.{index}" for n, (side, number, index) in enumerate(maps, 1))
    return torch.stack(images).permute(0, 2, 3, 1), "\n".join(names)


# --- the nodes --------------------------------------------------------------------------------------------------------

ABOUT_FUSE = (
    "Makes self-attention cheaper without training: similar tokens are merged before it and unmerged after it (ToFu, "
    "WACV 2024). The image changes a little. Works on SD 1.x, 2.x, SDXL, SD3, Flux, Chroma and Qwen-Image. The middle "
    "block of a UNet is never merged, and blocks whose self-attention another node replaces or changes are skipped."
)
ABOUT_SHOW = "Shows which tokens are merged, an image for each block: a colour for each group, gray for a token alone."


def _kind(option: Option) -> str:
    return "COMBO" if option.names else {bool: "BOOLEAN", int: "INT", float: "FLOAT"}[type(option.default)]


def _limits(option: Option) -> dict[str, Any]:
    limits = {"min": option.low, "max": option.high, "step": option.step}
    return {name: value for name, value in limits.items() if value is not None}


if io is not None:

    def _inputs(options: tuple[Option, ...]) -> list[Any]:
        kinds = {"COMBO": io.Combo, "BOOLEAN": io.Boolean, "INT": io.Int, "FLOAT": io.Float}
        inputs = []
        for option in options:
            more = {"options": list(option.names)} if option.names else _limits(option)
            # optional, so that older workflows without such an input load
            entry = kinds[_kind(option)].Input(
                option.name, default=option.default, tooltip=option.tooltip, optional=True, **more
            )
            if option.advanced:
                entry.extra_dict = {"advanced": True}  # older versions have no argument for it
            inputs.append(entry)
        return inputs

    # newer versions search for them
    _aliases = {"search_aliases": ALIASES} if "search_aliases" in getattr(io.Schema, "__annotations__", ()) else {}

    class TokenFusionNode(io.ComfyNode):  # type: ignore[misc]
        @classmethod
        def define_schema(cls) -> Any:
            return io.Schema(
                node_id="TokenFusion", display_name="Token Fusion (ToFu)", category=CATEGORY, description=ABOUT_FUSE,
                inputs=[io.Model.Input("model"), *_inputs((PRESET, *OPTIONS))], outputs=[io.Model.Output()],
                **_aliases,
            )  # fmt: skip

        @classmethod
        def execute(cls, model: Any, **options: Any) -> Any:
            return io.NodeOutput(patch_with_preset(model, **options))

    class TokenFusionMapNode(io.ComfyNode):  # type: ignore[misc]
        @classmethod
        def define_schema(cls) -> Any:
            return io.Schema(
                node_id="TokenFusionMap", display_name="Token Fusion Map", category=CATEGORY, description=ABOUT_SHOW,
                inputs=[io.Model.Input("model"), io.Conditioning.Input("positive"), io.Latent.Input("latent"),
                        *_inputs(SHOW)],
                outputs=[io.Image.Output(), io.String.Output(display_name="blocks")], **_aliases,
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

    def _input_types(options: tuple[Option, ...]) -> dict[str, Any]:
        def more(o: Option) -> dict[str, Any]:
            advanced = {"advanced": True} if o.advanced else {}
            return {"default": o.default, "tooltip": o.tooltip, **_limits(o), **advanced}

        return {o.name: (list(o.names) if o.names else _kind(o), more(o)) for o in options}

    class TokenFusionNode:  # type: ignore[no-redef]
        RETURN_TYPES, FUNCTION, CATEGORY, DESCRIPTION = ("MODEL",), "execute", CATEGORY, ABOUT_FUSE
        SEARCH_ALIASES = ALIASES

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"model": ("MODEL",)}, "optional": _input_types((PRESET, *OPTIONS))}

        def execute(self, model: Any, **options: Any) -> tuple[Any]:
            return (patch_with_preset(model, **options),)

    class TokenFusionMapNode:  # type: ignore[no-redef]
        RETURN_TYPES, FUNCTION, CATEGORY, DESCRIPTION = ("IMAGE", "STRING"), "execute", CATEGORY, ABOUT_SHOW
        RETURN_NAMES, SEARCH_ALIASES = ("IMAGE", "blocks"), ALIASES

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            required = {"model": ("MODEL",), "positive": ("CONDITIONING",), "latent": ("LATENT",)}
            return {"required": required, "optional": _input_types(SHOW)}

        def execute(self, model: Any, positive: Any, latent: Any, **options: Any) -> tuple[Tensor, str]:
            return show(model, positive, latent, **options)

    NODE_CLASS_MAPPINGS = {"TokenFusion": TokenFusionNode, "TokenFusionMap": TokenFusionMapNode}
    NODE_DISPLAY_NAME_MAPPINGS = {"TokenFusion": "Token Fusion (ToFu)", "TokenFusionMap": "Token Fusion Map"}
