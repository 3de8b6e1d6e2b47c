"""Formats the results of a run as tables for the terminal and for pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from tofu_sd.utils import did_you_mean, markdown_table

from .. import EvalError
from ..methods.method import BASELINE, OTHER_SEEDS
from ..metrics import statistics
from .footnotes import (
    batch_warnings,
    commands,
    footnotes,
    image_warnings,
    label,
    measured,
    records,
    run_header,
    with_unique_labels,
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    title: str
    about: str = ""


@dataclass(frozen=True)
class Cell:
    """value and the interval below it. bar: (from, to, at) in 0..1 of the column's range, for a drawing."""

    value: str
    interval: str = ""
    bar: tuple[float, float, float] | None = None

    def __str__(self) -> str:
        return f"{self.value} ({self.interval})" if self.interval else self.value


def table(results: dict[str, Any]) -> tuple[list[Column], list[tuple[dict[str, Any], list[Cell]]]]:
    """Columns, and for each row of the results its cells (none for a method that was skipped)."""
    rows = [row for row in results["rows"] if "skipped" not in row]
    columns = [Column("speed-up", "median over batches, baseline / method; 5th to 95th percentile"),
               Column("s/image", "median over batches, whole pipeline; 5th to 95th percentile")]  # fmt: skip
    cells = [[_spread(row["speedup"], 2, "×"), _spread(_of_one_run(row, "seconds"), 2)] for row in rows]
    if any(row.get("denoiser_seconds") for row in rows):
        columns.append(Column("s in model", "of s/image; median over batches, 5th to 95th percentile"))
        for row, line in zip(rows, cells, strict=True):
            line.append(_spread(_of_one_run(row, "denoiser_seconds"), 2))
    if any(row.get("flops") for row in rows):
        columns.append(Column("TFLOP/image", "of matrices and convolutions, by torch's counter"))
        for row, line in zip(rows, cells, strict=True):
            line.append(Cell("–" if row.get("flops") is None else f"{row['flops'] / 1e12:.3f}"))
    if any(row["peak_bytes"] is not None for row in rows):
        columns.append(Column("memory", "peak of a batch over the weights"))
        for row, line in zip(rows, cells, strict=True):
            line.append(Cell("–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"))
    for metric in results["metrics"]:
        if "skipped" in metric:
            continue
        arrow = "↓" if metric["lower_is_better"] else "↑"
        columns.append(Column(f"{metric['name']} {arrow}", metric["implementation"]))
        extent = _extent(rows, metric["name"])
        for row, line in zip(rows, cells, strict=True):
            line.append(_figure(row["metrics"].get(metric["name"]), metric["digits"], extent))
    by_key = {row["key"]: line for row, line in zip(rows, cells, strict=True)}
    return columns, [(row, by_key.get(row["key"], [])) for row in results["rows"]]


def short(figure: dict[str, Any] | None, digits: int) -> str:
    """A metric's figure with its interval, in a cell of another table."""
    return str(_figure(figure, digits, None))


def gained(row: dict[str, Any]) -> str:
    """A row's speed-up with its percentiles."""
    return str(_spread(row["speedup"], 2, "×"))


def spent(row: dict[str, Any]) -> str:
    """A row's seconds per image with their percentiles."""
    return str(_spread(_of_one_run(row, "seconds"), 2))


def _of_one_run(row: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Seconds of a row, unless they are of another run than the baseline's: no time to read beside others. Older runs
    have no speed-up then."""
    alone = row["speedup"] is None or row.get("same_run") is False
    return None if alone else row.get(name)


def _spread(spread: dict[str, Any] | None, digits: int, unit: str = "") -> Cell:
    if spread is None:
        return Cell("–")
    return Cell(f"{spread['median']:.{digits}f}{unit}", f"{spread['p5']:.{digits}f}–{spread['p95']:.{digits}f}")


def _figure(figure: dict[str, Any] | None, digits: int, extent: tuple[float, float] | None) -> Cell:
    if figure is None:
        return Cell("–")
    equal = figure.get("infinite", 0)
    if figure["value"] is None:
        return Cell("∞" if equal else "–", f"{figure['nan']} NaN" if figure.get("nan") else "")
    value, footnotes, bar = f"{figure['value']:.{digits}f}", [], None
    if figure["low"] is not None:
        footnotes.append(f"{figure['low']:.{digits}f}–{figure['high']:.{digits}f}")
        if extent is not None:
            a, b = extent
            low, high, at = (min(1.0, max(0.0, (figure[k] - a) / (b - a))) for k in ("low", "high", "value"))
            bar = (low, high, at) if a <= figure["value"] <= b else None
    if equal:
        footnotes.append(f"{equal} equal")
    if figure.get("nan"):
        footnotes.append(f"{figure['nan']} NaN")
    return Cell(value, ", ".join(footnotes), bar)


def _extent(rows: list[dict[str, Any]], metric: str) -> tuple[float, float] | None:
    """The range of a metric over the methods' intervals; the rows that are there for scale do not stretch it."""
    methods = [row["metrics"].get(metric) for row in rows if row["key"] not in (BASELINE.slug, OTHER_SEEDS.slug)]
    figures = [f for f in methods if f and f["low"] is not None]
    if len(figures) < 2:
        return None
    low, high = min(f["low"] for f in figures), max(f["high"] for f in figures)
    return (low, high) if high > low else None


def planned(plan: dict[str, Any]) -> list[str]:
    """Lines about what a run would generate."""
    s = plan["settings"]
    head = f"{s['model']}, {s['size']} px, {s['steps']} steps, {s['dtype']} on {s['device']} -> {plan['out']}"
    return [
        head,
        *(f"  {m['key']}: {m['images']} images, {m['existing']} of them generated before" for m in plan["methods"]),
    ]


LONG_NAME = 17  # of a method, in the terminal: longer ones are folded


def terminal(results: dict[str, Any], console: Console) -> None:
    """Prints the table of a run."""
    results = with_unique_labels(results)
    columns, rows = table(results)
    lines = [[label(row), *(map(str, cells) if cells else ["skipped"])] for row, cells in rows]
    title = f"{results['settings']['model']}: methods against the baseline"
    notes = [run_header(results), *footnotes(results)]
    terminal_rows(title, ["method", *(column.title for column in columns)], lines, notes, console)


def _headings(titles: Sequence[str], texts: Sequence[Sequence[str]], room: int) -> list[tuple[str, int | None]]:
    """The headings of columns and their widths, so that no word breaks. Widths are None where there is no room for it.

    Args:
        titles: of the columns. They break at spaces; where the room is narrow, also after "/" and "-".
        texts: what each column holds; it breaks at spaces.
        room: the sum of the widths.
    """
    broken = [re.sub(r"(?<=[/-])(?=\w)", "\n", title) for title in titles]
    for headings in (titles, broken):
        columns = [[heading, *own] for heading, own in zip(headings, texts, strict=True)]
        widths = [max(len(word) for text in column for word in text.split()) for column in columns]
        wanted = [max(len(line) for text in column for line in text.split("\n")) for column in columns]
        spare = room - sum(widths)
        if spare >= 0:
            for i in sorted(range(len(widths)), key=lambda i: wanted[i] - widths[i]):
                if wanted[i] - widths[i] <= spare:  # the column that lacks least comes first
                    spare -= wanted[i] - widths[i]
                    widths[i] = wanted[i]
            return list(zip(headings, widths, strict=True))
    return [(title, None) for title in titles]


def markdown_rows(
    titles: Sequence[str], lines: Sequence[Sequence[str]], footnotes: Sequence[str], left: int = 1
) -> str:
    """A table for a page, with lines below it; the first `left` columns are left-aligned."""
    return "\n".join([*markdown_table(titles, lines, left), "", *footnotes]) + "\n"


def terminal_rows(
    title: str,
    titles: Sequence[str],
    lines: Sequence[Sequence[str]],
    footnotes: Sequence[str],
    console: Console,
    left: int = 1,
) -> None:
    """Prints a table in the terminal, with lines below it; figures have their intervals below them.

    Args:
        title: above the table; "" for none.
        titles: of the columns.
        lines: the cells of each row. A row with fewer cells is one that was skipped.
        footnotes: lines below the table.
        console: where it is printed.
        left: how many columns, from the first, are left-aligned.
    """
    drawn = RichTable(title=title or None, box=SIMPLE_HEAD)
    cells = [[_below(cell) if i >= left else Text(cell) for i, cell in enumerate(line)] for line in lines]
    columns = [[line[i].plain for line in cells if len(line) == len(titles)] for i in range(len(titles))]
    room = console.width - 1 - 3 * len(titles)  # 3: margins of a column
    longest = max((len(line[0]) for line in lines), default=0)
    for name in dict.fromkeys((longest, min(longest, LONG_NAME))):
        headings = _headings(titles[1:], columns[1:], room - name)
        if headings and headings[0][1] is not None:
            break
    for i, (heading, width) in enumerate([(titles[0], name), *headings]):
        drawn.add_column(heading, justify="left" if i < left else "right", overflow="fold", width=width)
    for line in cells:
        drawn.add_row(
            *(line if len(line) == len(titles) else [line[0], *(Text(cell.plain, "dim") for cell in line[1:])])
        )
    console.print(drawn)
    for note in footnotes:
        console.print(note, style="dim", highlight=False, markup=False)


def _below(text: str) -> Text:
    """A figure with its interval below it, which can break at its dash where the terminal is narrow."""
    figure, opened, interval = text.partition(" (")
    shown = interval.removesuffix(")").replace("–", " – ")
    return Text.assemble(figure, "\n", (shown, "dim")) if opened else Text(figure)


def with_rows(results: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """The results with these rows alone, in this order; all of them where none are named."""
    rows = {label(row): row for row in results["rows"]}
    return {**results, "rows": [rows[name] for name in known("row", labels, list(rows))], "full": baseline_row(results)}


def baseline_row(results: dict[str, Any]) -> dict[str, Any]:
    """The baseline's row, whether or not it is among those that are shown."""
    row: dict[str, Any] = results.get("full") or next(row for row in results["rows"] if row["key"] == BASELINE.slug)
    return row


def markdown(results: dict[str, Any], columns: Sequence[str] = ()) -> str:
    """The table for a page, with its provenance.

    columns: the titles of those to show, without the arrow; all where none are named.
    """
    all_columns, rows = table(results)
    titles = [column.title.rstrip(" ↓↑") for column in all_columns]
    chosen = [titles.index(title) for title in known("column", columns, titles)]
    lines = [[label(row), *(str(cells[i]) if cells else "skipped" for i in chosen)] for row, cells in rows]
    shown = {titles[i] for i in chosen}
    metrics = [m for m in results["metrics"] if not columns or m["name"] in shown or "skipped" in m]
    below = [run_header(results) + ".", *footnotes({**results, "metrics": metrics}, shown if columns else None)]
    below += [*([] if records(results) else [""]), commands(results)]
    return markdown_rows(["method", *(all_columns[i].title for i in chosen)], lines, below)


def known(what: str, asked: Sequence[str], there: Sequence[str]) -> Sequence[str]:
    """The requested names, or all. EvalError for an unknown one."""
    for name in asked:
        if name not in there:
            raise EvalError(f"this run has no {what} {name!r}{did_you_mean(name, there)}; it has {', '.join(there)}")
    return asked or there


def markdown_against(results: dict[str, Any], images: Sequence[dict[str, str]], base: str) -> str:
    """Each method minus `base` (a label or a key), image by image, so that what is hard for both cancels out.

    The intervals of two rows of `markdown` can overlap although one method is better on nearly every image.
    """
    names = {row["key"]: label(row) for row in results["rows"] if "skipped" not in row}
    methods = [key for key in names if key not in (BASELINE.slug, OTHER_SEEDS.slug)]
    if base not in methods:
        base = next((key for key in methods if names[key] == base), base)
    if base not in methods:
        known = [names[key] for key in methods]
        raise EvalError(f"this run has no method {base!r}{did_you_mean(base, known)}; it has {', '.join(known)}")
    metrics = [m for m in results["metrics"] if m.get("per_image")]
    titles = [f"Δ {m['name']} {'↓' if m['lower_is_better'] else '↑'}" for m in metrics]
    reference = {image["id"]: image for image in images if image["key"] == base}
    lines = []
    for key in (key for key in methods if key != base):
        own = [image for image in images if image["key"] == key]
        lines.append([names[key], *(paired_difference(own, reference, metric) for metric in metrics)])
    below = [f"Each method minus {names[base]} on the same image: mean and its 95 % interval.", ""]
    below += [run_header(results) + ".", *image_warnings(results), *batch_warnings(results)]
    below += [commands(results)] if records(results) else measured(metrics)
    return markdown_rows(["method", *titles], lines, below)


def paired_difference(
    own: Sequence[dict[str, str]], reference: dict[str, dict[str, str]], metric: dict[str, Any]
) -> str:
    """The mean of own minus reference on the same images, by their ids, with its 95 % interval."""
    name, digits = metric["name"], metric["digits"]
    mean, interval, n = statistics.paired_difference(
        {image["id"]: float(image[name]) for image in own},
        {key: float(image[name]) for key, image in reference.items()},
        {image["id"]: image["prompt"] for image in own},
    )
    if not n:
        return "–"
    between = f" ({interval[0]:+.{digits}f} to {interval[1]:+.{digits}f})" if interval else ""
    return f"{mean:+.{digits}f}{between}" + (f", {n} of {len(own)} images" if n < len(own) else "")
