"""Which token stood for which while a picture was drawn: OUT/maps/<method's key>.png, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import tofu_sd
from tofu_sd.utils import did_you_mean

from .. import EvalError
from ..common.cli import quiet_patches, working
from ..common.files import digest, png, read_json, write, write_json
from ..methods.method import Method
from .generate import as_image, draw
from .requests import Request
from .settings import Settings, identity

FOLDER = "maps"
CAPTION, GAP = 20, 8  # pixels


def save(
    out: Path,
    pipe: Any,
    methods: Sequence[Method],
    settings: Settings,
    request: Request,
    step: int | None = None,
    block: str | None = None,
) -> None:
    """Draws one picture by each of this package's methods, with the maps of two fused blocks at a step.

    step: from 1, the middle one by default; where a method fuses nothing in it, the nearest step in which it does.
    block: a part of a name; the first and the last block of such names, by default of all.
    """
    asked_for = {"step": step, "block": block}
    there = {m.slug: read_json(out / FOLDER / f"{m.slug}.json") for m in methods}
    due = [m for m in methods if m.fusion is not None and there[m.slug] != {**_made(settings, m), **asked_for}]
    for method in working(due, "maps"):
        with quiet_patches(), method.apply(pipe), tofu_sd.record_maps(pipe) as seen:
            [pixels], _ = draw(pipe, [request], method, settings, steps=settings.steps)
        seen = [sighting for sighting in seen if block is None or block in sighting.block]
        if not seen:  # a step window in which nothing is fused, maps too small, or a block that this method leaves
            continue
        asked = settings.steps // 2 if step is None else step - 1
        at = min({sighting.call for sighting in seen}, key=lambda call: abs(call - asked))
        blocks = [sighting for sighting in seen if sighting.call == at]
        tiles = [(request.prompt, as_image(pixels))]
        for sighting in (blocks[0], blocks[-1])[: len(blocks)]:
            colours = tofu_sd.draw_merge_map(sighting.map, sighting.h, sighting.w)[-1]  # the positive prompt's, of two
            shown = (255 * colours.permute(1, 2, 0).numpy()).round().astype(np.uint8)
            tiles.append((f"step {at + 1}, {sighting.block}", Image.fromarray(shown)))
        write(out / FOLDER / f"{method.slug}.png", png(_row(tiles, settings.size)))
        write_json(out / FOLDER / f"{method.slug}.json", {**_made(settings, method), **asked_for})


def check(pipe: Any, methods: Sequence[Method], block: str) -> None:
    """EvalError where none of the methods fuses a block of such a name, naming those that are."""
    fused: list[str] = []
    for method in methods:
        if method.fusion is not None:
            with quiet_patches(), method.apply(pipe):
                fused += [row.name for row in tofu_sd.summary(pipe).rows]
    if not any(block in name for name in fused):
        known = list(dict.fromkeys(fused))
        raise EvalError(f"--map-block is {block!r}{did_you_mean(block, known)}; fused are {', '.join(known) or 'none'}")


def saved(out: Path, settings: Settings, method: Method) -> bool:
    """Whether `save` drew the maps of this very method, at whichever step."""
    told = read_json(out / FOLDER / f"{method.slug}.json")
    return isinstance(told, dict) and _made(settings, method).items() <= told.items()


def _made(settings: Settings, method: Method) -> dict[str, Any]:
    return {"made": identity(settings, method), "mapped": digest(Path(__file__))}


def _row(tiles: Sequence[tuple[str, Image.Image]], side: int) -> Image.Image:
    row = Image.new("RGB", (len(tiles) * (side + GAP) - GAP, CAPTION + side), "white")
    pen, font = ImageDraw.Draw(row), ImageFont.load_default(11)
    for i, (caption, tile) in enumerate(tiles):
        pen.text((i * (side + GAP), 3), fit(caption, font, side), fill="dimgray", font=font)
        row.paste(tile.resize((side, side), Image.Resampling.NEAREST), (i * (side + GAP), CAPTION))
    return row


def fit(text: str, font: Any, width: int) -> str:
    """The text, cut to this width in pixels."""
    text = " ".join(text.split())
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text
