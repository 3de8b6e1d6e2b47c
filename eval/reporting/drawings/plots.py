"""Plots of a report as SVG, deterministic, to embed in a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...methods.method import BASELINE, OTHER_SEEDS
from ..footnotes import label


def style() -> AbstractContextManager[None]:
    """Inside, matplotlib uses the style of all plots."""
    return rc_context({"svg.fonttype": "none", "svg.hashsalt": "tofu_sd", "font.family": "sans-serif", "font.size": 9})


def svg(figure: Figure, of: str | None = None) -> str:
    """The <svg> element of a figure. of: its description, in its metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Description": of})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def bare(ax: Axes) -> None:
    """Removes the frame and adds a light grid."""
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)


def distributions(results: dict[str, Any], images: Sequence[dict[str, str]]) -> str | None:
    """Box plots of each metric over the images, a row for each method; None without any values.

    The box is the middle half, its line the median, the whiskers 90 %.
    """
    metrics = [m for m in results["metrics"] if m.get("per_image") and m["name"] != "class accuracy"]
    rows = [
        row for row in results["rows"] if "skipped" not in row and row["key"] not in (BASELINE.slug, OTHER_SEEDS.slug)
    ]
    by_key = {row["key"]: [image for image in images if image["key"] == row["key"]] for row in rows}
    shown = [m for m in metrics if any(image.get(m["name"]) for own in by_key.values() for image in own)]
    if not rows or not shown:
        return None
    with style():
        figure = Figure(figsize=(2 + 2.6 * len(shown), 1 + 0.28 * len(rows)), layout="constrained")
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for ax, metric in zip(axes, shown, strict=True):
            values = [[float(image[metric["name"]]) for image in by_key[row["key"]]] for row in rows]
            finite = [[value for value in own if abs(value) != float("inf")] for own in values]
            ax.boxplot(
                finite, orientation="horizontal", whis=(5, 95), widths=0.6, patch_artist=True,
                boxprops={"facecolor": "#c5d2fb", "edgecolor": "#3358d4", "linewidth": 0.8},
                medianprops={"color": "#3358d4"}, whiskerprops={"color": "#60646c", "linewidth": 0.8},
                capprops={"visible": False},
                flierprops={"marker": ".", "markersize": 2.5, "markerfacecolor": "#60646c", "markeredgewidth": 0},
            )  # fmt: skip
            ax.set_title(f"{metric['name']} {'↓' if metric['lower_is_better'] else '↑'}", fontsize=9)
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.set_yticks(range(1, 1 + len(rows)), [label(row) for row in rows])
            bare(ax)
        axes[0].invert_yaxis()
        return svg(figure)
