"""Quality against cost: every method a point, and those that no other beats in both.

A method is on the frontier of a cost and a metric if none is at least as good in both and better in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tofu_sd import TokenFusion, recipes

from . import EvalError, plots
from .methods import FULL, SCALE
from .table import circumstances, label, short

FORMS = {"fused": "o", "with log n (+p)": "^", "keys and values (kv:)": "s", "both": "D"}
COLOURS = ("#3358d4", "#d6409f", "#30a46c", "#f76b15", "#8e4ec6", "#12a594", "#978365", "#60646c")
MOST_LABELS = 8


@dataclass(frozen=True)
class Cost:
    """What a method takes, as a share of what the full model takes."""

    name: str
    title: str

    def of(self, row: dict[str, Any], full: dict[str, Any]) -> float | None:
        if self.name == "time":
            return None if row["speedup"] is None else 1 / float(row["speedup"]["median"])
        return row["flops"] / full["flops"] if row.get("flops") and full.get("flops") else None


TIME = Cost("time", "seconds / image, of the full model's")
FLOPS = Cost("flops", "FLOP / image, of the full model's")


@dataclass(frozen=True)
class Point:
    row: dict[str, Any]
    cost: float
    value: float
    low: float
    high: float


def points(found: dict[str, Any], cost: Cost, metric: dict[str, Any]) -> list[Point]:
    """The methods of a run that have both figures."""
    full = next(row for row in found["rows"] if row["key"] == FULL.key)
    drawn = []
    for row in found["rows"]:
        figure = row.get("metrics", {}).get(metric["name"])
        if row["key"] in (FULL.key, SCALE.key) or "skipped" in row or not figure or figure["value"] is None:
            continue
        at = cost.of(row, full)
        if at is not None:
            low, high = (figure[end] if figure[end] is not None else figure["value"] for end in ("low", "high"))
            drawn.append(Point(row, at, figure["value"], low, high))
    return drawn


def frontier(drawn: Sequence[Point], lower_is_better: bool) -> list[Point]:
    """The points that no other beats, by rising cost."""
    sign = 1 if lower_is_better else -1
    kept: list[Point] = []
    for point in sorted(drawn, key=lambda p: (p.cost, sign * p.value)):
        if not kept or sign * point.value < sign * kept[-1].value:
            kept.append(point)
    return kept


def metrics_shown(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The perceptual one there is, and structural similarity."""
    there = {m["name"]: m for m in found["metrics"] if "skipped" not in m}
    perceptual = next((name for name in there if name.startswith("LPIPS")), "PD-judge")
    return [there[name] for name in (perceptual, "MS-SSIM", "PSNR") if name in there][:2]


def family(row: dict[str, Any]) -> str:
    """The recipe or peer a method is of."""
    return str(row["method"]).replace("kv:", "").partition("@")[0].partition("+")[0]


def form(row: dict[str, Any]) -> str:
    fusion = _fusion(row)
    return list(FORMS)[2 * fusion.keys_only + fusion.proportional if fusion else 0]


def _fusion(row: dict[str, Any]) -> TokenFusion | None:
    """What a row's method fuses; None for a peer."""
    try:
        return recipes.named(str(row["method"]).removeprefix("deepcache:"), row["ratio"] or 0)
    except ValueError:
        return None


def svg(found: dict[str, Any]) -> str:
    """Panels of each cost and metric that the run has. EvalError of fewer than two methods."""
    shown = metrics_shown(found)
    costs = [cost for cost in (TIME, FLOPS) if any(len(points(found, cost, m)) > 1 for m in shown)]
    if not costs:
        raise EvalError("a frontier takes two methods with their times or operations, and a metric")
    families = list(dict.fromkeys(family(p.row) for c in costs for m in shown for p in points(found, c, m)))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(families)}
    with plots.style():
        figure = Figure(figsize=(2 + 4.2 * len(costs), 3.6 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), len(costs), squeeze=False)
        for i, metric in enumerate(shown):
            for j, cost in enumerate(costs):
                _panel(axes[i][j], points(found, cost, metric), metric, cost, colour)
        key = [Line2D([], [], color=colour[name], marker="o", linestyle="", label=name) for name in families]
        forms = {form(p.row) for c in costs for m in shown for p in points(found, c, m)}
        key += [
            Line2D([], [], color="gray", marker=mark, linestyle="", label=name)
            for name, mark in FORMS.items() if name in forms and len(forms) > 1
        ]  # fmt: skip
        key += [Line2D([], [], color="gray", linewidth=1, label="no other is better in both")]
        figure.legend(handles=key, loc="outside lower center", ncols=2 + 2 * len(costs), frameon=False)
        return plots.svg(figure)


def _panel(ax: Axes, drawn: Sequence[Point], metric: dict[str, Any], cost: Cost, colour: dict[str, str]) -> None:
    front = frontier(drawn, metric["lower_is_better"])
    ax.step([p.cost for p in front], [p.value for p in front], where="post", color="gray", linewidth=1, zorder=1)
    for point in drawn:
        ends = [[point.value - point.low], [point.high - point.value]]
        ax.errorbar(
            point.cost, point.value, yerr=ends, color=colour[family(point.row)], marker=FORMS[form(point.row)],
            markersize=5, linewidth=0.8, alpha=1 if point in front else 0.45,
        )  # fmt: skip
    for i, point in enumerate(front[:MOST_LABELS]):
        place = (6, 4) if i % 2 else (6, -10)  # neighbours' names out of each other's way
        ax.annotate(label(point.row), (point.cost, point.value), place, textcoords="offset points", fontsize=7)
    least, most = min(1.0, *(p.cost for p in drawn)), max(1.0, *(p.cost for p in drawn))  # the full model's own is 1
    margin = 0.05 * (most - least)
    ax.set_xlim(least - margin, most + margin)
    ax.set_xlabel(cost.title)
    ax.set_ylabel(f"{metric['name']} {'↓' if metric['lower_is_better'] else '↑'}")
    if all(p.value > 0 for p in drawn) and metric["lower_is_better"]:
        ax.set_yscale("log")
    plots.bare(ax)


def markdown(found: dict[str, Any]) -> str:
    """The methods that no other beats in operations and the perceptual metric, and how to ask for each."""
    if not metrics_shown(found):
        raise EvalError("a frontier takes LPIPS, MS-SSIM or PSNR, which this run has not measured")
    metric = metrics_shown(found)[0]
    cost = next((c for c in (FLOPS, TIME) if len(points(found, c, metric)) > 1), None)
    if cost is None:
        raise EvalError("a frontier takes two methods with their times or operations")
    shown = [m for m in found["metrics"] if "skipped" not in m and (m in metrics_shown(found) or m["name"] == "PSNR")]
    titles = [f"{m['name']} {'↓' if m['lower_is_better'] else '↑'}" for m in shown]
    lines = [f"| method | {cost.title} | speed-up | {' | '.join(titles)} | how |"]
    lines += ["|---|--:|--:|" + "--:|" * len(shown) + "---|"]
    for point in frontier(points(found, cost, metric), metric["lower_is_better"]):
        gain = point.row["speedup"]
        cells = [f"{point.cost:.3f}", f"{gain['median']:.2f}×" if gain else "–"]
        cells += [short(point.row["metrics"].get(m["name"]), m["digits"]) for m in shown]
        lines.append(f"| {label(point.row)} | {' | '.join(cells)} | {how(point.row)} |")
    return "\n".join([*lines, "", circumstances(found) + ".", "", f"`{found['provenance']['command']}`"]) + "\n"


def how(row: dict[str, Any]) -> str:
    """The call that fuses as a row's method does; nothing for a peer."""
    fusion = _fusion(row)
    if fusion is None or row["method"].startswith("deepcache"):
        return "–"
    usual = TokenFusion(fusion.ratio)
    changed = {n: v for n, v in vars(fusion).items() if v != getattr(usual, n)}
    told = [f"{n}={getattr(v, '__name__', v)!r}" for n, v in changed.items()]
    return f"`apply_patch(pipe, {', '.join([f'{fusion.ratio:g}', *told])})`"
