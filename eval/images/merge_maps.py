"""Which token stands for which while an image is generated: OUT/maps/<method's slug>.png, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import tofu_sd
from tofu_sd.utils import did_you_mean

from .. import EvalError
from ..common.cli import progress, quiet_patches
from ..common.files import digest, png, read_json, write, write_json
from ..methods.method import Method
from .generate import as_image, generate_batch
from .requests import Request
from .settings import Settings, config_hash

FOLDER = "maps"
CAPTION, GAP = 20, 8  # pixels


@dataclass(frozen=True)
class MapChoice:
    """Which maps are shown.

    Args:
        step: from 1, the middle one by default. Where a method merges nothing in it, the nearest step in which it does.
        block: part of a name. The first and the last block of such names are shown, by default of all.
    """

    step: int | None = None
    block: str | None = None


def save(
    out: Path, pipe: Any, methods: Sequence[Method], settings: Settings, request: Request, choice: MapChoice
) -> None:
    """Generates one image by each of this package's methods and saves it with the maps of two merged blocks."""
    for method in progress([m for m in methods if _is_due(out, settings, m, choice)], "maps"):
        with quiet_patches(), method.apply(pipe), tofu_sd.record_maps(pipe) as records:
            [pixels], _ = generate_batch(pipe, [request], method, settings, steps=settings.steps)
        records = [record for record in records if choice.block is None or choice.block in record.block]
        if not records:  # a step window in which nothing is merged, maps too small, or a block that it skips
            continue
        tiles = [(request.prompt, as_image(pixels)), *_map_tiles(records, settings, choice)]
        write(out / FOLDER / f"{method.slug}.png", png(_row(tiles, settings.size)))
        write_json(out / FOLDER / f"{method.slug}.json", {**_version(settings, method), **asdict(choice)})


def check(pipe: Any, methods: Sequence[Method], block: str) -> None:
    """Raises an EvalError that names the merged blocks where none of them has such a name."""
    merged: list[str] = []
    for method in methods:
        if method.fusion is not None:
            with quiet_patches(), method.apply(pipe):
                merged += [row.name for row in tofu_sd.summary(pipe).rows]
    if not any(block in name for name in merged):
        known = list(dict.fromkeys(merged))
        names = ", ".join(known) or "none"
        raise EvalError(f"--map-block is {block!r}{did_you_mean(block, known)}; merged blocks: {names}")


def saved(out: Path, settings: Settings, method: Method) -> bool:
    """Whether `save` saved maps of this configuration, at any step."""
    metadata = read_json(out / FOLDER / f"{method.slug}.json")
    return isinstance(metadata, dict) and _version(settings, method).items() <= metadata.items()


def _is_due(out: Path, settings: Settings, method: Method, choice: MapChoice) -> bool:
    existing = read_json(out / FOLDER / f"{method.slug}.json")
    return method.fusion is not None and existing != {**_version(settings, method), **asdict(choice)}


def _version(settings: Settings, method: Method) -> dict[str, Any]:
    return {"config_hash": config_hash(settings, method), "code_hash": digest(Path(__file__))}


def _map_tiles(records: Sequence[Any], settings: Settings, choice: MapChoice) -> list[tuple[str, Image.Image]]:
    """(caption, map) of the first and the last block at the chosen step."""
    wanted = settings.steps // 2 if choice.step is None else choice.step - 1
    at = min({record.call for record in records}, key=lambda call: abs(call - wanted))
    blocks = [record for record in records if record.call == at]
    tiles = []
    for record in (blocks[0], blocks[-1])[: len(blocks)]:
        colours = tofu_sd.draw_merge_map(record.map, record.h, record.w)[-1]  # the positive prompt's, of two
        pixels = (255 * colours.permute(1, 2, 0).numpy()).round().astype(np.uint8)
        tiles.append((f"step {at + 1}, {record.block}", Image.fromarray(pixels)))
    return tiles


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
