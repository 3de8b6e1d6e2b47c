"""report.html and grid.png: tables, plots and image pairs."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from PIL import Image

from .. import EvalError
from ..images.merge_maps import FOLDER
from ..images.settings import image_path
from ..methods.method import BASELINE
from . import pareto
from .drawings import pareto_plot, plots
from .drawings.pictures import MAGNIFY, difference, open_image, ranking, worst_first
from .footnotes import footnotes, label, run_header
from .tables import table

PAIRS = 10  # shown of each method: the worst and the best
TIMES = ("seconds", "denoiser_seconds", "speedup", "interleaved", "same_run")  # of a row
THUMBNAIL, SMALL, MANY = 512, 160, 8  # pixels at most; SMALL for more methods than MANY, to limit the size of the page
MAPS_WIDTH = 1600  # pixels at most, of an image with its maps


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
                "maps": _embedded(open_image(out / FOLDER / f"{row['key']}.png"), MAPS_WIDTH)
                if row.get("maps")
                else None,
            }
        )
    return sections


def _maps(out: Path, row: dict[str, Any]) -> Path:
    return out / FOLDER / f"{row['key']}.png"


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
    baseline, own = (open_image(image_path(out, key, image["id"])) for key in (BASELINE.slug, image["key"]))
    figures = {m["name"]: f"{float(image[m['name']]):.{m['digits']}f}" for m in measured if image[m["name"]]}
    return {
        **image,
        "figures": figures,
        "images": [_embedded(image, side) for image in (baseline, own, difference(baseline, own))],
    }


def _embedded(image: Image.Image, most: int) -> str:
    """A data: URL of the image as JPEG, for viewing only (figures come from the PNGs)."""
    image.thumbnail((most, most))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
