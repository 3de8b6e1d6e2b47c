"""Sets what a method leaves open: ATM's thresholds at ToMe's FLOPs, and the largest r at the full accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tofu_sd.hosts import timm as host

from .methods import BASELINE, Method, parse
from .models import Classifier
from .predictions import Evaluation, Predictions, predict
from .tables import CURVES

SCALES, HALVINGS = (1e-6, 1.0), 10  # of a threshold curve, on a logarithmic scale


@torch.no_grad()
def calibrate_thresholds(evaluation: Evaluation, one: Classifier, method: Method) -> Method:
    """Sets the thresholds of an adaptive method to ToMe's FLOPs at its r; returns any other method unchanged.

    ATM's authors sweep three parameters for each number of FLOPs and keep the most accurate. Here no label is used:
    each of `CURVES` is scaled until it has ToMe's FLOPs on calibration images. The one with the smallest feature shift
    on them is used.

    Args:
        evaluation: its calibration images are used.
        one: the classifier.
        method: with the r whose FLOPs it is to have.
    """
    if not method.adaptive or method.r is None:
        return method
    if method.r == 0:
        return BASELINE
    batches = evaluation.calibration_batches()

    def predictions(candidate: Method) -> Predictions:
        return predict(one.model, candidate, batches)

    target = predictions(parse("tome", [method.r], len(host.find_blocks(one.model)))[0]).flops
    baseline = predictions(BASELINE).features
    scaled = [_scaled_to(method, curve, lambda m: predictions(m).flops <= target) for curve in CURVES]
    candidates = [(candidate, predictions(candidate)) for candidate in scaled]
    # a curve that cannot merge enough would win by a small shift
    reached = [(m, result) for m, result in candidates if result.flops <= target]
    if not reached:
        return min(candidates, key=lambda each: each[1].flops)[0]
    return min(reached, key=lambda each: cosine_distance(each[1].features, baseline).mean().item())[0]


def _scaled_to(method: Method, curve: tuple[float, float], is_cheap: Callable[[Method], bool]) -> Method:
    """Returns a method whose threshold curve has the smallest scale at which it is cheap enough, by bisection."""
    low, high = (math.log(scale) for scale in SCALES)  # almost nothing merges, everything merges
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_cheap(method.with_thresholds(curve, math.exp(middle))) else (middle, high)
    return method.with_thresholds(curve, math.exp(high))


def cosine_distance(features: Tensor, baseline: Tensor) -> Tensor:
    """Feature shift, 1 - cosine of features [n, C] to the baseline's: float64 [n]. Rounding below 0 is cut."""
    return (1 - F.cosine_similarity(features.double(), baseline.double(), dim=-1)).clamp_min(0)


def candidate_rs(model: Any) -> list[int]:
    """Returns the r that the stress test tries by default.

    These are all r with which ToMe's patch tokens last to the last layer, then steps of a quarter up to half of the
    tokens.
    """
    tokens, most = model.patch_embed.num_patches, model.patch_embed.num_patches // 2
    rs = list(range(1 + min(most, math.ceil(tokens / max(1, len(model.blocks) - 1)))))
    while rs[-1] < most:
        rs.append(min(most, math.ceil(1.25 * rs[-1])))
    return rs


def largest_at_full_accuracy(candidates: Sequence[int], accuracy_at: Callable[[int], float], full: float) -> int:
    """Returns the largest candidate whose accuracy, to a tenth of a percent, is at least the baseline's.

    It tries from the largest down instead of bisecting: accuracy rises and falls by an image or two from one r to the
    next. The smallest candidate is 0, which merges nothing.
    """

    def rounded(accuracy: float) -> float:
        return round(100 * accuracy, 1)

    return next(r for r in reversed(candidates) if rounded(accuracy_at(r)) >= rounded(full))
