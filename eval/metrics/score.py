"""A folder of pictures and records -> the figures of every method against the full model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import EvalError
from ..common.cli import working
from ..common.files import listed
from ..images.distributed import ALONE, Team
from ..images.records import record_of
from ..images.requests import Request
from ..images.settings import Settings
from ..methods.method import BASELINE, Method
from .cache import recall
from .registry import Metric, Pairwise, SetMetric, Single, Skipped, flat
from .statistics import FEWEST_GROUPS, bootstrap, effective_size, jackknife, wilson

CHUNK = 16  # pictures in memory at once


@dataclass(frozen=True)
class Scores:
    """rows: one for each method, the full model first. images: one for each pair of pictures. records: of them all."""

    rows: list[dict[str, Any]]
    images: list[dict[str, Any]]
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """What the metrics say of a few pictures: a value for each by the metric's name, features by their net's."""

    columns: dict[str, Tensor]
    features: dict[str, Tensor]
    blank: int


def score(
    out: Path,
    settings: Settings,
    requests: Sequence[Request],
    methods: Sequence[Method],
    metrics: Sequence[Metric],
    team: Team = ALONE,
    other: Path | None = None,
) -> Scores:
    """Figures of `methods`. FULL among them is compared with itself; otherwise it has only what needs no reference.

    other: a run's folder that the full model's pictures are of, in which they may have been measured.

    Every process of a team looks at its share of the pictures, and the first of them draws the figures from all; the
    others get empty Scores.
    """
    there = {m.slug: records(out, settings, m, requests) for m in (BASELINE, *methods) if not m.unavailable_reason}
    for key, found in there.items():
        check_complete(requests, found, key)
    groups = [request.prompt for request in requests]
    shares = {m.name for m in metrics if isinstance(m, Single) and m.share}
    reference: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for method in (BASELINE, *(m for m in methods if m is not BASELINE)):
        head: dict[str, Any] = {"method": method.name, "key": method.slug, "ratio": method.ratio}
        if method.unavailable_reason:
            rows.append({**head, "skipped": method.unavailable_reason})
            continue
        compared = method is not BASELINE or BASELINE in methods
        mine = team.share(list(enumerate(_chunks(requests))))
        shown = working(mine, f"measuring {method.slug}", quiet=not team.leads)
        own = [(i, _measure(out, chunk, method, there, metrics, compared, other)) for i, chunk in shown]
        parts = [part for _, part in sorted((p for ps in team.gather(own) for p in ps), key=lambda p: p[0])]
        if not team.leads:
            continue
        columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
        features = {net: torch.cat([part.features[net] for part in parts]) for net in parts[0].features}
        reference = reference or features  # the full model comes first
        figures = {name: (share if name in shares else mean)(column, groups) for name, column in columns.items()}
        for metric in metrics:
            if isinstance(metric, SetMetric) and compared:
                net = metric.features.implementation
                figures[metric.name] = distance(metric, reference[net], features[net], groups)
        rows.append({
            **head, "n": len(requests), "blank": sum(part.blank for part in parts),
            "undefined": sum(not record.get("finite", True) for record in there[method.slug].values()),
            "other_batch": sum(_apart(there[BASELINE.slug][id], own) for id, own in there[method.slug].items()),
            "metrics": figures, **speed(there[BASELINE.slug], there[method.slug]),
        })  # fmt: skip
        images += [
            {
                "method": method.name, "key": method.slug, "id": request.id, "prompt": request.prompt,
                "seed": request.seed + method.seed_shift, "seconds": there[method.slug][request.id]["seconds"],
                **{name: column[i].item() for name, column in columns.items()},
            }
            for i, request in enumerate(requests)
        ]  # fmt: skip
    return Scores(rows if team.leads else [], images, [record for found in there.values() for record in found.values()])


def _measure(
    out: Path,
    requests: Sequence[Request],
    method: Method,
    there: dict[str, dict[str, dict[str, Any]]],
    metrics: Sequence[Metric],
    compared: bool,
    other: Path | None,
) -> Part:
    prompts = [request.prompt for request in requests]
    full, own = (cache(partial(load, out / key, requests)) for key in (BASELINE.slug, method.slug))  # read if need be
    judging = [m for m in metrics if isinstance(m, Single) or (compared and isinstance(m, Pairwise))]
    nets = {m.features.implementation: m.features.compute for m in metrics if isinstance(m, SetMetric)}

    def values(metric: Single | Pairwise) -> Tensor:
        return metric.compute(own(), prompts) if isinstance(metric, Single) else metric.compute(full(), own())

    wanted: dict[str, Callable[[], Tensor]] = {
        "flat colour": lambda: flat(own()),
        **{f"{m.name}: {m.implementation}": partial(values, m) for m in judging},
        **{name: partial(lambda compute: compute(own()), compute) for name, compute in nets.items()},
    }
    content = [there[key][request.id]["sha256"] for key in (BASELINE.slug, method.slug) for request in requests]
    found = recall(out, [*content, *prompts], wanted, other)
    return Part(
        {m.name: found[f"{m.name}: {m.implementation}"] for m in judging},
        {name: found[name] for name in nets},
        int(found["flat colour"].sum()),
    )


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
        names = listed([f"{id}.png" for id in missing])
        raise EvalError(f"{name} lacks {names}: the same command draws them (without --metrics-only)")


def load(folder: Path, requests: Sequence[Request]) -> Tensor:
    """The pictures of `requests` in a folder: uint8 [B, 3, H, W]."""
    arrays = [np.array(Image.open(folder / f"{request.id}.png").convert("RGB")) for request in requests]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def mean(values: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """Mean and 95 % interval of the finite values; infinite ones (PSNR of equal pictures) and NaN are counted."""
    keep = values.isfinite()
    kept = values[keep]
    figures: dict[str, Any] = {"value": None, "low": None, "high": None, "n": len(kept)}
    if len(kept):
        interval = bootstrap(kept, [group for group, k in zip(groups, keep.tolist(), strict=True) if k])
        low, high = interval or (None, None)
        figures.update(value=kept.mean().item(), low=low, high=high)
    for name, count in (("infinite", int(values.isinf().sum())), ("undefined", int(values.isnan().sum()))):
        if count:
            figures[name] = count
    return figures


def share(values: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """Share of ones among `values` with Wilson's 95 % interval, which stays honest where all are ones.

    Pictures of one class say less than as many of different ones: the interval is of the effective sample size, and
    there is none of too few classes to tell it by.
    """
    value, n = values.mean().item(), effective_size(values, groups)
    low, high = wilson(value * n, n) if len(set(groups)) >= FEWEST_GROUPS else (None, None)
    return {"value": value, "low": low, "high": high, "n": len(values)}


def distance(metric: SetMetric, reference: Tensor, own: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """The distance of two sets of features with its 95 % interval; `features` says how wide they are."""
    figures: dict[str, Any] = {"value": None, "low": None, "high": None, "n": len(own), "features": own.shape[1]}
    if undefined := int((~(own.isfinite() & reference.isfinite()).all(dim=1)).sum()):
        figures["undefined"] = undefined
    elif len(own) > 1:
        low, high = jackknife(metric.distance, reference, own, groups) or (None, None)
        low = low if low is None else max(metric.least, low)
        figures.update(value=metric.distance(reference, own), low=low, high=high)
    return figures


def speed(full: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Seconds a picture, and how many times faster than the full model: of the batches in which its denoiser ran beside
    this method's; where there are none (older runs, some devices), of those that both drew in one run."""
    largest = max(record["batch"] for record in own.values())  # a last batch of fewer costs more a picture
    timed = [id for id, record in own.items() if record["timed"] and record["batch"] == largest]
    beside = [id for id in timed if own[id].get("full_denoising") is not None]
    together = beside or [id for id in timed if full[id]["run"] == own[id]["run"]]
    timed = together or timed  # seconds of other batches would not be those that the speed-up is of
    denoising = [own[id]["denoising"] for id in timed if own[id].get("denoising") is not None]

    def most(name: str) -> int | None:
        whole = [record for record in own.values() if record["batch"] == largest]
        return max((record[name] for record in whole if record.get(name) is not None), default=None)

    return {
        "seconds": spread([own[id]["seconds"] for id in timed]),
        "denoising": spread(denoising),
        "speedup": spread([_gain(full[id], own[id]) for id in together]),
        "beside": bool(beside),
        "of_one_run": all(full[id]["run"] == own[id]["run"] for id in timed),
        "peak_bytes": most("peak_bytes"),
        "reserved_bytes": most("reserved_bytes"),
        "held_bytes": most("held_bytes"),
    }


def _apart(full: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether two pictures were drawn in batches that differ. (Older records tell how many were in one, not which.)"""
    names = [name for name in ("batch", "drawn_with") if name in full and name in own]
    return any(full[name] != own[name] for name in names)


def _gain(full: dict[str, Any], own: dict[str, Any]) -> float:
    """How many times faster than the full model: what else a picture takes, decoding and text, is the same."""
    if own.get("full_denoising") is None:
        return float(full["seconds"] / own["seconds"])
    return float((own["seconds"] - own["denoising"] + own["full_denoising"]) / own["seconds"])


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Median, mean and the 5th and 95th percentile of n batches; None of none."""
    if not values:
        return None
    low, middle, high = np.percentile(values, [5, 50, 95]).tolist()
    return {"median": middle, "mean": float(np.mean(values)), "p5": low, "p95": high, "n": len(values)}


def records(out: Path, settings: Settings, method: Method, requests: Sequence[Request]) -> dict[str, dict[str, Any]]:
    """Of a method's pictures that are there, by their ids."""
    found = {request.id: record_of(out, settings, method, request) for request in requests}
    return {id: record for id, record in found.items() if record is not None}


def _chunks(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    return (requests[i : i + CHUNK] for i in range(0, len(requests), CHUNK))
