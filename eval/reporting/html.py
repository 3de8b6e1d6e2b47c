"""report.html and grid.png: tables, plots and image pairs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from PIL import Image, ImageChops, ImageDraw, ImageFont

from .. import EvalError
from ..images.merge_maps import FOLDER, fit
from ..images.settings import image_path
from ..methods.method import BASELINE
from . import pareto, pareto_plot, plots
from .footnotes import footnotes, label, run_header
from .tables import table

PAIRS = 10  # shown of each method: the worst and the best
GRID_ROWS = 6
TIMES = ("seconds", "denoiser_seconds", "speedup", "interleaved", "same_run")  # of a row
THUMBNAIL, SMALL, MANY = 512, 160, 8  # pixels at most; SMALL for more methods than MANY, to limit the size of the page
MAPS_WIDTH = 1600  # pixels at most, of an image with its maps
MAGNIFY = 4  # of difference images


def ranking(results: dict[str, Any]) -> dict[str, Any] | None:
    """The metric that pairs are sorted by: the most perceptual one of the run."""
    there = {m["name"]: m for m in results["metrics"] if m.get("per_image") and m["name"] != "class accuracy"}
    names = [name for name in there if name.startswith("LPIPS")] + ["PD-demo", "MS-SSIM", "PSNR"]
    return next((there[name] for name in names if name in there), None)


def worst_first(images: Sequence[dict[str, str]], metric: dict[str, Any] | None) -> list[dict[str, str]]:
    """Pairs by decreasing distance; in their own order without a metric."""
    if metric is None:
        return list(images)
    sign = -1 if metric["lower_is_better"] else 1
    return sorted(images, key=lambda image: sign * float(image[metric["name"]]))


def html(out: Path, results: dict[str, Any], images: list[dict[str, str]]) -> str:
    """The page of a run.

    Args:
        out: the folder with its images.
        results: the content of results.json.
        images: the rows of per_image.csv.
    """
    columns, rows = table(results)
    try:
        cost, by, front = pareto.best(results)
        front_of = f"{cost.title} and {by['name']}"
    except EvalError:  # too few methods
        front, front_of = [], ""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return page.get_template("report.html.j2").render(
        plots=_plots(results, images),
        results=results,
        columns=columns,
        rows=rows,
        sections=_sections(out, results, images),
        ranked_by=ranking(results),
        magnify=MAGNIFY,
        label=label,
        run_header=run_header(results),
        footnotes=footnotes(results),
        many=MANY,
        front={point.row["key"] for point in front},
        front_of=front_of,
    )


def _sections(out: Path, results: dict[str, Any], images: list[dict[str, str]]) -> list[dict[str, Any]]:
    """For each method its worst and best pairs and its merge maps."""
    metric = ranking(results)
    measured = [m for m in results["metrics"] if m.get("per_image")]
    compared = [row for row in results["rows"] if "skipped" not in row and row["key"] != BASELINE.slug]
    side = THUMBNAIL if len(compared) <= MANY else SMALL
    sections = []
    for row in compared:
        own = worst_first([image for image in images if image["key"] == row["key"]], metric)
        worst = own[:PAIRS]
        best = own[max(len(worst), len(own) - PAIRS) :][::-1] if metric else []
        sections.append(
            {
                "row": row,
                "of": len(own),
                "worst": [_pair(out, image, measured, side) for image in worst],
                "best": [_pair(out, image, measured, side) for image in best],
                "maps": _embedded(_open(out / FOLDER / f"{row['key']}.png"), MAPS_WIDTH) if row.get("maps") else None,
            }
        )
    return sections


def _plots(results: dict[str, Any], images: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Title, description and SVG of each plot that the run has enough figures for."""
    try:
        costs: str | None = pareto_plot.svg(results)
    except EvalError:  # too few methods
        costs = None
    plotted = (
        ("Quality against cost", "Each point is a method with the 95 % interval of its metric; the line joins the "
         "Pareto-optimal ones.", costs),
        ("Image by image", "Distribution of the metrics over the images: the box is the middle half, its line the "
         "median, the whiskers 90 %.", plots.distributions(results, images)),
    )  # fmt: skip
    return [{"title": title, "about": about, "svg": markupsafe.Markup(svg)} for title, about, svg in plotted if svg]


def _pair(out: Path, image: dict[str, str], measured: list[dict[str, Any]], side: int) -> dict[str, Any]:
    baseline, own = (_open(image_path(out, key, image["id"])) for key in (BASELINE.slug, image["key"]))
    difference = ImageChops.difference(baseline, own).point(lambda level: min(255, MAGNIFY * level))
    figures = {m["name"]: f"{float(image[m['name']]):.{m['digits']}f}" for m in measured if image[m["name"]]}
    return {
        **image,
        "figures": figures,
        "images": [_embedded(image, side) for image in (baseline, own, difference)],
    }


def grid(out: Path, results: dict[str, Any], images: list[dict[str, str]], first: int) -> Image.Image:
    """The first prompts, a row each; the baseline and the methods, a column each."""
    rows = [row for row in results["rows"] if "skipped" not in row]
    shown = [image for image in images if image["key"] == BASELINE.slug][:first]
    side, gap, head, caption = min(256, results["settings"]["size"]), 8, 28, 20
    width = gap + len(rows) * (side + gap)
    canvas = Image.new("RGB", (width, head + len(shown) * (caption + side + gap)), "white")
    pen, bold, small = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(11)
    for i, row in enumerate(rows):
        pen.text((gap + i * (side + gap), 6), fit(label(row), bold, side), fill="black", font=bold)
    for j, image in enumerate(shown):
        top = head + j * (caption + side + gap)
        pen.text((gap, top + 2), fit(image["prompt"], small, width - 2 * gap), fill="dimgray", font=small)
        for i, row in enumerate(rows):
            tile = _open(image_path(out, row["key"], image["id"])).resize((side, side), Image.Resampling.LANCZOS)
            canvas.paste(tile, (gap + i * (side + gap), top + caption))
    return canvas


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        again = "the same command of eval.run generates it again"
        raise EvalError(f"the image {path.parent.name}/{path.name} {why}: {again}") from error


def _embedded(image: Image.Image, most: int) -> str:
    """A data: URL of the image as JPEG, for viewing only (figures come from the PNGs)."""
    image.thumbnail((most, most))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
