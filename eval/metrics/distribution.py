"""Distances of two sets of images in Inception's features: FID and KID."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..common.provenance import version, weights_hash
from .base import LOAD_ERRORS, DistributionMetric, Features, Metric, Skipped, first_line, full_precision, install_hint
from .statistics import frechet, kernel_distance


def fid(features: Features | str) -> Metric:
    """Fréchet Inception distance (Heusel et al. 2017). features: of `inception`, or why they are unavailable."""
    return _distribution_metric("FID", features, frechet, digits=3)


def kid(features: Features | str) -> Metric:
    """Kernel Inception distance (Bińkowski et al. 2018). features: as for `fid`."""
    return _distribution_metric("KID", features, kernel_distance, digits=6)


def inception(weights: Path | None, device: torch.device) -> Features | str:
    """Inception's pooled features by torchmetrics (of torch-fidelity, antialiased resize to 299).

    Returns:
        The features, or a message why they are unavailable.
    """
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        path = None if weights is None else str(weights)
        model = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    except ImportError as error:
        return install_hint(error, "torchmetrics[image]")
    except LOAD_ERRORS as error:
        return f"no Inception weights (--inception-weights PATH): {first_line(error)}"
    except (TypeError, AttributeError) as error:
        if weights is None:  # it is not the file
            raise
        return f"no Inception weights in {weights.name}: {first_line(error)}"
    model = model.to(device)

    def compute(images: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            return model(images.to(device)).cpu()

    implementation = (
        f"Inception 2048, torchmetrics {version('torchmetrics')}, torch-fidelity {version('torch-fidelity')}, "
        f"antialias, weights {weights_hash(model)}"
    )
    return Features(implementation, compute)


def _distribution_metric(
    name: str, features: Features | str, distance: Callable[[Tensor, Tensor], float], digits: int
) -> Metric:
    if isinstance(features, str):
        return Skipped(name, features)
    unbiased = distance is kernel_distance
    implementation = f"{features.implementation}, {'U-statistic of pairs, float64' if unbiased else 'float64'}"
    minimum = -math.inf if unbiased else 0.0
    return DistributionMetric(name, implementation, features, distance, digits=digits, minimum=minimum)
