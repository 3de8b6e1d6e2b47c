"""Tables of an evaluation of classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from eval import EvalError
from eval.common import formats
from eval.common.schema_changes import SCHEMA
from eval.reporting.footnotes import RECORD
from eval.reporting.tables import known
from tofu_sd.patching.linearity import best_split

from .methods import BASELINE

FRESH = 40  # scenes of each class
CALIBRATION = 64  # images by which thresholds are set; their labels are not used
CURVES = (
    (1.0, 0.0),
    (1.0, 0.1),
    (1.0, 0.5),
    (0.0, 1.0),
)  # of thresholds: their start below 1, and how fast they fall
THRESHOLDS = (
    "ATM: four threshold curves are scaled to ToMe's FLOPs at the same r. The one with the smallest feature shift on "
    "calibration images",
    "is used. Calibration images are not evaluated if at least 64 are left.",
)
RS = [8, 12, 16, 20]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns the median with the 5th and 95th percentile."""
    p5, median, p95 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.05, 0.5, 0.95]).double())
    return {"median": median.item(), "p5": p5.item(), "p95": p95.item()}


def read(out: Path) -> dict[str, Any]:
    """Reads classify.json. EvalError where it is missing or damaged."""
    results = formats.read(out / "classify.json", formats.CLASSIFY, SCHEMA, "research.classifiers.classify", out.name)
    if (out / RECORD).exists():
        results["provenance"]["record"] = f"[{out.name}]({(out / RECORD).as_posix()})"
    if not any(row["method"] == BASELINE.name for row in results["rows"]):
        raise EvalError(
            f"{out.name} holds no results of research.classifiers.classify: there is no row {BASELINE.name!r}"
        )
    if len({len(layers) for layers in results["linearity"]}) > 1:
        raise EvalError(f"{out.name} holds no results of classifiers: linearity has classifiers of unequal depth")
    return results


def select_rows(rows: list[dict[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows with these labels, in this order; all if there are none. The baseline's always comes first."""
    by_label = {row["label"]: row for row in rows}
    return [by_label[label] for label in dict.fromkeys([BASELINE.name, *known("row", labels, list(by_label))])]


def cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns (titles, the cells of each row)."""
    full = next(row for row in results["rows"] if row["method"] == BASELINE.name)
    titles = ["method", "accuracy, %", "feature shift, 10⁻³", "GFLOP / image", "of the baseline's", "tokens left"]
    ahead = any(row["ahead_of_tome"] for row in results["rows"])
    timed = any(row["speedup"] for row in results["rows"])
    titles += ["ahead of tome, %"] * ahead + ["images / s", "speed-up"] * timed
    lines = []
    for row in results["rows"]:
        a, gap = row["accuracy"], row["ahead_of_tome"]
        between = f" ({100 * a['low']:.1f}–{100 * a['high']:.1f})" if a["low"] is not None else ""
        line = [
            row["label"], f"{100 * a['value']:.2f}{between}", _shift(row["feature_shift"]), f"{row['flops'] / 1e9:.3f}",
            f"{row['flops'] / full['flops']:.3f}", f"{row['tokens']:.0f}",
        ]  # fmt: skip
        if ahead:
            sure = f" ({100 * gap['low']:+.2f} to {100 * gap['high']:+.2f})" if gap and gap["low"] is not None else ""
            line.append(f"{100 * gap['value']:+.2f}{sure}" if gap else "–")
        if timed:
            rate, faster = row["images_per_second"], row["speedup"]
            line += [f"{rate['median']:.0f}", f"{faster['median']:.2f}× ({faster['p5']:.2f}–{faster['p95']:.2f})"]
        lines.append(line)
    return titles, lines


def _shift(figure: dict[str, float] | None) -> str:
    if figure is None:
        return "–"
    between = f" ({1e3 * figure['low']:.3g}–{1e3 * figure['high']:.3g})" if figure["low"] is not None else ""
    return f"{1e3 * figure['value']:.3g}{between}"


def linearity_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """Returns (titles, rows, notes): the functional linearity of each layer (ToFu Fig. 3), and the split by it."""
    layers = [list(values) for values in zip(*results["linearity"], strict=True)]
    lines = [
        [str(layer), f"{mean(values):.5f}", f"{min(values):.5f}–{max(values):.5f}"]
        for layer, values in enumerate(layers)
    ]
    d = best_split({layer: mean(values) for layer, values in enumerate(layers)})
    s = results["settings"]
    note = [
        f"Linearity of each layer's {s.get('linearity_of', 'MLP')}, between the five patch tokens that are merged "
        f"first and their survivors; {min(CALIBRATION, s['n'])} images.",
        f"{s['classifiers']} classifiers, torch {s['torch']}, commit {results['provenance']['commit'] or 'unknown'}. "
        f"By the error model of `depth_split='auto'`: d = {d}" + (", average in all layers." if d == 0 else "."),
    ]
    if record := results["provenance"].get("record"):
        note.append(record)
    return ["layer", "functional linearity", "over the classifiers"], lines, note


def notes(results: dict[str, Any]) -> list[str]:
    """Returns the lines below a table: how it was measured."""
    s, p = results["settings"], results["provenance"]
    trained = s["model"]
    if s["seeds"][0] is not None:
        trained += f", {s['classifiers']} classifiers of seeds {', '.join(map(str, s['seeds']))}"
    lines = [
        f"{trained} · {s['n']} images of {s['classes']} classes ({s['data']}), {s['side']} px · "
        f"{s.get('dtype', 'float32')} on {s['device']} · commit {p['commit'] or 'unknown'}.",
        "Accuracy: mean over the classifiers, 95 % interval over classes. Feature shift: 1 - cosine of the last linear "
        "layer's input",
        "to the baseline's, with its 95 % interval. FLOPs: by torch's counter, with matching; tokens: patch tokens "
        "before the last layer.",
    ]
    if any(row["speedup"] for row in results["rows"]):
        lines.append(f"Images / s, speed-up: medians of {s['rounds']} interleaved rounds, 5th to 95th percentile.")
    if s["stress"]:
        tried = "those at which ToMe's patch tokens last to the last layer"  # of files without a list
        if s.get("tried"):
            tried = ", ".join(map(str, s["tried"]))
        lines += [
            "Each method at the largest r at which its accuracy, to a tenth of a percent, is at least the baseline's; "
            f"r of {tried}.",
            *THRESHOLDS,
        ]
    elif any(row["method"].startswith("atm") and row["r"] is not None for row in results["rows"]):
        lines += THRESHOLDS
    return [*lines, *(["", f"`{p['command']}`"] if "record" not in p else [p["record"]])]
