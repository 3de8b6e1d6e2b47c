"""Files in, files out: results.json and per_image.csv, and from them and the pictures report.html, grid.png, tables.

`python -m eval.report OUT` draws the report anew; with --markdown it prints the table for a README instead.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageChops, ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from . import EvalError
from .files import read_json, to_json, write
from .generate import Settings
from .methods import FULL, SCALE
from .score import Scores

SCHEMA = 1
WORST = 12  # pairs of each method in report.html
GRID_ROWS = 6
THUMBNAIL = 512  # pixels, at most
MAGNIFY = 4  # of the difference pictures


# --- writing the figures ---------------------------------------------------------------------------------------------


def results(
    settings: Settings, scores: Scores, metrics: list[dict[str, Any]], provenance: dict[str, Any], of: int
) -> dict[str, Any]:
    """What results.json holds. of: how many pictures the whole list of prompts asks for."""
    n = next(row["n"] for row in scores.rows if "n" in row)
    return {
        "schema": SCHEMA,
        "settings": {**asdict(settings), "n": n, "of": of},
        "metrics": metrics,
        "rows": scores.rows,
        "provenance": provenance,
    }


def save(out: Path, found: dict[str, Any], scores: Scores) -> None:
    """Writes the figures, then everything that is drawn from them."""
    write(out / "results.json", to_json(found))
    names = [metric["name"] for metric in found["metrics"] if metric.get("per_image")]
    table = io.StringIO()
    fields = ["method", "key", "id", "prompt", "seed", "seconds", *names]
    writer = csv.DictWriter(table, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(scores.images)
    write(out / "per_image.csv", table.getvalue())
    draw(out)


def draw(out: Path) -> None:
    """report.html and grid.png from the files in `out`."""
    found, images = read(out)
    write(out / "grid.png", _png(grid(out, found, images)))
    write(out / "report.html", html(out, found, images))


def read(out: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    found = read_json(out / "results.json")
    if found is None:
        raise EvalError(f"{out.name} holds no results.json: python -m eval.run --out {out.name} writes one")
    if found.get("schema") != SCHEMA:
        raise EvalError(f"{out.name}/results.json has schema {found.get('schema')}, this program reads {SCHEMA}")
    with (out / "per_image.csv").open(encoding="utf-8", newline="") as file:
        return found, list(csv.DictReader(file))


# --- the table, once for the terminal, the page and the README -------------------------------------------------------


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


def table(found: dict[str, Any]) -> tuple[list[Column], list[tuple[dict[str, Any], list[Cell]]]]:
    """Columns, and for each row of the results its cells (none for a method that was skipped)."""
    rows = [row for row in found["rows"] if "skipped" not in row]
    columns = [Column("speed-up", "median over batches, full model / method in the same run; 5th to 95th percentile"),
               Column("s/image", "median over batches, whole pipeline; 5th to 95th percentile")]  # fmt: skip
    cells = [[_spread(row["speedup"], 2, "×"), _spread(row["seconds"], 2)] for row in rows]
    if any(row["peak_bytes"] is not None for row in rows):
        columns.append(Column("memory", "peak of a batch over the weights"))
        for row, line in zip(rows, cells, strict=True):
            line.append(Cell("–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"))
    for metric in found["metrics"]:
        if "skipped" in metric:
            continue
        arrow = "↓" if metric["lower_is_better"] else "↑"
        columns.append(Column(f"{metric['name']} {arrow}", metric["implementation"]))
        extent = _extent(rows, metric["name"])
        for row, line in zip(rows, cells, strict=True):
            line.append(_figure(row["metrics"].get(metric["name"]), metric["digits"], extent))
    by_key = {row["key"]: line for row, line in zip(rows, cells, strict=True)}
    return columns, [(row, by_key.get(row["key"], [])) for row in found["rows"]]


def label(row: dict[str, Any]) -> str:
    """A row's name: the method and the ratio of tokens it fuses away."""
    return row["method"] if row["ratio"] is None else f"{row['method']} {100 * row['ratio']:g} %"


def _spread(spread: dict[str, Any] | None, digits: int, unit: str = "") -> Cell:
    if spread is None:
        return Cell("–")
    return Cell(f"{spread['median']:.{digits}f}{unit}", f"{spread['p5']:.{digits}f}–{spread['p95']:.{digits}f}")


def _figure(figure: dict[str, Any] | None, digits: int, extent: tuple[float, float] | None) -> Cell:
    if figure is None:
        return Cell("–")
    equal = figure.get("infinite", 0)
    if figure["value"] is None:
        return Cell("∞" if equal else "–")
    value, notes, bar = f"{figure['value']:.{digits}f}", [], None
    if figure["low"] is not None:
        notes.append(f"{figure['low']:.{digits}f}–{figure['high']:.{digits}f}")
        if extent is not None:
            a, b = extent
            low, high, at = (min(1.0, max(0.0, (figure[k] - a) / (b - a))) for k in ("low", "high", "value"))
            bar = (low, high, at) if a <= figure["value"] <= b else None
    if equal:
        notes.append(f"{equal} equal")
    return Cell(value, ", ".join(notes), bar)


def _extent(rows: list[dict[str, Any]], metric: str) -> tuple[float, float] | None:
    """The range of a metric over the methods' intervals; the rows that are there for scale do not stretch it."""
    methods = [row["metrics"].get(metric) for row in rows if row["key"] not in (FULL.key, SCALE.key)]
    figures = [f for f in methods if f and f["low"] is not None]
    if len(figures) < 2:
        return None
    low, high = min(f["low"] for f in figures), max(f["high"] for f in figures)
    return (low, high) if high > low else None


def circumstances(found: dict[str, Any]) -> str:
    """One line without which the figures mean nothing."""
    s, p = found["settings"], found["provenance"]
    parts = [
        f"{s['model']}, {s['n']} pictures" + (f" of {s['of']}" if s["n"] < s["of"] else ""),
        f"prompts {s['prompts']}, seeds from {s['seed']}",
        f"{s['steps']} {'step' if s['steps'] == 1 else 'steps'}, {s['size']} px, guidance {'default' if s['guidance'] is None else s['guidance']}, "
        f"batch {s['batch']}",
        f"{s['dtype']} on {s['device']}",
        f"torch {s['torch']}, diffusers {s['diffusers']}",
        f"commit {p['commit'] or 'unknown'}",
    ]
    return " · ".join(parts)


def notes(found: dict[str, Any]) -> list[str]:
    """What has to be said below the table."""
    lines = ["Against the full model's pictures under the same seeds; intervals of the metrics: 95 %."]
    lines += ["; ".join(f"{m['name']}: {m['implementation']}" for m in found["metrics"] if "skipped" not in m) + "."]
    lines += [f"{m['name']}: skipped: {m['skipped']}" for m in found["metrics"] if "skipped" in m]
    lines += [f"{label(row)}: skipped: {row['skipped']}" for row in found["rows"] if "skipped" in row]
    lines += [
        f"{label(row)}: {row['blank']} of {row['n']} pictures are one flat colour"
        for row in found["rows"]
        if row.get("blank")
    ]
    lines += [
        f"{label(row)}: no speed-up, its pictures were not made in one run with the full model's"
        for row in found["rows"]
        if "skipped" not in row and row["speedup"] is None
    ]
    lines += _small_sets(found)
    if all(row.get("peak_bytes") is None for row in found["rows"]):
        lines.append(
            f"Memory by method: n/a off CUDA; the whole process used {found['provenance']['process_mib']:,} MiB."
        )
    return lines


def _small_sets(found: dict[str, Any]) -> list[str]:
    """A set distance from fewer pictures than features is biased upwards: compare it at equal n only."""
    small = {
        name: (figure["n"], figure["features"])
        for row in found["rows"]
        for name, figure in row.get("metrics", {}).items()
        if figure.get("features", 0) > figure["n"]
    }
    return [
        f"{name}: from n={n} pictures in {width} dimensions; biased, to be compared at this n only"
        for name, (n, width) in small.items()
    ]


def terminal(found: dict[str, Any], console: Console) -> None:
    columns, rows = table(found)
    drawn = RichTable(title=f"{found['settings']['model']}: methods against the full model", box=SIMPLE_HEAD)
    drawn.add_column("method")
    for column in columns:
        drawn.add_column(column.title, justify="right")
    for row, cells in rows:
        # the space lets an interval break where the terminal is narrow
        texts = [Text.assemble(c.value, "\n", (c.interval.replace("–", " – "), "dim")) for c in cells]
        drawn.add_row(label(row), *(texts or [Text("skipped", "dim")]))
    console.print(drawn)
    for line in (circumstances(found), *notes(found)):
        console.print(line, style="dim", highlight=False, markup=False)


def markdown(found: dict[str, Any]) -> str:
    """The table for a README, with its circumstances and the command that made it."""
    columns, rows = table(found)
    lines = [
        "| method | " + " | ".join(column.title for column in columns) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    for row, cells in rows:
        texts = [f"{c.value} ({c.interval})" if c.interval else c.value for c in cells]
        lines.append(f"| {label(row)} | {' | '.join(texts or ['skipped'] * len(columns))} |")
    lines += ["", circumstances(found) + ".", *notes(found), "", f"`{found['provenance']['command']}`"]
    return "\n".join(lines) + "\n"


# --- pictures --------------------------------------------------------------------------------------------------------


def ranking(found: dict[str, Any]) -> dict[str, Any] | None:
    """The metric that pairs are sorted by: the most perceptual one there is."""
    there = {m["name"]: m for m in found["metrics"] if m.get("per_image") and m["name"] != "classed as asked"}
    names = [name for name in there if name.startswith("LPIPS")] + ["PD-judge", "MS-SSIM", "PSNR"]
    return next((there[name] for name in names if name in there), None)


def worst_first(images: Sequence[dict[str, str]], metric: dict[str, Any] | None) -> list[dict[str, str]]:
    """Pairs by falling distance; in their own order where nothing was measured."""
    if metric is None:
        return list(images)
    sign = -1 if metric["lower_is_better"] else 1
    return sorted(images, key=lambda image: sign * float(image[metric["name"]]))


def html(out: Path, found: dict[str, Any], images: list[dict[str, str]]) -> str:
    columns, rows = table(found)
    metric = ranking(found)
    measured = [m for m in found["metrics"] if m.get("per_image")]
    sections = []
    for row in found["rows"]:
        if "skipped" in row or row["key"] == FULL.key:
            continue
        own = worst_first([image for image in images if image["key"] == row["key"]], metric)
        sections.append({"row": row, "of": len(own), "pairs": [_pair(out, image, measured) for image in own[:WORST]]})
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return page.get_template("report.html.j2").render(
        found=found, columns=columns, rows=rows, sections=sections, ranked_by=metric, magnify=MAGNIFY,
        label=label, circumstances=circumstances(found), notes=notes(found),
    )  # fmt: skip


def _pair(out: Path, image: dict[str, str], measured: list[dict[str, Any]]) -> dict[str, Any]:
    full, own = (_open(out / key / f"{image['id']}.png") for key in (FULL.key, image["key"]))
    difference = ImageChops.difference(full, own).point(lambda level: min(255, MAGNIFY * level))
    figures = {m["name"]: f"{float(image[m['name']]):.{m['digits']}f}" for m in measured if image[m["name"]]}
    return {**image, "figures": figures, "pictures": [_embedded(picture) for picture in (full, own, difference)]}


def grid(out: Path, found: dict[str, Any], images: list[dict[str, str]]) -> Image.Image:
    """The first prompts, a row each; the full model and the methods, a column each."""
    rows = [row for row in found["rows"] if "skipped" not in row]
    shown = [image for image in images if image["key"] == FULL.key][:GRID_ROWS]
    side, gap, head, caption = min(256, found["settings"]["size"]), 8, 28, 20
    width = gap + len(rows) * (side + gap)
    picture = Image.new("RGB", (width, head + len(shown) * (caption + side + gap)), "white")
    pen, bold, small = ImageDraw.Draw(picture), ImageFont.load_default(15), ImageFont.load_default(11)
    for i, row in enumerate(rows):
        pen.text((gap + i * (side + gap), 6), _fit(label(row), bold, side), fill="black", font=bold)
    for j, image in enumerate(shown):
        top = head + j * (caption + side + gap)
        pen.text((gap, top + 2), _fit(image["prompt"], small, width - 2 * gap), fill="dimgray", font=small)
        for i, row in enumerate(rows):
            tile = _open(out / row["key"] / f"{image['id']}.png").resize((side, side), Image.Resampling.LANCZOS)
            picture.paste(tile, (gap + i * (side + gap), top + caption))
    return picture


def _fit(text: str, font: Any, width: int) -> str:
    """The text, cut to this width in pixels."""
    text = " ".join(text.split())
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _embedded(image: Image.Image) -> str:
    """A data: address of the picture: JPEG, for the eye alone (figures come from the PNGs)."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description="Draw the report of a run anew.")
    parser.add_argument("out", type=Path, help="folder that eval.run wrote")
    parser.add_argument("--markdown", action="store_true", help="print the table for a README, write nothing")
    options = parser.parse_args(argv)
    try:
        if options.markdown:
            print(markdown(read(options.out)[0]), end="")
        else:
            draw(options.out)
            print(f"wrote {options.out / 'report.html'} and {options.out / 'grid.png'}", file=sys.stderr)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
