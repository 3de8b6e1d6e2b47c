"""The criteria: what a model must share with photographs before anything is recommended on its word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..metrics.statistics import paired_difference
from . import photographs

RATIOS = (0.25, 0.5, 0.75)
GROWING = ("tome", "tofu", "prune", "mlerp")  # methods whose error must grow with the ratio
MS_SSIM_LIMITS = (0.6, 0.9)
COSINE_TOLERANCE = 0.05
RANK_CORRELATION = 0.9
HEAVY_TAILS = 6.0  # kurtosis: twice that of a Gaussian


@dataclass(frozen=True)
class Criterion:
    """One criterion.

    Args:
        name: what is compared.
        measured: of this model.
        required: the limit, with its source.
        holds: whether the model meets it.
    """

    name: str
    measured: str
    required: str
    holds: bool

    def row(self) -> dict[str, Any]:
        return asdict(self)


Values = Mapping[str, Mapping[str, float]]  # method and ratio -> image -> value of a metric


def error_grows(psnr: Values, prompts: Mapping[str, str]) -> list[Criterion]:
    """(a): more merged tokens leave a larger error, for each method.

    Args:
        psnr: of each image, by "method ratio".
        prompts: of each image.

    Raises:
        ValueError: there are too few prompts for an interval.
    """
    rows = []
    for method in GROWING:
        texts, holds = [], True
        for low, high in pairwise(RATIOS):
            gap, interval, _ = paired_difference(psnr[f"{method} {high}"], psnr[f"{method} {low}"], prompts)
            if interval is None:
                raise ValueError(f"{len(set(prompts.values()))} prompts are too few for an interval")
            texts.append(f"{gap:+.2f} dB ({interval[0]:+.2f} to {interval[1]:+.2f}) from {low:g} to {high:g}")
            holds &= interval[1] < 0
        rows.append(
            Criterion(f"PSNR of {method} falls with the ratio", "; ".join(texts), "below 0 in each step", holds)
        )
    return rows


def magnitude(tome: Mapping[str, Any], without: Mapping[str, Any]) -> Criterion:
    """(b): at guidance 7.5 and 50 steps ToMe changes images about as much as Stable Diffusion's.

    Args:
        tome: figures of ToMe at ratio 0.5, with intervals, by metric: "MS-SSIM" and, if it was measured, LPIPS.
        without: the same without the self-attention that ToMe merges. A model that needs this attention little
            cannot meet the criterion.
    """
    low, high = MS_SSIM_LIMITS
    measured = f"{_figures(tome)}; without that attention {_figures(without)}"
    required = (
        f"{low} to {high}; SD 1.5 at 512 px: {photographs.MS_SSIM_OF_TOME}, LPIPS (AlexNet) "
        f"{photographs.LPIPS_OF_TOME} (ToFu, Table 5)"
    )
    return Criterion(
        "MS-SSIM of tome 50% at guidance 7.5, 50 steps", measured, required, low <= tome["MS-SSIM"]["value"] <= high
    )


def _figures(metrics: Mapping[str, Any]) -> str:
    """Returns MS-SSIM with its interval, then LPIPS with its name."""
    ms_ssim = metrics["MS-SSIM"]
    texts = [f"{ms_ssim['value']:.3f} ({ms_ssim['low']:.3f}–{ms_ssim['high']:.3f})"]
    texts += [f"{name} {figure['value']:.3f}" for name, figure in metrics.items() if name.startswith("LPIPS")]
    return ", ".join(texts)


def spectra(slope: float, latent_slope: float, kurtosis: float) -> list[Criterion]:
    """(c): images have the amplitude spectrum and the gradients of natural images.

    Args:
        slope: mean spectral slope of images.
        latent_slope: the same of their latents.
        kurtosis: of gradients.
    """
    low, high = photographs.SPECTRAL_SLOPES
    return [
        Criterion(
            "spectral slope a of images, amplitude ~ 1/f^a",
            f"{slope:.2f} (of latents {latent_slope:.2f})",
            f"{low} to {high} (Field 1987; Tolhurst et al. 1992)",
            low <= slope <= high,
        ),
        Criterion(
            "kurtosis of log gradients",
            f"{kurtosis:.1f}",
            f"at least {HEAVY_TAILS:g}; natural images: {photographs.GRADIENT_KURTOSIS} (Huang & Mumford 1999)",
            kurtosis >= HEAVY_TAILS,
        ),
    ]


def token_similarity(cosines: Sequence[float]) -> Criterion:
    """(d): tokens are as similar as those of photographs. cosines: the median of each block of the top resolution."""
    gaps = [abs(own - other) for own, other in zip(cosines, photographs.TOKEN_COSINES, strict=True)]
    return Criterion(
        "nearest-destination cosine of tokens, five top blocks",
        ", ".join(f"{value:.3f}" for value in cosines),
        f"each within {COSINE_TOLERANCE} of {', '.join(f'{value:.3f}' for value in photographs.TOKEN_COSINES)}",
        max(gaps) <= COSINE_TOLERANCE,
    )


def order_of_methods(metric: str, values: Values) -> Criterion:
    """(e): methods rank as on photographs.

    Args:
        metric: "PSNR" or "MS-SSIM".
        values: of each image, by "method ratio".
    """
    own = [mean(values[f"{one.method} {one.ratio}"]) for one in photographs.METHODS]
    other = [one.psnr if metric == "PSNR" else one.ms_ssim for one in photographs.METHODS]
    correlation = rank_correlation(own, other)
    return Criterion(
        f"rank correlation (Spearman) of {len(own)} methods' {metric} with photographs",
        f"{correlation:.2f}",
        f"at least {RANK_CORRELATION}",
        correlation >= RANK_CORRELATION,
    )


def mean(values: Mapping[str, float]) -> float:
    """Returns the mean over images."""
    return sum(values.values()) / len(values)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns Spearman's rank correlation. Equal values share the mean of their ranks."""
    return float(torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1])


def _ranks(values: Sequence[float]) -> Tensor:
    v = torch.tensor(values, dtype=torch.float64)
    return ((v[:, None] > v).sum(1) + (v[:, None] >= v).sum(1)).double() / 2
