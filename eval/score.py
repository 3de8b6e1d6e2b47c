"""A folder of pictures and records -> the figures of every method against the full model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import EvalError
from .generate import Settings, record_of
from .methods import FULL, Method
from .metrics import Metric, Pairwise, SetMetric, Single, Skipped
from .prompts import Request
from .statistics import bootstrap, jackknife

CHUNK = 16  # pictures in memory at once


@dataclass(frozen=True)
class Scores:
    """rows: one for each method, the full model first. images: one for each pair of pictures."""

    rows: list[dict[str, Any]]
    images: list[dict[str, Any]]


def score(
    out: Path, settings: Settings, requests: Sequence[Request], methods: Sequence[Method], metrics: Sequence[Metric]
) -> Scores:
    """Figures of `methods`. FULL among them is compared with itself; otherwise it has only what needs no reference."""
    records = {m.key: _records(out, settings, m, requests) for m in (FULL, *methods) if not m.missing}
    check_complete(requests, records[FULL.key], FULL.key)
    reference_features: dict[Callable[[Tensor], Tensor], Tensor] = {}
    rows: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for method in (FULL, *(m for m in methods if m is not FULL)):
        head: dict[str, Any] = {"method": method.name, "key": method.key, "ratio": method.ratio}
        if method.missing:
            rows.append({**head, "skipped": method.missing})
            continue
        check_complete(requests, records[method.key], method.key)
        compared = method is not FULL or FULL in methods
        singles = [m for m in metrics if isinstance(m, Single)]
        pairwise = [m for m in metrics if isinstance(m, Pairwise)] if compared else []
        sets = [m for m in metrics if isinstance(m, SetMetric)]
        values: dict[str, list[Tensor]] = {name: [] for name in [m.name for m in singles] + [m.name for m in pairwise]}
        features: dict[Callable[[Tensor], Tensor], list[Tensor]] = {m.features: [] for m in sets}
        blank = 0
        for chunk in _chunks(requests):
            prompts = [request.prompt for request in chunk]
            full, own = load(out / FULL.key, chunk), load(out / method.key, chunk)
            blank += int((own.amax((1, 2, 3)) == own.amin((1, 2, 3))).sum())
            for single in singles:
                values[single.name].append(single.compute(own, prompts))
            for pair in pairwise:
                values[pair.name].append(pair.compute(full, own))
            for compute, found in features.items():
                found.append(compute(own))
        columns = {name: torch.cat(parts) for name, parts in values.items()}
        groups = [request.prompt for request in requests]
        shares = {single.name for single in singles if single.share}
        figures = {name: (share if name in shares else mean)(column, groups) for name, column in columns.items()}
        for metric in sets:
            own = torch.cat(features[metric.features])
            reference = reference_features.setdefault(metric.features, own)  # the full model comes first
            if compared:
                figures[metric.name] = distance(metric, reference, own, groups)
        rows.append({
            **head, "n": len(requests), "blank": blank, "metrics": figures,
            **speed(records[FULL.key], records[method.key]),
        })  # fmt: skip
        images += [
            {
                "method": method.name, "key": method.key, "id": request.id, "prompt": request.prompt,
                "seed": request.seed + method.seed_shift, "seconds": records[method.key][request.id]["seconds"],
                **{name: column[i].item() for name, column in columns.items()},
            }
            for i, request in enumerate(requests)
        ]  # fmt: skip
    return Scores(rows, images)


def describe(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """The metrics as results.json lists them."""
    return [
        {"name": m.name, "skipped": m.reason}
        if isinstance(m, Skipped)
        else {"name": m.name, "implementation": m.implementation, "lower_is_better": m.lower_is_better,
              "digits": m.digits, "per_image": not isinstance(m, SetMetric)}
        for m in metrics
    ]  # fmt: skip


def check_complete(requests: Sequence[Request], records: Collection[str], name: str) -> None:
    """Raises, naming the pictures that are not there to be paired. A pair has one id, not one place in two lists."""
    missing = [request.id for request in requests if request.id not in records]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise EvalError(
            f"{name} lacks {', '.join(f'{id}.png' for id in missing[:5])}{more}: the same command makes them again"
        )


def load(folder: Path, requests: Sequence[Request]) -> Tensor:
    """The pictures of `requests` in a folder: uint8 [B, 3, H, W]."""
    arrays = [np.array(Image.open(folder / f"{request.id}.png").convert("RGB")) for request in requests]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def mean(values: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """Mean and 95 % interval of the finite values; infinite ones (PSNR of equal pictures) are counted."""
    keep = values.isfinite()
    kept = values[keep]
    figures: dict[str, Any] = {"value": None, "low": None, "high": None, "n": len(kept)}
    if len(kept):
        interval = bootstrap(kept, [group for group, k in zip(groups, keep.tolist(), strict=True) if k])
        low, high = interval or (None, None)
        figures.update(value=kept.mean().item(), low=low, high=high)
    if len(kept) < len(values):
        figures["infinite"] = len(values) - len(kept)
    return figures


def share(values: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """Share of ones among `values` with Wilson's 95 % interval, which stays honest where all are ones."""
    from tofu_sd.demo.check import wilson

    low, high = wilson(int(values.sum()), len(values))
    return {"value": values.mean().item(), "low": low, "high": high, "n": len(values)}


def distance(metric: SetMetric, reference: Tensor, own: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """The distance of two sets of features with its 95 % interval; `features` says how wide they are."""
    figures: dict[str, Any] = {"value": None, "low": None, "high": None, "n": len(own), "features": own.shape[1]}
    if len(own) > 1:
        low, high = jackknife(metric.distance, reference, own, groups) or (None, None)
        figures.update(value=metric.distance(reference, own), low=low, high=high)
    return figures


def speed(full: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Seconds a picture, and how many times faster than the full model's batch made next to it in the same run."""
    largest = max(record["batch"] for record in own.values())  # a last batch of fewer costs more a picture
    timed = [id for id, record in own.items() if record["timed"] and record["batch"] == largest]
    together = [id for id in timed if full[id]["run"] == own[id]["run"]]
    peaks = [record["peak_bytes"] for record in own.values() if record["peak_bytes"] is not None]
    return {
        "seconds": spread([own[id]["seconds"] for id in timed]),
        "speedup": spread([full[id]["seconds"] / own[id]["seconds"] for id in together]),
        "peak_bytes": max(peaks, default=None),
    }


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Median and the 5th and 95th percentile of n batches; None of none."""
    if not values:
        return None
    low, middle, high = np.percentile(values, [5, 50, 95]).tolist()
    return {"median": middle, "p5": low, "p95": high, "n": len(values)}


def _records(out: Path, settings: Settings, method: Method, requests: Sequence[Request]) -> dict[str, dict[str, Any]]:
    found = {request.id: record_of(out, settings, method, request) for request in requests}
    return {id: record for id, record in found.items() if record is not None}


def _chunks(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    return (requests[i : i + CHUNK] for i in range(0, len(requests), CHUNK))
