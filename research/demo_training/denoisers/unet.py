"""Stable Diffusion's UNet."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from torch import Tensor

from tofu_sd.demo.tokenizer import build_tokenizer

from ..fit import _autocast
from ..networks import build_scheduler, build_text_encoder, build_unet
from ..recipe import Content
from .base import Denoiser


class UNetDenoiser(Denoiser):
    """UNet and text encoder, trained on velocity (v-prediction).

    Args:
        content: the images that it learns to generate.
    """

    ids: Tensor  # of all texts
    rates = MappingProxyType({"low": 5e-4, "high": 3e-4, "large": 1e-4})

    def __init__(self, content: Content) -> None:
        super().__init__(content)
        self.tokenizer = build_tokenizer(c.prompt for c in content.classes)
        self.text_encoder = build_text_encoder(self.tokenizer)
        self.unet = build_unet(content.widths)
        self.scheduler = build_scheduler()
        self.register_buffer("ids", self.tokenize(self.tokenizer, 77), persistent=False)

    def forward(self, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        prompts, which = text.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        states = self.text_encoder(self.ids[prompts]).last_hidden_state[which]
        return self.unet(noisy, t, encoder_hidden_states=states).sample

    def loss(self, clean: Tensor, text: Tensor, g: torch.Generator) -> Tensor:
        return velocity_loss(lambda noisy, t: self(noisy, t, text), clean, self.scheduler, g)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def velocity_loss(
    predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, noising: DDIMScheduler, g: torch.Generator
) -> Tensor:
    """Returns the v-prediction loss with min-SNR weights, γ = 5 (Hang et al. 2023); timesteps are stratified.

    Args:
        predict: (noisy latents, timesteps) -> velocity.
        clean: latents [B, 4, h, w].
        noising: the noise schedule.
        g: generator of noise and timesteps.
    """
    B, T = len(clean), noising.config.num_train_timesteps
    t = ((torch.arange(B) + torch.rand(B, generator=g)) / B * T).long().clamp_max(T - 1).to(clean.device)
    noise = torch.randn(clean.shape, generator=g).to(clean.device)
    with _autocast(clean.device):
        guess = predict(noising.add_noise(clean, noise, t), t)
    snr = compute_snr(noising, t)
    weight = snr.clamp_max(5) / (snr + 1)
    error = (guess.float() - noising.get_velocity(clean, noise, t)).square().mean(dim=(1, 2, 3))
    return (weight * error).mean()
