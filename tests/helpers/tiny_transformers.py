"""Tiny pipelines of diffusion transformers, and the tiny models of `eval.families`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from eval.families.tiny import (
    FLUX,
    JOINT,
    LONG_TEXT,
    MODELS,
    ROTARY,
    TEXT,
    Tiny,
    chroma,
    flux,
    flux2,
    grid_ids,
    pixart,
    qwen_image,
    sd3,
    sd35,
    z_image,
)

__all__ = [
    "FLUX", "JOINT", "LONG_TEXT", "MODELS", "ROTARY", "TEXT", "Tiny", "chroma", "flux", "flux2", "grid_ids", "pixart",
    "qwen_image", "sd3", "sd35", "z_image",
]  # fmt: skip


def processors(model: Any) -> dict[str, Any]:
    """The attention processors of a model, by name. Z-Image has no `attn_processors`."""
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def set_processors(model: Any, processors: Any) -> None:
    """Sets one processor, or those of each attention by name."""
    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            module.set_processor(processors[name] if isinstance(processors, dict) else processors)


def shifted_vae(latent_channels: int = 4) -> AutoencoderKL:
    """An autoencoder whose latents have a mean, as newer models' have."""
    vae = tiny.vae(latent_channels=latent_channels)
    vae.register_to_config(shift_factor=0.1)
    return vae


def sd3_parts(make: Callable[..., Any] = sd3) -> dict[str, Any]:
    """The components that every Stable Diffusion 3 pipeline takes. The third text encoder is left out, as users may."""
    transformer = make()
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": shifted_vae(transformer.config.in_channels),
        "text_encoder": tiny.text_encoder(projection=True),
        "tokenizer": tiny.tokenizer(),
        "text_encoder_2": tiny.text_encoder(projection=True, seed=4),
        "tokenizer_2": tiny.tokenizer(pad="!"),
        "text_encoder_3": None,
        "tokenizer_3": None,
    }


def sd3_pipe(cls: type[Any] = StableDiffusion3Pipeline, make: Callable[..., Any] = sd3, **more: Any) -> Any:
    return tiny.quiet(cls(**sd3_parts(make), **more))


def flux_pipe(cls: type[Any] = FluxPipeline, make: Callable[..., Any] = flux, **more: Any) -> Any:
    """A Flux pipeline without its second text encoder: calls give embeddings, as T5 has no tiny tokenizer."""
    parts = {
        "transformer": make(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": shifted_vae(),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }
    return tiny.quiet(cls(**{**parts, **more}))


def flux2_pipe(cls: type[Any] = Flux2KleinPipeline) -> Any:
    """A Flux.2 pipeline without its text encoder: calls give embeddings."""
    channels = {"block_out_channels": (4,) * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}
    vae = tiny.lively(AutoencoderKLFlux2(**channels), 2)
    parts = {"vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": flux2()}
    return tiny.quiet(cls(**parts, text_encoder=None, tokenizer=None))


def flux_images(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    """The packed latents a Flux pipeline ends with."""
    embeddings = {"prompt_embeds": tiny.noise(1, TEXT, 32, seed=1), "pooled_prompt_embeds": tiny.noise(1, 16, seed=2)}
    return images(pipe, seed, **{"prompt": None, **embeddings, **call})


def images(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    """The latents a pipeline ends with. ControlNet pipelines draw the latent of their image from the global state."""
    torch.manual_seed(0)
    usual = {"height": 128, "width": 128, "max_sequence_length": 16, "guidance_scale": 5.0}
    return tiny.images(pipe, seed, **{**usual, **call})
