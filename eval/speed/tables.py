"""Tables of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tofu_sd.utils import markdown_table

from .. import EvalError
from ..common import formats
from ..common.cli import choices
from ..common.files import listed
from ..common.schema_changes import SCHEMA
from ..methods.method import BASELINE
from ..reporting import results as report
from ..reporting.footnotes import RECORD
from ..reporting.tables import short, terminal_rows
from .contender import _setups

HOW_TO_READ = (
    "Speed-up above 1×: faster than the baseline; below 1×: slower; with 1 in its interval: no difference shown. "
    "ideal: the upper bound, attention on the kept tokens alone, without matching, merging or unmerging."
)


def read(path: Path) -> dict[str, Any]:
    """Results that were written by --out."""
    found = formats.read(path, formats.BENCH, SCHEMA, "python -m eval.bench --out", path.name)
    rounds = {len(row["samples"]) for row in found["rows"] if "samples" in row}
    if len(rounds) > 1:
        raise EvalError(f"{path.name} is damaged: its rows have {listed(sorted(map(str, rounds)))} samples")
    record = path.parent / RECORD
    if record.exists():
        found["provenance"]["record"] = f"[{path.stem}]({record.as_posix()}#{path.stem})"
    return found


def part(found: dict[str, Any], scopes: str | None, methods: str | None) -> dict[str, Any]:
    """The results with the rows of these scopes and methods, and of full and ideal; all where none are named."""
    rows = found["rows"]
    if scopes:
        known = choices(scopes, sorted({row["scope"] for row in rows}), "scope")
        rows = [row for row in rows if row["scope"] in known]
    if methods:
        known = choices(f"{BASELINE.name},ideal,{methods}", sorted({row["method"] for row in rows}), "method")
        rows = [row for row in rows if row["method"] in known]
    return {**found, "rows": rows}


def quality(folders: Sequence[Path]) -> dict[str, dict[str, str]]:
    """By a method's key, in folders of eval.run: its PSNR and LPIPS with their intervals, and of how many."""
    by_key: dict[str, dict[str, str]] = {}
    for folder in folders:
        found = report.read(folder)[0]
        metrics = [m for m in found["metrics"] if "skipped" not in m and m["name"].startswith(("PSNR", "LPIPS"))]
        for row in found["rows"]:
            figures = {f"{m['name']} {'↓' if m['lower_is_better'] else '↑'}": m for m in metrics}
            own = {title: short(row.get("metrics", {}).get(m["name"]), m["digits"]) for title, m in figures.items()}
            own["n"] = str(found["settings"]["n"])
            by_key.setdefault(row["key"], own)
    return by_key


def markdown(found: dict[str, Any], figures: dict[str, dict[str, str]]) -> str:
    """A table for each setup, for a page; with what each method costs in quality, where that was measured."""
    metrics = list(dict.fromkeys(title for own in figures.values() for title in own if title != "n"))
    shown = [figures[row["key"]]["n"] for row in found["rows"] if row.get("key") in figures]
    lines = []
    for title, rows in _setups(found):
        columns = _columns(rows)
        cells_of_rows = []
        for row in rows:
            costs = [figures.get(row["key"], {}).get(metric, "–") for metric in metrics]
            if "skipped" in row:
                cells = [f"skipped: {row['skipped']}", *[""] * (len(columns) - 1), *costs]
            else:
                cells = [cell(row) for cell in columns.values()] + costs
            cells_of_rows.append([row["method"], *cells])
        lines += [f"**{title}**", "", *markdown_table(["method", *columns, *metrics], cells_of_rows), ""]
        if "ceilings" in rows[0]:
            lines += [ceilings(rows, found["settings"]["ratio"]), ""]
    record = found["provenance"].get("record")
    lines += [run_header(found)]
    if metrics:
        n = " or ".join(sorted(set(shown), key=int))
        lines += [f"PSNR, LPIPS: {n} images of the embedded model, against the baseline under the same seeds."]
    return "\n".join([*lines, *([record] if record else ["", f"`{found['provenance']['command']}`"])]) + "\n"


def terminal(found: dict[str, Any], console: Console) -> None:
    """Prints a table for each setup, and how to read it."""
    for title, rows in _setups(found):
        columns = _columns(rows)
        lines = [
            [
                row["method"],
                *([f"skipped: {row['skipped']}"] if "skipped" in row else (cell(row) for cell in columns.values())),
            ]
            for row in rows
        ]
        terminal_rows(title, ["method", *columns], lines, [], console)
        if "ceilings" in rows[0]:
            console.print(ceilings(rows, found["settings"]["ratio"]), highlight=False, markup=False)
    console.print(run_header(found), style="dim", highlight=False, markup=False)
    console.print(HOW_TO_READ, highlight=False, markup=False)


def ceilings(rows: Sequence[dict[str, Any]], ratio: float) -> str:
    """The most that merging can speed up a step of the whole transformer, by FLOPs."""
    forms = ", ".join(f"{form} {value:.2f}×" for form, value in rows[0]["ceilings"].items())
    return f"Ceilings of a step of the whole model at ratio {ratio:g}, by FLOPs: {forms}."


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """What a table of these rows shows: each column's title, and its text for a row that was measured."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "ms": lambda row: f"{1000 * row['p50']:.1f} ({1000 * row['p20']:.1f}–{1000 * row['p80']:.1f})",
        "speed-up": lambda row: _interval(None if row["method"] == BASELINE.name else row["speedup"], "×"),
        "share of the ideal saving": lambda row: _interval(row["share"]),
        "scratch": lambda row: f"{row['scratch_bytes'] / 2**20:,.0f} MiB" if row["scratch_bytes"] is not None else "–",
    }
    peer = next((row["samples"] for row in rows if row["method"] == PEER and "samples" in row), None)
    if peer:
        columns[f"rounds ahead of {PEER}"] = lambda row: "–" if row["method"] == PEER else _ahead(row["samples"], peer)
    if any(row.get("kernels") is not None for row in rows):
        columns["kernels"] = lambda row: str(row["kernels"])
    return columns


PEER = "tomesd"


def _interval(figure: dict[str, float] | None, unit: str = "") -> str:
    return f"{figure['value']:.2f}{unit} ({figure['low']:.2f}–{figure['high']:.2f})" if figure else "–"


def _ahead(own: Sequence[float], peer: Sequence[float]) -> str:
    """In how many of the rounds, which all rows share, this one was the faster."""
    return f"{sum(a < b for a, b in zip(own, peer, strict=True))} of {len(own)}"


def run_header(found: dict[str, Any]) -> str:
    """One line of provenance, and how to read the columns."""
    s, p = found["settings"], found["provenance"]
    head = f"ratio {s['ratio']:g}, {s['rounds']} interleaved rounds · {s['dtype']} on {s['device']}"
    if p.get("record"):
        return f"{head} · torch {s['torch']} · commit {p['commit'] or 'unknown'}."
    return (
        f"{head} · torch {s['torch']}, diffusers {p['packages'].get('diffusers', 'unknown')} · commit "
        f"{p['commit'] or 'unknown'}. ms: median and 20th to 80th percentile; speed-up, share: of medians, with a 95 % "
        "interval; scratch: the most memory a call holds, its result included."
    )
