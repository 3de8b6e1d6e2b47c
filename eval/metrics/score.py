"""A folder of images and records -> the figures of every method against the baseline."""

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
from ..common.cli import progress
from ..common.files import listed
from ..images.distributed import SINGLE_PROCESS, Processes
from ..images.records import load_records
from ..images.requests import Request
from ..images.settings import Settings, image_dir
from ..methods.method import BASELINE, Method
from .base import DistributionMetric, Metric, Pairwise, PerImageMetric, Skipped, is_flat
from .cache import cached_metrics
from .summary import concatenate, distance_ci, in_other_batch, mean_ci, proportion_ci, timing_summary

CHUNK = 16  # images in memory at once


@dataclass(frozen=True)
class Scores:
    """The figures of a run.

    Args:
        rows: one for each method, the baseline first.
        images: one for each image of a method.
        records: of all images.
    """

    rows: list[dict[str, Any]]
    images: list[dict[str, Any]]
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Measurements:
    """What the metrics yield for some images.

    Args:
        columns: a value for each image, by the metric's name.
        features: [N, D] by the feature space's description.
        num_flat: how many of the images have one flat colour.
    """

    columns: dict[str, Tensor]
    features: dict[str, Tensor]
    num_flat: int


@dataclass(frozen=True)
class Scorer:
    """Measures the images of a folder.

    Args:
        out: the folder.
        requests: the images of each method.
        records: of the images, by slug and id.
        metrics: what is measured.
        processes: they split the images; the main process has the figures.
        reference: the folder of another run, whose cache is read too.
    """

    out: Path
    requests: Sequence[Request]
    records: dict[str, dict[str, dict[str, Any]]]
    metrics: Sequence[Metric]
    processes: Processes
    reference: Path | None

    @property
    def prompts(self) -> list[str]:
        return [request.prompt for request in self.requests]

    def measure(self, method: Method, is_compared: bool) -> Measurements | None:
        """Measures a method's images; None in all processes but the main one.

        Args:
            method: one that has images.
            is_compared: whether metrics that compare it with the baseline are computed.
        """
        main = self.processes.is_main_process
        share = self.processes.split_between_processes(list(enumerate(_chunks(self.requests))))
        chunks = progress(share, f"measuring {method.slug}", quiet=not main)
        own = [(i, self._measure_chunk(chunk, method, is_compared)) for i, chunk in chunks]
        gathered = [part for parts in self.processes.gather_object(own) for part in parts]
        if not main:
            return None
        parts = [part for _, part in sorted(gathered, key=lambda part: part[0])]
        return Measurements(
            concatenate([part.columns for part in parts]),
            concatenate([part.features for part in parts]),
            sum(part.num_flat for part in parts),
        )

    def _measure_chunk(self, requests: Sequence[Request], method: Method, is_compared: bool) -> Measurements:
        prompts = [request.prompt for request in requests]
        # read only if a value is not in the cache
        baseline, own = (cache(partial(load, image_dir(self.out, m.slug), requests)) for m in (BASELINE, method))
        metrics = [
            m for m in self.metrics if isinstance(m, PerImageMetric) or (is_compared and isinstance(m, Pairwise))
        ]
        spaces = {
            m.features.implementation: m.features.compute for m in self.metrics if isinstance(m, DistributionMetric)
        }

        def values(metric: PerImageMetric | Pairwise) -> Tensor:
            if isinstance(metric, PerImageMetric):
                return metric.compute(own(), prompts)
            return metric.compute(baseline(), own())

        wanted: dict[str, Callable[[], Tensor]] = {
            "flat colour": lambda: is_flat(own()),
            **{f"{m.name}: {m.implementation}": partial(values, m) for m in metrics},
            **{name: partial(lambda compute: compute(own()), compute) for name, compute in spaces.items()},
        }
        hashes = [self.records[m.slug][request.id]["sha256"] for m in (BASELINE, method) for request in requests]
        found = cached_metrics(self.out, [*hashes, *prompts], wanted, self.reference)
        return Measurements(
            {m.name: found[f"{m.name}: {m.implementation}"] for m in metrics},
            {name: found[name] for name in spaces},
            int(found["flat colour"].sum()),
        )

    def build_row(self, method: Method, own: Measurements, baseline_features: dict[str, Tensor]) -> dict[str, Any]:
        """The row of a method. baseline_features: empty where it is not compared with the baseline."""
        proportions = {m.name for m in self.metrics if isinstance(m, PerImageMetric) and m.is_proportion}
        figures = {
            name: (proportion_ci if name in proportions else mean_ci)(column, self.prompts)
            for name, column in own.columns.items()
        }
        for metric in self.metrics:
            if isinstance(metric, DistributionMetric) and baseline_features:
                space = metric.features.implementation
                pair = baseline_features[space], own.features[space]
                figures[metric.name] = distance_ci(metric, *pair, self.prompts)
        baseline_records, records = self.records[BASELINE.slug], self.records[method.slug]
        return {
            **_row_head(method),
            "n": len(self.requests),
            "flat": own.num_flat,
            "nan": sum(not record.get("finite", True) for record in records.values()),
            "other_batch": sum(in_other_batch(baseline_records[i], record) for i, record in records.items()),
            "metrics": figures,
            **timing_summary(baseline_records, records),
        }

    def image_rows(self, method: Method, own: Measurements) -> list[dict[str, Any]]:
        """A row of per_image.csv for each image of a method."""
        return [
            {
                "method": method.name, "key": method.slug, "id": request.id, "prompt": request.prompt,
                "seed": request.seed + method.seed_shift,
                "seconds": self.records[method.slug][request.id]["seconds"],
                **{name: column[i].item() for name, column in own.columns.items()},
            }
            for i, request in enumerate(self.requests)
        ]  # fmt: skip


def score(
    out: Path,
    settings: Settings,
    requests: Sequence[Request],
    methods: Sequence[Method],
    metrics: Sequence[Metric],
    processes: Processes = SINGLE_PROCESS,
    reference: Path | None = None,
) -> Scores:
    """Measures the images of a folder. Every process measures its share; the main process has the figures.

    Args:
        out: the folder.
        settings: of its images.
        requests: the images of each method.
        methods: the rows. With the baseline among them it is compared with itself; otherwise it is there only with
            metrics that need no reference.
        metrics: what is measured.
        processes: of this launch.
        reference: the folder of another run that the baseline's images were copied from; its cache is read too.

    Raises:
        EvalError: a method lacks images.
    """
    available = [m for m in (BASELINE, *methods) if not m.unavailable_reason]
    records = {m.slug: load_records(out, settings, m, requests) for m in available}
    for slug, found in records.items():
        check_complete(requests, found, slug)
    scorer = Scorer(out, requests, records, metrics, processes, reference)
    rows: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    baseline_features: dict[str, Tensor] = {}
    for method in (BASELINE, *(m for m in methods if m is not BASELINE)):
        if method.unavailable_reason:
            rows.append({**_row_head(method), "skipped": method.unavailable_reason})
            continue
        is_compared = method is not BASELINE or BASELINE in methods
        own = scorer.measure(method, is_compared)
        if own is None:
            continue
        baseline_features = baseline_features or own.features  # the baseline is the first
        rows.append(scorer.build_row(method, own, baseline_features if is_compared else {}))
        images += scorer.image_rows(method, own)
    everything = [record for found in records.values() for record in found.values()]
    return Scores(rows if processes.is_main_process else [], images, everything)


def _row_head(method: Method) -> dict[str, Any]:
    return {"method": method.name, "key": method.slug, "ratio": method.ratio}


def describe(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """The metrics as results.json lists them."""
    return [
        {"name": m.name, "skipped": m.reason}
        if isinstance(m, Skipped)
        else {"name": m.name, "implementation": m.implementation, "lower_is_better": m.lower_is_better,
              "digits": m.digits, "per_image": not isinstance(m, DistributionMetric)}
        for m in metrics
    ]  # fmt: skip


def check_complete(requests: Sequence[Request], records: Collection[str], name: str) -> None:
    """Raises an EvalError that names the images without which a method cannot be compared."""
    missing = [request.id for request in requests if request.id not in records]
    if missing:
        names = listed([f"{image_id}.png" for image_id in missing])
        raise EvalError(f"{name} lacks {names}: the same command generates them (without --metrics-only)")


def load(folder: Path, requests: Sequence[Request]) -> Tensor:
    """The images of `requests` in a folder: uint8 [B, 3, H, W]."""
    arrays = [np.array(Image.open(folder / f"{request.id}.png").convert("RGB")) for request in requests]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _chunks(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    return (requests[i : i + CHUNK] for i in range(0, len(requests), CHUNK))
