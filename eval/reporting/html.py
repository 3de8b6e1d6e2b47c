"""Writes report.html: tables, plots and image pairs."""

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
from ..methods.method import BASELINE
from . import pareto as frontier
from . import plots
from .tables import circumstances, label, notes, table

PAIRS = 10  # the worst and the best of each method
GRID_ROWS = 6
TIMES = ("seconds", "denoising", "speedup", "beside", "of_one_run")  # of a row
THUMBNAIL, SMALL, MANY = 512, 160, 8  # pixels, at most; small ones for more methods than so many: a page must open
THREE = 1600  # of three pictures side by side
MAGNIFY = 4  # of the difference pictures


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
    compared = [row for row in found["rows"] if "skipped" not in row and row["key"] != BASELINE.slug]
    side = THUMBNAIL if len(compared) <= MANY else SMALL
    for row in compared:
        own = worst_first([image for image in images if image["key"] == row["key"]], metric)
        worst = own[:PAIRS]
        best = own[max(len(worst), len(own) - PAIRS) :][::-1] if metric else []
        pairs = [[_pair(out, image, measured, side) for image in some] for some in (worst, best)]
        merged = _embedded(_open(out / FOLDER / f"{row['key']}.png"), THREE) if row.get("maps") else None
        sections.append({"row": row, "of": len(own), "worst": pairs[0], "best": pairs[1], "maps": merged})
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    try:
        costs: str | None = frontier.svg(found)
        cost, by, front = frontier.best(found)
    except EvalError:  # too few methods for one
        costs, front = None, []
    drawn = [
        {"title": title, "about": about, "svg": markupsafe.Markup(svg)}
        for title, about, svg in (
            ("Quality against cost", "Each point a method, with the 95 % interval of its metric; the line joins those "
             "that no other beats in both.", costs),
            ("Picture by picture", "How the metrics are spread over the pictures: the box holds the middle half, its "
             "line the median, the whiskers 90 %.", plots.distributions(found, images)),
        )
        if svg
    ]  # fmt: skip
    return page.get_template("report.html.j2").render(
        plots=drawn, found=found, columns=columns, rows=rows, sections=sections, ranked_by=metric, magnify=MAGNIFY,
        label=label, circumstances=circumstances(found), notes=notes(found), many=MANY,
        front={point.row["key"] for point in front}, front_of=f"{cost.title} and {by['name']}" if front else "",
    )  # fmt: skip


def _pair(out: Path, image: dict[str, str], measured: list[dict[str, Any]], side: int) -> dict[str, Any]:
    full, own = (_open(out / key / f"{image['id']}.png") for key in (BASELINE.slug, image["key"]))
    difference = ImageChops.difference(full, own).point(lambda level: min(255, MAGNIFY * level))
    figures = {m["name"]: f"{float(image[m['name']]):.{m['digits']}f}" for m in measured if image[m["name"]]}
    return {**image, "figures": figures, "pictures": [_embedded(picture, side) for picture in (full, own, difference)]}


def grid(out: Path, found: dict[str, Any], images: list[dict[str, str]], first: int) -> Image.Image:
    """The `first` prompts, a row each; the full model and the methods, a column each."""
    rows = [row for row in found["rows"] if "skipped" not in row]
    shown = [image for image in images if image["key"] == BASELINE.slug][:first]
    side, gap, head, caption = min(256, found["settings"]["size"]), 8, 28, 20
    width = gap + len(rows) * (side + gap)
    picture = Image.new("RGB", (width, head + len(shown) * (caption + side + gap)), "white")
    pen, bold, small = ImageDraw.Draw(picture), ImageFont.load_default(15), ImageFont.load_default(11)
    for i, row in enumerate(rows):
        pen.text((gap + i * (side + gap), 6), fit(label(row), bold, side), fill="black", font=bold)
    for j, image in enumerate(shown):
        top = head + j * (caption + side + gap)
        pen.text((gap, top + 2), fit(image["prompt"], small, width - 2 * gap), fill="dimgray", font=small)
        for i, row in enumerate(rows):
            tile = _open(out / row["key"] / f"{image['id']}.png").resize((side, side), Image.Resampling.LANCZOS)
            picture.paste(tile, (gap + i * (side + gap), top + caption))
    return picture


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        why = "is gone" if isinstance(error, FileNotFoundError) else "is damaged"
        again = "the same command of eval.run draws it again"
        raise EvalError(f"the picture {path.parent.name}/{path.name} {why}: {again}") from error


def _embedded(image: Image.Image, most: int) -> str:
    """A data: address of the picture: JPEG, for the eye alone (figures come from the PNGs)."""
    image.thumbnail((most, most))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
