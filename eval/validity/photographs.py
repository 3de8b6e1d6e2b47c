"""Reference values: what is known of photographs and of real Stable Diffusion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """A method on a UNet trained on latents of photographs: 20 steps, no text, paired seeds.

    That UNet has the size of the embedded models and saw 20,700 samples. It is a second opinion, not the truth: its
    images are blurred compositions.

    Args:
        method: as in `--method`.
        ratio: proportion of merged tokens.
        psnr: dB to the baseline.
        ms_ssim: MS-SSIM to the baseline.
        n: number of images.
    """

    method: str
    ratio: float
    psnr: float
    ms_ssim: float
    n: int = 32


METHODS = (
    Reference("tome", 0.5, 29.8, 0.953),
    Reference("tofu", 0.5, 29.7, 0.952),
    Reference("mlerp", 0.5, 30.8, 0.963),
    Reference("tome+p", 0.5, 32.3, 0.951),
    Reference("faithful", 0.5, 31.7, 0.941),
    Reference("tofu+p", 0.5, 33.0, 0.958),
    Reference("mlerp+p@kv_early=mean@kv_late=mean", 0.5, 33.7, 0.963),
    Reference("mlerp+p@window=8@kv_early=mean@kv_late=mean", 0.5, 32.9, 0.954),
    Reference("mlerp+p@kv_early=prune@kv_late=prune", 0.5, 34.2, 0.970),
    Reference("mlerp+p@kv_early=mean@kv_late=prune", 0.5, 35.0, 0.975, 16),
    Reference("kv:tome+p", 0.5, 40.1, 0.992),
    Reference("tome", 0.25, 33.5, 0.975),
    Reference("tome", 0.75, 27.2, 0.908, 8),
    Reference("mlerp+p@kv_early=mean@kv_late=mean", 0.25, 42.8, 0.994),
)

TOKEN_COSINES = (0.755, 0.774, 0.910, 0.880, 0.926)
"""Medians of the cosine of a source to its nearest destination, in the five blocks of the highest resolution."""

MS_SSIM_OF_TOME = 0.7304
"""ToMe at ratio 0.5 on Stable Diffusion 1.5, 50 steps, 512 px (ToFu, Table 5)."""

LPIPS_OF_TOME = 0.31
"""LPIPS with AlexNet of the same (ToFu, Table 5)."""

SPECTRAL_SLOPES = (0.8, 1.5)
"""Exponents a of amplitude ~ 1/f^a of single natural images: about 1.0 (Field 1987), 1.2 (Tolhurst et al. 1992)."""

GRADIENT_KURTOSIS = 17.4
"""Kurtosis of the difference of adjacent log intensities, over many images (Huang & Mumford 1999). A Gaussian has 3."""
