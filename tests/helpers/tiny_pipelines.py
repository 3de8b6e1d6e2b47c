"""Tiny pipelines of diffusion transformers that give images, and texts in place of those that an encoder would give."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny
import torch
from tiny_transformers import TEXT, chroma, flux2_pipe, flux_pipe, pixart, qwen_image, sd3_pipe, shifted_vae, z_image

MASK = torch.arange(TEXT)[None] < 5


def _text(seed: int = 1) -> torch.Tensor:
    return tiny.noise(1, TEXT, 32, seed=seed)


def qwen_vae() -> Any:
    shape: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return tiny.lively(diffusers.AutoencoderKLQwenImage(**shape, latents_mean=[0.0] * 4, latents_std=[1.0] * 4), 2)


def without_encoder(cls: type[Any], vae: Any, transformer: Any, scheduler: Any = None) -> Any:
    """A pipeline whose text encoder and tokenizer are None."""
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"vae": vae, "transformer": transformer, "scheduler": scheduler}
    return tiny.quiet(cls(**parts, text_encoder=None, tokenizer=None))


def pixart_pipe() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return without_encoder(diffusers.PixArtSigmaPipeline, tiny.vae(), pixart(), scheduler)


def kontext_pipe() -> Any:
    """A Kontext pipeline that leaves its reference image as it is, and does not resize it to one million pixels."""
    pipe = flux_pipe(diffusers.FluxKontextPipeline)
    call = type(pipe).__call__
    pipe.__class__ = type("Kontext", (type(pipe),), {"__call__": partial_method(call, _auto_resize=False)})
    return pipe


def partial_method(method: Any, **fixed: Any) -> Any:
    return lambda self, *args, **kwargs: method(self, *args, **fixed, **kwargs)


FLUX_TEXTS = (_text(), tiny.noise(1, 16, seed=2), torch.zeros(TEXT, 3))
PIPELINES: dict[type[Any], tuple[Any, Any]] = {
    diffusers.StableDiffusion3Pipeline: (sd3_pipe, None),
    diffusers.PixArtSigmaPipeline: (pixart_pipe, (_text(), MASK, _text(2), MASK)),
    diffusers.FluxPipeline: (flux_pipe, FLUX_TEXTS),
    diffusers.FluxKontextPipeline: (kontext_pipe, FLUX_TEXTS),
    diffusers.ChromaPipeline: (
        lambda: without_encoder(diffusers.ChromaPipeline, shifted_vae(), chroma()),
        (_text(), torch.zeros(TEXT, 3), MASK, _text(2), torch.zeros(TEXT, 3), MASK),
    ),
    diffusers.Flux2KleinPipeline: (flux2_pipe, (_text(), torch.zeros(1, TEXT, 4))),
    diffusers.QwenImagePipeline: (
        lambda: without_encoder(diffusers.QwenImagePipeline, qwen_vae(), qwen_image()),
        (_text(), MASK),
    ),
    diffusers.ZImagePipeline: (
        lambda: without_encoder(diffusers.ZImagePipeline, shifted_vae(), z_image()),
        ([_text()[0]], [_text(2)[0]]),
    ),
}
"""By class: what makes a tiny one, and what its `encode_prompt` gives; None where it has a tiny encoder."""
