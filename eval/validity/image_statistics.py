"""Statistics in which natural images agree: the amplitude spectrum and the tails of gradients."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

BANDS = 12  # bands of frequency, equally wide on a logarithmic scale


def spectral_slope(images: Tensor) -> Tensor:
    """Returns the exponent a of the amplitude spectrum ~ 1/f^a of each image [B, C, H, H]: [B].

    The amplitude is averaged over orientations and channels, in bands from 2 cycles per image to half of the Nyquist
    frequency, and fitted by least squares on logarithmic scales. A Hann window removes the effect of the borders.
    """
    H, W = images.shape[-2:]
    x = images.double() - images.double().mean(dim=(2, 3), keepdim=True)
    window = torch.hann_window(H, periodic=False, dtype=torch.float64)
    amplitude = torch.fft.fft2(x * window[:, None] * window).abs().square().mean(1).flatten(1)  # [B, H * W]
    frequency = torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(n, 1 / n) for n in (H, W)], indexing="ij")).flatten()
    edges = torch.logspace(torch.tensor(2.0).log10(), torch.tensor(H / 4).log10(), BANDS + 1)
    points = []
    for low, high in pairwise(edges):
        band = (frequency >= low) & (frequency < high)
        if band.any():
            points.append((frequency[band].mean().log().double(), amplitude[:, band].mean(1).log() / 2))
    f = torch.stack([point[0] for point in points])
    a = torch.stack([point[1] for point in points], dim=1)  # [B, bands]
    centered = f - f.mean()
    return -(a * centered).sum(1) / centered.square().sum()


def gradient_kurtosis(images: Tensor) -> float:
    """Returns the kurtosis of differences of adjacent log intensities, over images [B, 3, H, W] in 0..1.

    As Huang & Mumford (1999) measure it: differences along both axes, of all images together.
    """
    intensity = (images.double().mean(1) + 1 / 255).log()
    differences = torch.cat([intensity.diff(dim=d).flatten() for d in (1, 2)])
    centered = differences - differences.mean()
    return float(centered.pow(4).mean() / centered.square().mean().square())
