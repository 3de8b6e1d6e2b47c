"""Quality against cost: each method a point, and the Pareto-optimal ones.

A method is Pareto-optimal in a cost and a metric if no other is at least as good in both and better in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tofu_sd import TokenFusionConfig, recipes

from .. import EvalError
from ..methods.method import BASELINE, OTHER_SEEDS
from ..methods.registry import fusion_fields, outer_and_inner
from .footnotes import batch_warnings, commands, image_warnings, label, measured, run_header, timing
from .tables import baseline_row, gained, markdown_rows, short


@dataclass(frozen=True)
class Cost:
    """The cost of a method as a proportion of the baseline's. name: of --by. title: of an axis."""

    name: str
    title: str

    def of(self, row: dict[str, Any], baseline: dict[str, Any]) -> float | None:
        """The cost of a row; None where it was not measured."""
        if self.name == "time":
            return None if row["speedup"] is None else 1 / float(row["speedup"]["median"])
        return row["flops"] / baseline["flops"] if row.get("flops") and baseline.get("flops") else None


TIME = Cost("time", "seconds / image, relative to the baseline")
FLOPS = Cost("flops", "FLOPs / image, relative to the baseline")
COSTS = {cost.name: cost for cost in (FLOPS, TIME)}  # FLOPs first: they do not depend on the machine


@dataclass(frozen=True)
class Point:
    """A method: its row, cost, and metric with the ends of its interval."""

    row: dict[str, Any]
    cost: float
    value: float
    low: float
    high: float


def compared(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that are compared with the baseline."""
    return [
        row for row in results["rows"] if row["key"] not in (BASELINE.slug, OTHER_SEEDS.slug) and "skipped" not in row
    ]


def without_cost(results: dict[str, Any], cost: Cost) -> list[str]:
    """The methods whose cost was not measured."""
    return [label(row) for row in compared(results) if cost.of(row, baseline_row(results)) is None]


def points(results: dict[str, Any], cost: Cost, metric: dict[str, Any]) -> list[Point]:
    """The methods whose cost and metric were measured."""
    baseline = baseline_row(results)
    measured_points = []
    for row in compared(results):
        figure = row["metrics"].get(metric["name"])
        if not figure or figure["value"] is None:
            continue
        relative_cost = cost.of(row, baseline)
        if relative_cost is not None:
            low, high = (figure[end] if figure[end] is not None else figure["value"] for end in ("low", "high"))
            measured_points.append(Point(row, relative_cost, figure["value"], low, high))
    return measured_points


def pareto(candidates: Sequence[Point], lower_is_better: bool) -> list[Point]:
    """The Pareto-optimal points by increasing cost, of those that cost less than the baseline."""
    sign = 1 if lower_is_better else -1
    kept: list[Point] = []
    for point in sorted((p for p in candidates if p.cost < 1), key=lambda p: (p.cost, sign * p.value)):
        last = kept[-1] if kept else None
        equal = last is not None and (point.cost, point.value) == (last.cost, last.value)
        if last is None or equal or sign * point.value < sign * last.value:
            kept.append(point)
    return kept


def metrics_shown(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of the plots: the perceptual one of the run, and MS-SSIM or PSNR."""
    available = {
        m["name"]: m
        for m in results["metrics"]
        if any((row["metrics"].get(m["name"]) or {}).get("value") is not None for row in compared(results))
    }
    perceptual = next((name for name in available if name.startswith("LPIPS")), "PD-demo")
    return [available[name] for name in (perceptual, "MS-SSIM", "PSNR") if name in available][:2]


def fusion_of(row: dict[str, Any]) -> TokenFusionConfig | None:
    """The configuration of a row's method; None for someone else's method."""
    try:
        return recipes.named(outer_and_inner(str(row["method"]))[1], row["ratio"] or 0)
    except (ValueError, TypeError):  # of a version with other options
        return None


def best(results: dict[str, Any], by: str | None = None) -> tuple[Cost, dict[str, Any], list[Point]]:
    """The Pareto-optimal methods of a run.

    Args:
        results: of the run.
        by: the name of a cost; None for the first one that was measured.

    Returns:
        (cost, metric, methods). The metric is the perceptual one.

    Raises:
        EvalError: too few methods, costs or metrics were measured.
    """
    if not metrics_shown(results):
        raise EvalError("--pareto needs LPIPS, MS-SSIM or PSNR, which this run has not measured")
    metric = metrics_shown(results)[0]
    costs = [COSTS[by]] if by else list(COSTS.values())
    cost = next((c for c in costs if len(points(results, c, metric)) > 1), None)
    if cost is None:
        raise EvalError(f"--pareto needs two methods with their {by or 'times or FLOPs'}")
    return cost, metric, pareto(points(results, cost, metric), metric["lower_is_better"])


def markdown(results: dict[str, Any], by: str | None = None) -> str:
    """A table of the Pareto-optimal methods and the call for each; below it those that were not compared."""
    cost, _, front = best(results, by)
    shown = [
        m for m in results["metrics"] if "skipped" not in m and (m in metrics_shown(results) or m["name"] == "PSNR")
    ]
    titles = [f"{m['name']} {'↓' if m['lower_is_better'] else '↑'}" for m in shown]
    lines = []
    for point in front:
        figures = [short(point.row["metrics"].get(m["name"]), m["digits"]) for m in shown]
        lines.append([label(point.row), call(point.row), f"{point.cost:.3f}", gained(point.row), *figures])
    optimal = {**results, "rows": [point.row for point in front]}
    footnotes = [
        run_header(results) + ".",
        timing(optimal),
        *measured(shown),
        *image_warnings(results),
        *batch_warnings(results),
    ]
    if not front:
        footnotes.append("No method costs less than the baseline.")
    if missing := without_cost(results, cost):
        footnotes.append(f"Not compared, without measured {cost.name}: {', '.join(missing)}.")
    columns = ["method", "call", cost.title, "speed-up", *titles]
    return markdown_rows(columns, lines, [*footnotes, "", commands(results)], left=2)


def call(row: dict[str, Any]) -> str:
    """The call of apply_patch for a row's method; a dash for other people's methods."""
    fusion = fusion_of(row)
    if fusion is None or outer_and_inner(row["method"])[0]:
        return "–"
    defaults, values = fusion_fields(TokenFusionConfig()), fusion_fields(fusion)
    options = [f"{name}={value!r}" for name, value in values.items() if name != "ratio" and value != defaults[name]]
    return f"`apply_patch(pipe, {', '.join([f'{fusion.ratio:g}', *options])})`"
