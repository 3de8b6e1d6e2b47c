"""Plot of quality against cost, with the Pareto-optimal methods."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ... import EvalError
from ...methods.registry import outer_and_inner
from ..footnotes import label
from ..pareto import FLOPS, TIME, Cost, Point, fusion_of, metrics_shown, pareto, points, without_cost
from . import plots

FORMS = {"merged": "o", "with log n (+p)": "^", "keys and values (kv:)": "s", "both": "D"}
COLOURS = ("#3358d4", "#d6409f", "#30a46c", "#f76b15", "#8e4ec6", "#12a594", "#978365", "#60646c")
PEERS = "XP*vpdh<>"  # a mark for each of the other methods, in INK
INK = "#1c2024"


def family(row: dict[str, Any]) -> str:
    """The name of a method without its options."""
    return str(row["method"]).replace("kv:", "").partition("@")[0].partition("+")[0]


def form(row: dict[str, Any]) -> str:
    """The key of FORMS that a method has."""
    fusion = fusion_of(row)
    return list(FORMS)[2 * fusion.kv_only + fusion.proportional if fusion else 0]


@dataclass(frozen=True)
class Looks:
    """The colours and marks of methods: those of this package by colour, others by mark."""

    colours: dict[str, str]
    marks: dict[str, str]

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Looks:
        """The looks of these rows."""
        own = list(dict.fromkeys(family(row) for row in rows if not is_peer(row)))
        others = list(dict.fromkeys(family(row) for row in rows if is_peer(row)))
        return cls(
            {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(own)},
            {name: PEERS[i % len(PEERS)] for i, name in enumerate(others)},
        )

    def marker(self, row: dict[str, Any]) -> dict[str, Any]:
        """The marker of a method, larger for higher ratios."""
        size = 4 + 4 * (0.5 if row["ratio"] is None else row["ratio"])
        if is_peer(row):
            return {"color": INK, "marker": self.marks[family(row)], "markersize": size}
        return {"color": self.colours[family(row)], "marker": FORMS[form(row)], "markersize": size}

    def legend(self, rows: Sequence[dict[str, Any]]) -> list[Line2D]:
        """The handles of the legend."""
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
    """Whether a method is, or contains, someone else's."""
    return fusion_of(row) is None or outer_and_inner(row["method"])[0] is not None


@dataclass(frozen=True)
class Panels:
    """What a plot shows: a panel for each metric (row) and cost (column).

    Args:
        metrics: of the rows.
        costs: of the columns.
        points: of each panel, by (row, column).
        fronts: the Pareto-optimal ones of these.
        numbers: of the Pareto-optimal methods, by slug, in the order of the list below the panels.
        names: of that list.
    """

    metrics: list[dict[str, Any]]
    costs: list[Cost]
    points: dict[tuple[int, int], list[Point]]
    fronts: dict[tuple[int, int], list[Point]]
    numbers: dict[str, int]
    names: list[str]

    @classmethod
    def of(cls, results: dict[str, Any]) -> Panels:
        """The panels of a run. EvalError for fewer than two methods."""
        metrics = metrics_shown(results)
        costs = [cost for cost in (TIME, FLOPS) if any(len(points(results, cost, m)) > 1 for m in metrics)]
        if not costs:
            raise EvalError("a Pareto plot needs two methods with their times or FLOPs, and a metric")
        shown = {(i, j): points(results, cost, m) for i, m in enumerate(metrics) for j, cost in enumerate(costs)}
        fronts = {at: pareto(own, metrics[at[0]]["lower_is_better"]) for at, own in shown.items()}
        unique = {p.row["key"]: p for front in fronts.values() for p in front}.values()
        optimal = sorted(unique, key=lambda p: p.cost)
        numbers = {p.row["key"]: i for i, p in enumerate(optimal, start=1)}
        return cls(
            metrics, costs, shown, fronts, numbers, [f"{numbers[p.row['key']]}  {label(p.row)}" for p in optimal]
        )


def svg(results: dict[str, Any]) -> str:
    """Plot of each cost and metric of a run. EvalError for fewer than two methods.

    A line joins the Pareto-optimal methods, and their numbers refer to the list below the panels.
    """
    panels = Panels.of(results)
    rows = list({p.row["key"]: p.row for own in panels.points.values() for p in own}.values())
    looks = Looks.of(rows)
    num_rows, num_columns = len(panels.metrics), len(panels.costs)
    list_height = 0.17 * len(panels.names)
    with plots.style():
        size = (1.2 + 5.2 * num_columns, 3.9 * num_rows + list_height + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        # matplotlib has no room for two legends, so the list of numbers is a panel of its own
        heights = [3.9] * num_rows + [list_height]
        axes = figure.subplots(num_rows + 1, num_columns, squeeze=False, height_ratios=heights)
        for i, j in panels.points:
            cost = panels.costs[j]
            missing = len(without_cost(results, cost))
            axes[i][j].set_xlabel(cost.title + (f"\n({missing} not shown: not measured)" if missing else ""))
            _panel(axes[i][j], panels, (i, j), looks)
        for ax in axes[-1]:
            ax.axis("off")
        axes[-1][0].text(0, 1, "\n".join(panels.names), va="top", fontsize=8, linespacing=1.4)
        handles = [*looks.legend(rows), Line2D([], [], color="gray", linewidth=1, label="Pareto-optimal")]
        place = "upper right" if num_columns == 1 else "upper left"
        axes[-1][-1].legend(handles=handles, loc=place, ncols=3, frameon=False, fontsize=8)
        return plots.svg(figure, fingerprint([point for own in panels.points.values() for point in own]))


def fingerprint(shown: Sequence[Point]) -> str:
    """The first digits of the SHA-256 of all figures in a plot, to six digits each."""
    figures = [[p.row["key"], *(f"{figure:.6g}" for figure in (p.cost, p.value, p.low, p.high))] for p in shown]
    return hashlib.sha256(json.dumps(figures).encode()).hexdigest()[:16]


def _panel(ax: Axes, panels: Panels, at: tuple[int, int], looks: Looks) -> None:
    """Plots one cost and metric."""
    shown, front, metric = panels.points[at], panels.fronts[at], panels.metrics[at[0]]
    # similarities crowd below 1, where their distance from it distinguishes them
    is_similarity = "SSIM" in metric["name"] and all(p.high < 1 for p in shown)
    falling = is_similarity or metric["lower_is_better"]

    def y(value: float) -> float:
        return 1 - value if is_similarity else value

    ax.step([p.cost for p in front], [y(p.value) for p in front], where="post", color="gray", linewidth=1, zorder=1)
    for point in shown:
        errors = [[point.value - point.low], [point.high - point.value]][:: -1 if is_similarity else 1]
        is_optimal = point in front
        ax.errorbar(
            point.cost, y(point.value), yerr=errors, linewidth=0.8, alpha=1 if is_optimal else 0.4,
            zorder=3 if is_optimal else 2, **looks.marker(point.row),
        )  # fmt: skip
        if is_optimal:
            place = (point.cost, y(point.value)), (-5, -5)
            ax.annotate(str(panels.numbers[point.row["key"]]), *place, textcoords="offset points", ha="right",
                        va="top", fontsize=8, zorder=4)  # fmt: skip
    costs = [1.0, *(p.cost for p in shown)]  # the baseline's is 1
    margin = 0.05 * (max(costs) - min(costs))
    ax.set_xlim(min(costs) - margin, max(costs) + margin)
    ax.set_ylabel(f"{'1 - ' if is_similarity else ''}{metric['name']} {'↓' if falling else '↑'}")
    if falling and all(y(p.value) > 0 for p in shown):
        ax.set_yscale("log")
    plots.bare(ax)
