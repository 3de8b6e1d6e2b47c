"""Values of many images or batches -> a figure with its 95 % interval, or a median with percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import DistributionMetric
from .statistics import MIN_GROUPS, bootstrap, effective_size, jackknife, wilson


def mean_ci(values: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """Mean of the finite values with its 95 % interval; infinite ones (PSNR of equal images) and NaN are counted.

    Args:
        values: [N], one for each image.
        groups: the prompt of each image; images of one prompt are resampled together.
    """
    keep = values.isfinite()
    kept = values[keep]
    figure: dict[str, Any] = {"value": None, "low": None, "high": None, "n": len(kept)}
    if len(kept):
        interval = bootstrap(kept, [group for group, k in zip(groups, keep.tolist(), strict=True) if k])
        low, high = interval or (None, None)
        figure.update(value=kept.mean().item(), low=low, high=high)
    for name, count in (("infinite", int(values.isinf().sum())), ("nan", int(values.isnan().sum()))):
        if count:
            figure[name] = count
    return figure


def proportion_ci(values: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """Proportion of ones with Wilson's 95 % interval, which is not empty where all are ones.

    Images of one prompt are correlated, so the interval is that of the effective sample size. Too few prompts have
    none.

    Args:
        values: [N] of 0 and 1.
        groups: the prompt of each image.
    """
    value, n = values.mean().item(), effective_size(values, groups)
    low, high = wilson(value * n, n) if len(set(groups)) >= MIN_GROUPS else (None, None)
    return {"value": value, "low": low, "high": high, "n": len(values)}


def distance_ci(metric: DistributionMetric, reference: Tensor, own: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """Distance of two sets of features with its 95 % interval; `features` is their width.

    Args:
        metric: the distance.
        reference: [N, D], of the baseline.
        own: [N, D], of the method.
        groups: the prompt of each image.
    """
    figure: dict[str, Any] = {"value": None, "low": None, "high": None, "n": len(own), "features": own.shape[1]}
    if not_finite := int((~(own.isfinite() & reference.isfinite()).all(dim=1)).sum()):
        figure["nan"] = not_finite
    elif len(own) > 1:
        low, high = jackknife(metric.distance, reference, own, groups) or (None, None)
        low = low if low is None else max(metric.minimum, low)
        figure.update(value=metric.distance(reference, own), low=low, high=high)
    return figure


def percentiles(values: Sequence[float]) -> dict[str, Any] | None:
    """Median, mean, and 5th and 95th percentile of n batches; None without values."""
    if not values:
        return None
    low, middle, high = np.percentile(values, [5, 50, 95]).tolist()
    return {"median": middle, "mean": float(np.mean(values)), "p5": low, "p95": high, "n": len(values)}


def timing_summary(baseline: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Seconds of an image and speed-up over the baseline, from the records of both by id.

    The speed-up is that of batches in which the baseline's denoiser ran after each step of the method. Where there are
    none (older runs, some devices), it is that of batches which one run generated with both.
    """
    largest = max(record["batch"] for record in own.values())  # a smaller last batch costs more per image
    timed = [image_id for image_id, record in own.items() if record["timed"] and record["batch"] == largest]
    interleaved = [i for i in timed if own[i].get("baseline_denoiser_seconds") is not None]
    compared = interleaved or [i for i in timed if baseline[i]["run"] == own[i]["run"]]
    timed = compared or timed  # seconds of the batches that the speed-up is of
    return {
        "seconds": percentiles([own[i]["seconds"] for i in timed]),
        "denoiser_seconds": percentiles(
            [own[i]["denoiser_seconds"] for i in timed if own[i].get("denoiser_seconds") is not None]
        ),
        "speedup": percentiles([_speedup(baseline[i], own[i]) for i in compared]),
        "interleaved": bool(interleaved),
        "same_run": all(baseline[i]["run"] == own[i]["run"] for i in timed),
        **_peak_memory([record for record in own.values() if record["batch"] == largest]),
    }


def _peak_memory(records: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """The most of each kind of memory in any of the batches."""
    names = ("peak_bytes", "reserved_bytes", "held_bytes")
    known = {name: [record[name] for record in records if record.get(name) is not None] for name in names}
    return {name: max(values, default=None) for name, values in known.items()}


def _speedup(baseline: dict[str, Any], own: dict[str, Any]) -> float:
    """How many times faster than the baseline; text encoding and decoding take the same time in both."""
    if own.get("baseline_denoiser_seconds") is None:
        return float(baseline["seconds"] / own["seconds"])
    with_baseline = own["seconds"] - own["denoiser_seconds"] + own["baseline_denoiser_seconds"]
    return float(with_baseline / own["seconds"])


def in_other_batch(baseline: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether two images were generated in batches of different images. (Older records have only the batch size.)"""
    names = [name for name in ("batch", "batch_ids") if name in baseline and name in own]
    return any(baseline[name] != own[name] for name in names)


def concatenate(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, joined over the parts."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
