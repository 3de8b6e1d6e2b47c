"""What a folder's results hold already. A run adds methods, metrics and images to them; it takes nothing away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import EvalError
from ..common.files import listed, read_json, read_text, shown
from ..images.requests import Request
from ..images.settings import Settings
from ..methods import registry as methods
from ..methods.method import BASELINE, OTHER_SEEDS, Method
from ..metrics.score import records
from . import spreadsheet

OPTIONS = {  # --metrics by the names in the results
    "PSNR": "psnr", "SSIM": "ssim", "MS-SSIM": "ms-ssim", "DINO": "dino", "CLIP score": "clip", "FID": "fid",
    "KID": "kid", "KD-judge": "kid", "PD-judge": "judge", "FD-judge": "judge", "classed as asked": "judge",
}  # fmt: skip
ALONE = {"CLIP score", "classed as asked"}  # metrics that the baseline has without being compared with itself


@dataclass(frozen=True)
class Earlier:
    """rows: as results.json has them. metrics: names of those measured. ids: of the images, empty if not known."""

    rows: list[dict[str, Any]]
    metrics: list[str]
    ids: set[str]


def read(out: Path) -> Earlier | None:
    """The results in a folder; None where there are none that can be read, which a run then writes again."""
    found = read_json(out / "results.json")
    if not isinstance(found, dict):
        return None
    rows, measured = _objects(found.get("rows"), "method", "key"), _objects(found.get("metrics"), "name")
    try:
        ids = {row["id"] for row in spreadsheet.from_csv(read_text(out / "per_image.csv")) if "id" in row}
    except (OSError, ValueError):
        ids = set()
    return Earlier(rows, [metric["name"] for metric in measured if "skipped" not in metric], ids)


def _objects(value: Any, *names: str) -> list[dict[str, Any]]:
    """The objects of a list that have these names as texts."""
    return [
        each
        for each in (value if isinstance(value, list) else [])
        if isinstance(each, dict) and all(isinstance(each.get(name), str) for name in names)
    ]


def check_images(before: Earlier, out: Path, asked: Sequence[Request]) -> None:
    """EvalError where a run would replace figures of more, or of other, images than it is asked for."""
    missing = sorted(before.ids - {request.id for request in asked})
    if missing:
        raise EvalError(
            f"--out {shown(out)}: its results are of {len(before.ids)} images, and this run has {len(asked)}, without "
            f"{listed(missing)}; ask for these too (--limit, --only, --per-prompt) or give another --out"
        )


def joined_methods(
    before: Earlier, chosen: Sequence[Method], out: Path, settings: Settings, asked: Sequence[Request]
) -> list[Method]:
    """The methods of the results and those asked for, in the order in which they came; other seeds last.

    EvalError where the images of one that is not asked for are not all there, since it would lose its row.
    """
    own = {method.slug: method for method in chosen}
    kept = []
    for row in before.rows:
        if row["key"] in own:
            kept.append(own[row["key"]])
        elif row["key"] != BASELINE.slug or set(row.get("metrics") or {}) - ALONE:
            kept += _method(row, out, settings, asked)
    whole = {method.slug: method for method in [*kept, *chosen]}
    last = [whole.pop(OTHER_SEEDS.slug)] if OTHER_SEEDS.slug in whole else []
    return [*whole.values(), *last]


def _method(row: dict[str, Any], out: Path, settings: Settings, asked: Sequence[Request]) -> list[Method]:
    """The method of a row that is not asked for; none for one that was skipped and would not be any more."""
    where, other = f"--out {shown(out)}: its results have {row['key']}", "or give another --out"
    ratio = row.get("ratio")
    try:
        ratios = [float(ratio)] if isinstance(ratio, int | float) else [0.5]
        (method,) = [OTHER_SEEDS] if row["key"] == OTHER_SEEDS.slug else methods.parse(row["method"], ratios)
    except EvalError as error:
        raise EvalError(f"{where}, which this version does not know ({error}); give another --out") from error
    if "skipped" in row:
        return [method] if method.unavailable_reason else []
    if method.unavailable_reason:
        raise EvalError(f"{where}, which needs: {method.unavailable_reason}; install it {other}")
    if method.slug != row["key"]:
        raise EvalError(f"{where}, which is {method.slug} in this version; give another --out")
    there = len(records(out, settings, method, asked))
    if there < len(asked):
        option = "--scale-row" if method is OTHER_SEEDS else f"{row['method']!r} to --method"
        raise EvalError(
            f"{where}, of which {there} of {len(asked)} images are there and of this version; add {option} to generate "
            f"them, {other}"
        )
    return [method]


def joined_metrics(before: Earlier, asked: str, known: Sequence[str]) -> str:
    """--metrics with those of the results that it leaves out. known: what --metrics asks for, by name."""
    names = ["lpips" if name.startswith("LPIPS") else OPTIONS.get(name) for name in before.metrics]
    more = [name for name in dict.fromkeys(names) if name is not None and name not in known]
    return ",".join([asked, *more])


def lost_metrics(before: Earlier, described: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each metric of the results that this run cannot measure again."""
    now = {metric["name"]: metric.get("skipped") for metric in described}
    return [
        f"{name} was in the results and is left out: {now.get(name) or 'it is of other weights than --metrics has'}"
        for name in before.metrics
        if name not in now or now[name] is not None
    ]
