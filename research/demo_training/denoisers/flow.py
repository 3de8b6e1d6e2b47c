"""Flow matching, on which the diffusion transformers are trained."""

from __future__ import annotations

from abc import abstractmethod
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tofu_sd.demo.pipelines import TEXT_LENGTHS

from ..fit import _autocast
from .base import Denoiser

BASE_SIDE = 32  # latents of this side or smaller are trained at noise levels that are not shifted
UNIFORM = 0.1  # share of samples with a uniform noise level
LONG = 1 / 32  # share of batches with the pipeline's default length of text


class FlowDenoiser(Denoiser):
    """A transformer and its text encoders, trained to predict noise - image.

    Args:
        content: the images that it learns to generate.
    """

    rates = MappingProxyType({"low": 1e-3, "high": 6e-4, "large": 2e-4})
    pipeline_name: ClassVar[str]  # class of its pipeline
    default_length: ClassVar[int]  # max_sequence_length of a call of the pipeline that does not set it

    @abstractmethod
    def forward(self, noisy: Tensor, sigma: Tensor, text: Tensor, length: int) -> Tensor:
        """Returns the predicted velocity [B, 4, h, w].

        Args:
            noisy: latents [B, 4, h, w].
            sigma: noise levels in 0..1, [B].
            text: positions in `texts`, long [B].
            length: `max_sequence_length` of the pipeline.
        """

    def loss(self, clean: Tensor, text: Tensor, g: torch.Generator) -> Tensor:
        """Returns the mean squared error of the velocity; each noise level has the same weight.

        A few batches have the text length of a call that does not set it. Otherwise such calls would meet a number of
        text tokens that was never trained.
        """
        sigma = noise_levels(len(clean), max(1.0, clean.shape[-1] / BASE_SIDE), g).to(clean.device)
        is_long = torch.rand((), generator=g) < LONG
        noise = torch.randn(clean.shape, generator=g).to(clean.device)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
        with _autocast(clean.device):
            guess = self(noisy, sigma, text, self.default_length if is_long else TEXT_LENGTHS[self.pipeline_name])
        return (guess.float() - (noise - clean)).square().mean()


def noise_levels(count: int, shift: float, g: torch.Generator) -> Tensor:
    """Draws noise levels in 0..1: logit-normal as in Stable Diffusion 3 (Esser et al. 2024), and a tenth uniform.

    The logit-normal density is 0 at pure noise, where sampling starts; the uniform samples cover it. Quantiles are
    stratified over the batch, which reduces the variance of the loss.

    Args:
        count: how many.
        shift: > 1 moves them towards noise, which large latents need (Esser et al., Eq. 23).
        g: random generator.
    """
    quantile = (torch.arange(count) + torch.rand(count, generator=g)) / count
    is_uniform = torch.rand(count, generator=g) < UNIFORM
    normal = torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6)).sigmoid()
    sigma = torch.where(is_uniform, quantile, normal)
    return shift * sigma / (1 + (shift - 1) * sigma)


@torch.no_grad()
def zero_modulation(transformer: Any) -> None:
    """Sets all adaptive layer norms and the last projection to zero: adaLN-Zero (Peebles and Xie 2023).

    Each block then starts as the identity, which trains faster. diffusers leaves these weights random.
    """
    for module in transformer.modules():
        if type(module).__name__.startswith("AdaLayerNorm"):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
