"""Images of a run beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFont

from ... import EvalError
from ...images.merge_maps import fit
from ...images.settings import image_path
from ...methods.method import BASELINE
from ..footnotes import label

GRID_ROWS = 6
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
            tile = open_image(image_path(out, row["key"], image["id"])).resize((side, side), Image.Resampling.LANCZOS)
            canvas.paste(tile, (gap + i * (side + gap), top + caption))
    return canvas


def difference(baseline: Image.Image, other: Image.Image) -> Image.Image:
    """The absolute difference of two images, magnified."""
    return ImageChops.difference(baseline, other).point(lambda level: min(255, MAGNIFY * level))


def open_image(path: Path) -> Image.Image:
    """The image of a run. EvalError where it is missing or damaged."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        again = "the same command of eval.run generates it again"
        raise EvalError(f"the image {path.parent.name}/{path.name} {why}: {again}") from error
