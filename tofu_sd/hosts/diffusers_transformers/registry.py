"""Which diffusion transformers are supported, and why others are not."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

from ..unwrapping import unwrapped
from .family import Family
from .host import TransformerHost

FAMILIES = {
    "SD3Transformer2DModel": "sd3",
    "PixArtTransformer2DModel": "pixart",
    "FluxTransformer2DModel": "flux",
    "ChromaTransformer2DModel": "chroma",
    "Flux2Transformer2DModel": "flux2",
    "QwenImageTransformer2DModel": "qwen_image",
    "ZImageTransformer2DModel": "z_image",
}
"""Class of diffusers, and the module of `families` that describes it."""

REASONS = {
    "SanaTransformer2DModel": "its attention is linear, so that merging tokens saves almost nothing",
    "Lumina2Transformer2DModel": "its text has another length in each sample of a batch",
    "HunyuanDiT2DModel": "its skip connections and its rotary positions expect every token",
    "AuraFlowTransformer2DModel": "its text comes with register tokens, and its sequence has not been tested",
}
CONTROLNET = "a ControlNet of a diffusion transformer runs on all tokens; patch the transformer"
_OF_UNETS = (
    "controlnet",
    "controlnet_sparsectrl",
    "controlnet_union",
    "controlnet_xs",
    "multicontrolnet",
    "multicontrolnet_union",
)  # modules of diffusers' ControlNets that have a UNet's blocks


def host_of(model: Any) -> TransformerHost | None:
    """Returns the host of a diffusion transformer, or of a pipeline with one; None for any other model.

    Raises:
        TypeError: a diffusion transformer that is not supported. Names the class and the reason.
    """
    inner = unwrapped(model)
    if getattr(inner, "unet", None) is not None:
        return None
    transformer = unwrapped(getattr(inner, "transformer", inner))
    if not isinstance(transformer, nn.Module):
        return None
    kind = type(transformer)
    from_diffusers = kind.__module__.startswith("diffusers.")
    if from_diffusers and kind.__name__ in FAMILIES:
        return TransformerHost(_family(FAMILIES[kind.__name__]))
    if "nunchaku" in kind.__module__.lower() or kind.__name__.startswith("Nunchaku"):
        raise TypeError(_refusal(kind, "its own kernels project, normalize and rotate in one, where nothing can merge"))
    package, _, module = kind.__module__.rpartition(".")
    if from_diffusers and package.endswith(".controlnets") and module not in _OF_UNETS:
        raise TypeError(_refusal(kind, CONTROLNET))
    if not from_diffusers or not package.endswith(".transformers"):
        return None
    raise TypeError(_refusal(kind, REASONS.get(kind.__name__, "where its tokens lie is not known")))


@cache
def _family(module: str) -> Family:
    try:
        return import_module(f".families.{module}", __package__).FAMILY
    except ImportError as error:
        raise TypeError(f"this transformer needs a newer diffusers (0.42 is tested): {error}") from error


def _refusal(kind: type[Any], reason: str) -> str:
    known = ", ".join(FAMILIES)
    return f"token fusion does not support {kind.__name__}: {reason}; supported transformers: {known}"
