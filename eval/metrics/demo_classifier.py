"""Metrics by the classifier of the embedded model, whose images no public network fits."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..common.provenance import weights_hash
from .base import DistributionMetric, Features, Metric, Pairwise, PerImageMetric, Skipped, full_precision, to_unit
from .statistics import frechet, kernel_distance


def demo_classifier_metrics(classifier: Any, prompts: Collection[str], device: torch.device) -> list[Metric]:
    """All of them; a `Skipped` without a classifier, as for any model but the embedded one."""
    if classifier is None:
        return [Skipped("PD-demo", "it is measured in the demo model's classifier, and this is another model")]
    return [pd_demo(classifier, device), fd_demo(classifier, device), class_accuracy(classifier, prompts, device)]


def pd_demo(classifier: Any, device: torch.device) -> Pairwise:
    """Perceptual distance in all stages of the demo classifier."""
    from tofu_sd.demo.classifier import perceptual_distance

    def compute(a: Tensor, b: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            return perceptual_distance(classifier, to_unit(a, device), to_unit(b, device)).cpu().double()

    return Pairwise("PD-demo", f"{_describe(classifier)}, 5 feature maps", True, compute)


def fd_demo(classifier: Any, device: torch.device) -> DistributionMetric:
    """Fréchet distance of the demo classifier's pooled features."""
    pooled = _pooled_features(classifier, device)
    return DistributionMetric("FD-demo", f"{pooled.implementation}, float64", pooled, frechet)


def kd_demo(classifier: Any, device: torch.device) -> DistributionMetric:
    """Kernel distance of the demo classifier's pooled features."""
    pooled = _pooled_features(classifier, device)
    implementation = f"{pooled.implementation}, U-statistic of pairs, float64"
    return DistributionMetric("KD-demo", implementation, pooled, kernel_distance, digits=6, minimum=-math.inf)


@cache  # one for one classifier, so that both distances read the images once
def _pooled_features(classifier: Any, device: torch.device) -> Features:
    def compute(images: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            return classifier.features(to_unit(images, device)).cpu()

    return Features(f"{_describe(classifier)}, pooled features", compute)


def class_accuracy(classifier: Any, prompts: Collection[str], device: torch.device) -> Metric:
    """Proportion of images that the demo classifier assigns to all labels of their prompt."""
    name, labels = "class accuracy", classifier.labels_of_prompts
    if not set(prompts) <= labels.keys():
        return Skipped(name, "the classifier knows only the demo model's own prompts")

    def compute(images: Tensor, prompts: Sequence[str]) -> Tensor:
        with full_precision(), torch.no_grad():
            predicted = classifier.classify(to_unit(images, device)).cpu()
        return (predicted == torch.tensor([labels[prompt] for prompt in prompts])).all(1).double()

    return PerImageMetric(name, f"{_describe(classifier)}, share", False, compute, is_proportion=True)


def _describe(classifier: nn.Module) -> str:
    return f"the demo model's classifier, weights {weights_hash(classifier)}"
