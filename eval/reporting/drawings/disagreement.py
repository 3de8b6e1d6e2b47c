"""The image on which two metrics prefer different methods most, and on how many images they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from ... import EvalError
from ...images.merge_maps import fit
from ...images.settings import image_path
from ...methods.method import BASELINE
from ..footnotes import label
from .pictures import MAGNIFY, difference, open_image, ranking

GAP, LINE = 8, 18  # pixels

Values = dict[str, dict[str, str]]  # image id -> row of per_image.csv


@dataclass(frozen=True)
class Disagreement:
    """Where PSNR and a perceptual metric prefer different methods.

    Args:
        image: the id of the image on which both preferences are strongest.
        prefers: the key of the method that each metric prefers there, by the metric's name.
        n: images on which the two metrics prefer different methods.
        of: images compared.
    """

    image: str
    prefers: dict[str, str]
    n: int
    of: int


def find(a: Values, b: Values, metrics: Sequence[dict[str, Any]]) -> Disagreement:
    """Returns where two metrics prefer different methods.

    Args:
        a: figures of one method.
        b: those of the other, of the same images.
        metrics: two descriptions of metrics.

    Raises:
        EvalError: the metrics agree on every image.
    """
    ids = [image for image in a if image in b]
    gaps = torch.stack([_preference(a, b, ids, metric) for metric in metrics])
    opposed = gaps[0].sign() * gaps[1].sign() < 0
    names = [metric["name"] for metric in metrics]
    if not opposed.any():
        raise EvalError(f"{names[0]} and {names[1]} agree on each of the {len(ids)} images")
    strength = (gaps / gaps.abs().mean(1, keepdim=True)).abs().amin(0)  # the weaker of the two, in mean gaps
    at = int(torch.where(opposed, strength, -torch.inf).argmax())
    key_a, key_b = (next(iter(own.values()))["key"] for own in (a, b))
    prefers = {name: key_a if gap[at] > 0 else key_b for name, gap in zip(names, gaps, strict=True)}
    return Disagreement(ids[at], prefers, int(opposed.sum()), len(ids))


def _preference(a: Values, b: Values, ids: Sequence[str], metric: dict[str, Any]) -> torch.Tensor:
    """Returns by how much each image of `a` is better than that of `b`, in the unit of the metric."""
    own, other = (torch.tensor([float(x[image][metric["name"]]) for image in ids]).double() for x in (a, b))
    gap = (other - own) if metric["lower_is_better"] else (own - other)
    return torch.where(gap.isfinite(), gap, 0)  # equal images have an infinite PSNR


def draw(
    out: Path, results: dict[str, Any], images: Sequence[dict[str, str]], rows: Sequence[str]
) -> tuple[Image.Image, str]:
    """Returns the baseline and two methods beside each other with their differences below, and a sentence.

    Args:
        out: folder of the run, with its images.
        results: content of results.json with the rows of these methods.
        images: rows of per_image.csv.
        rows: labels of the two methods, as the user wrote them.

    Raises:
        EvalError: not two methods, a metric is missing, or the metrics agree everywhere.
    """
    compared = [row for row in results["rows"] if "skipped" not in row and row["key"] != BASELINE.slug]
    if len(rows) != 2 or len(compared) != 2:
        raise EvalError(f"--disagreement compares two methods, and --rows names {len(rows)}: --rows 'tome 50%' todo")
    perceptual = ranking(results)
    psnr = next((m for m in results["metrics"] if m["name"] == "PSNR"), None)
    if psnr is None or perceptual is None or perceptual["name"] == "PSNR":
        raise EvalError("--disagreement needs PSNR and LPIPS or MS-SSIM, which this run has not measured")
    own = [{image["id"]: image for image in images if image["key"] == row["key"]} for row in compared]
    found = find(own[0], own[1], [psnr, perceptual])
    names = {row["key"]: label(row) for row in compared}
    liked = ", ".join(f"{metric} prefers {names[key]}" for metric, key in found.prefers.items())
    text = (
        f"PSNR and {perceptual['name']} prefer different methods on {found.n} of {found.of} images. "
        f"Most clearly on {found.image}: {liked}."
    )
    figures = [(label(row), values[found.image]) for row, values in zip(compared, own, strict=True)]
    return _sheet(out, figures, [m for m in results["metrics"] if m.get("per_image")]), text


def _sheet(out: Path, figures: Sequence[tuple[str, dict[str, str]]], metrics: Sequence[dict[str, Any]]) -> Image.Image:
    """Draws the baseline and each method with its figures, and what is different below it."""
    baseline = open_image(image_path(out, BASELINE.slug, figures[0][1]["id"]))
    side = baseline.width
    head = 2 * LINE + GAP
    sheet = Image.new("RGB", (GAP + (1 + len(figures)) * (side + GAP), head + 2 * (side + GAP)), "white")
    pen, bold, small = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(11)
    pen.text((GAP, 4), "baseline", fill="black", font=bold)
    sheet.paste(baseline, (GAP, head))
    pen.text((GAP, head + side + GAP), f"differences, {MAGNIFY} times as strong", fill="dimgray", font=small)
    shown = [m for m in metrics if m["name"].startswith(("PSNR", "MS-SSIM", "LPIPS"))]
    for i, (name, image) in enumerate(figures, 1):
        left = GAP + i * (side + GAP)
        own = open_image(image_path(out, image["key"], image["id"]))
        values = ", ".join(f"{m['name']} {float(image[m['name']]):.{m['digits']}f}" for m in shown if image[m["name"]])
        pen.text((left, 4), fit(name, bold, side), fill="black", font=bold)
        pen.text((left, 4 + LINE), fit(values, small, side), fill="dimgray", font=small)
        sheet.paste(own, (left, head))
        sheet.paste(difference(baseline, own), (left, head + side + GAP))
    return sheet
