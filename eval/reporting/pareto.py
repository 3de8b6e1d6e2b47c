"""Quality against cost: every method a point, and those that no other beats in both.

A method is on the frontier of a cost and a metric if none is at least as good in both and better in one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tofu_sd import TokenFusionConfig, recipes

from .. import EvalError
from ..methods.method import BASELINE, OTHER_SEEDS
from . import plots
from .tables import circumstances, commands, flaws, full_row, gained, label, measured, short, timing, unlike

FORMS = {"fused": "o", "with log n (+p)": "^", "keys and values (kv:)": "s", "both": "D"}
COLOURS = ("#3358d4", "#d6409f", "#30a46c", "#f76b15", "#8e4ec6", "#12a594", "#978365", "#60646c")
PEERS = "XP*vpdh<>"  # a mark for each, in ink
INK = "#1c2024"


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
FLOPS = Cost("operations", "FLOP / image, of the full model's")
COSTS = {cost.name: cost for cost in (FLOPS, TIME)}  # operations first: they do not depend on the machine


@dataclass(frozen=True)
class Point:
    row: dict[str, Any]
    cost: float
    value: float
    low: float
    high: float


def compared(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of methods."""
    return [
        row for row in found["rows"] if row["key"] not in (BASELINE.slug, OTHER_SEEDS.slug) and "skipped" not in row
    ]


def lacking(found: dict[str, Any], cost: Cost) -> list[str]:
    """The methods that have no such figure, of which a frontier cannot say whether others beat them."""
    return [label(row) for row in compared(found) if cost.of(row, full_row(found)) is None]


def points(found: dict[str, Any], cost: Cost, metric: dict[str, Any]) -> list[Point]:
    """The methods of a run that have both figures."""
    full = full_row(found)
    drawn = []
    for row in compared(found):
        figure = row["metrics"].get(metric["name"])
        if not figure or figure["value"] is None:
            continue
        at = cost.of(row, full)
        if at is not None:
            low, high = (figure[end] if figure[end] is not None else figure["value"] for end in ("low", "high"))
            drawn.append(Point(row, at, figure["value"], low, high))
    return drawn


def frontier(drawn: Sequence[Point], lower_is_better: bool) -> list[Point]:
    """The points that no other beats, by rising cost; none that cost as much as the full model, which is better."""
    sign = 1 if lower_is_better else -1
    kept: list[Point] = []
    for point in sorted((p for p in drawn if p.cost < 1), key=lambda p: (p.cost, sign * p.value)):
        last = kept[-1] if kept else None
        equal = last is not None and (point.cost, point.value) == (last.cost, last.value)
        if last is None or equal or sign * point.value < sign * last.value:
            kept.append(point)
    return kept


def metrics_shown(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The perceptual one there is, and structural similarity."""
    there = {
        m["name"]: m
        for m in found["metrics"]
        if any((row["metrics"].get(m["name"]) or {}).get("value") is not None for row in compared(found))
    }
    perceptual = next((name for name in there if name.startswith("LPIPS")), "PD-judge")
    return [there[name] for name in (perceptual, "MS-SSIM", "PSNR") if name in there][:2]


def family(row: dict[str, Any]) -> str:
    """The recipe or peer a method is of."""
    return str(row["method"]).replace("kv:", "").partition("@")[0].partition("+")[0]


def form(row: dict[str, Any]) -> str:
    fusion = _fusion(row)
    return list(FORMS)[2 * fusion.kv_only + fusion.proportional if fusion else 0]


def _fusion(row: dict[str, Any]) -> TokenFusionConfig | None:
    """What a row's method fuses; None for a peer."""
    try:
        return recipes.named(str(row["method"]).removeprefix("deepcache:"), row["ratio"] or 0)
    except (ValueError, TypeError):  # of a version that had other options too
        return None


@dataclass(frozen=True)
class Looks:
    """How the methods of a run are drawn: families of this package's by colour, others by their mark."""

    colours: dict[str, str]
    marks: dict[str, str]

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Looks:
        own = list(dict.fromkeys(family(row) for row in rows if not is_peer(row)))
        others = list(dict.fromkeys(family(row) for row in rows if is_peer(row)))
        return cls(
            {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(own)},
            {name: PEERS[i % len(PEERS)] for i, name in enumerate(others)},
        )

    def marker(self, row: dict[str, Any]) -> dict[str, Any]:
        """Larger, the more is fused."""
        size = 4 + 4 * (0.5 if row["ratio"] is None else row["ratio"])
        if is_peer(row):
            return {"color": INK, "marker": self.marks[family(row)], "markersize": size}
        return {"color": self.colours[family(row)], "marker": FORMS[form(row)], "markersize": size}

    def key(self, rows: Sequence[dict[str, Any]]) -> list[Line2D]:
        plain: dict[str, Any] = {"linestyle": "", "markersize": 6}
        forms = {form(row) for row in rows if not is_peer(row)}
        lines = [Line2D([], [], color=colour, marker="o", label=name, **plain) for name, colour in self.colours.items()]
        lines += [
            Line2D([], [], color="gray", marker=mark, label=name, **plain)
            for name, mark in FORMS.items() if name in forms and len(forms) > 1
        ]  # fmt: skip
        return lines + [
            Line2D([], [], color=INK, marker=mark, label=name, **plain) for name, mark in self.marks.items()
        ]


def is_peer(row: dict[str, Any]) -> bool:
    """Whether a method is not this package's alone."""
    return _fusion(row) is None or str(row["method"]).startswith("deepcache:")


def svg(found: dict[str, Any]) -> str:
    """Panels of each cost and metric that the run has. EvalError of fewer than two methods.

    The methods that no other beats in both are joined, and numbered as the list below the panels names them.
    """
    shown = metrics_shown(found)
    costs = [cost for cost in (TIME, FLOPS) if any(len(points(found, cost, m)) > 1 for m in shown)]
    if not costs:
        raise EvalError("a frontier takes two methods with their times or operations, and a metric")
    panels = {(i, j): points(found, cost, metric) for i, metric in enumerate(shown) for j, cost in enumerate(costs)}
    rows = list({p.row["key"]: p.row for drawn in panels.values() for p in drawn}.values())
    fronts = {at: frontier(drawn, shown[at[0]]["lower_is_better"]) for at, drawn in panels.items()}
    best = {p.row["key"]: p for front in fronts.values() for p in front}.values()
    number = {p.row["key"]: i for i, p in enumerate(sorted(best, key=lambda p: p.cost), start=1)}
    looks = Looks.of(rows)
    with plots.style():
        # matplotlib leaves no room for two legends, so the list of numbers is a panel of its own
        figure = Figure(
            figsize=(1.2 + 5.2 * len(costs), 3.9 * len(shown) + 0.17 * len(number) + 0.4), layout="constrained"
        )
        heights = [3.9] * len(shown) + [0.17 * len(number)]
        axes = figure.subplots(len(shown) + 1, len(costs), squeeze=False, height_ratios=heights)
        for (i, j), drawn in panels.items():
            without = len(lacking(found, costs[j]))
            title = costs[j].title + (f"\n({without} not shown for lack of it)" if without else "")
            _panel(axes[i][j], drawn, fronts[i, j], shown[i], title, looks, number)
        for ax in axes[-1]:
            ax.axis("off")
        names = [f"{number[p.row['key']]}  {label(p.row)}" for p in sorted(best, key=lambda p: p.cost)]
        axes[-1][0].text(0, 1, "\n".join(names), va="top", fontsize=8, linespacing=1.4)
        key = [*looks.key(rows), Line2D([], [], color="gray", linewidth=1, label="no other is better in both")]
        axes[-1][-1].legend(
            handles=key, loc="upper right" if len(costs) == 1 else "upper left", ncols=3, frameon=False, fontsize=8
        )
        return plots.svg(figure, fingerprint([point for drawn in panels.values() for point in drawn]))


def fingerprint(drawn: Sequence[Point]) -> str:
    """The beginning of the SHA-256 of what a drawing shows, to six digits: the same number, the same figures."""
    told = [[p.row["key"], *(f"{figure:.6g}" for figure in (p.cost, p.value, p.low, p.high))] for p in drawn]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _panel(
    ax: Axes,
    drawn: Sequence[Point],
    front: Sequence[Point],
    metric: dict[str, Any],
    title: str,
    looks: Looks,
    number: dict[str, int],
) -> None:
    # likenesses crowd below 1: how far they are from it tells them apart
    likeness = "SSIM" in metric["name"] and all(p.high < 1 for p in drawn)
    falling = likeness or metric["lower_is_better"]

    def at(value: float) -> float:
        return 1 - value if likeness else value

    ax.step([p.cost for p in front], [at(p.value) for p in front], where="post", color="gray", linewidth=1, zorder=1)
    for point in drawn:
        ends = [[point.value - point.low], [point.high - point.value]][:: -1 if likeness else 1]
        best = point in front
        ax.errorbar(
            point.cost, at(point.value), yerr=ends, linewidth=0.8, alpha=1 if best else 0.4, zorder=3 if best else 2,
            **looks.marker(point.row),
        )  # fmt: skip
        if best:
            place = (point.cost, at(point.value)), (-5, -5)
            ax.annotate(str(number[point.row["key"]]), *place, textcoords="offset points", ha="right", va="top",
                        fontsize=8, zorder=4)  # fmt: skip
    least, most = min([1.0, *(p.cost for p in drawn)]), max([1.0, *(p.cost for p in drawn)])  # the full model's is 1
    margin = 0.05 * (most - least)
    ax.set_xlim(least - margin, most + margin)
    ax.set_xlabel(title)
    ax.set_ylabel(f"{'1 - ' if likeness else ''}{metric['name']} {'↓' if falling else '↑'}")
    if falling and all(at(p.value) > 0 for p in drawn):
        ax.set_yscale("log")
    plots.bare(ax)


def best(found: dict[str, Any], by: str | None = None) -> tuple[Cost, dict[str, Any], list[Point]]:
    """(a cost, a metric, the methods that no other beats in both): the perceptual metric, and a cost of `COSTS`, or the
    first of them that the run has. EvalError where the run has too little for it."""
    if not metrics_shown(found):
        raise EvalError("a frontier takes LPIPS, MS-SSIM or PSNR, which this run has not measured")
    metric = metrics_shown(found)[0]
    costs = [COSTS[by]] if by else list(COSTS.values())
    cost = next((c for c in costs if len(points(found, c, metric)) > 1), None)
    if cost is None:
        raise EvalError(f"a frontier takes two methods with their {by or 'times or operations'}")
    return cost, metric, frontier(points(found, cost, metric), metric["lower_is_better"])


def markdown(found: dict[str, Any], by: str | None = None) -> str:
    """The methods of `best`, and how to ask for each; below them those that cannot be compared."""
    cost, _, front = best(found, by)
    shown = [m for m in found["metrics"] if "skipped" not in m and (m in metrics_shown(found) or m["name"] == "PSNR")]
    titles = [f"{m['name']} {'↓' if m['lower_is_better'] else '↑'}" for m in shown]
    lines = [f"| method | {cost.title} | speed-up | {' | '.join(titles)} | how |"]
    lines += ["|---|--:|--:|" + "--:|" * len(shown) + "---|"]
    for point in front:
        cells = [f"{point.cost:.3f}", gained(point.row)]
        cells += [short(point.row["metrics"].get(m["name"]), m["digits"]) for m in shown]
        lines.append(f"| {label(point.row)} | {' | '.join(cells)} | {how(point.row)} |")
    shown_rows = {**found, "rows": [point.row for point in front]}
    told = [circumstances(found) + ".", timing(shown_rows), *measured(shown), *flaws(found), *unlike(found)]
    told += [] if front else ["No method costs less than the full model."]
    without = lacking(found, cost)
    told += [f"Not compared, for lack of {cost.name}: {', '.join(without)}."] if without else []
    return "\n".join([*lines, "", *told, "", commands(found)]) + "\n"


def how(row: dict[str, Any]) -> str:
    """The call that fuses as a row's method does; nothing for a peer."""
    fusion = _fusion(row)
    if fusion is None or row["method"].startswith("deepcache"):
        return "–"
    usual = {**vars(TokenFusionConfig()), "ratio": fusion.ratio}
    changed = {name: value for name, value in vars(fusion).items() if value != usual[name]}
    told = [f"{n}={getattr(v, '__name__', v)!r}" for n, v in changed.items()]
    return f"`apply_patch(pipe, {', '.join([f'{fusion.ratio:g}', *told])})`"
