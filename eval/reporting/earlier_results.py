"""The earlier results of a folder. A run adds methods, metrics and images to them and removes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tofu_sd.recipes import UnknownMethodError

from .. import EvalError
from ..common.files import listed, read_json, read_text, shown
from ..common.schema_changes import convert
from ..images.records import load_records
from ..images.requests import Request
from ..images.settings import Settings
from ..methods.method import BASELINE, OTHER_SEEDS, Method
from ..methods.registry import parse as parse_methods
from . import spreadsheet

OPTIONS = {  # --metrics by the names in the results
    "PSNR": "psnr", "SSIM": "ssim", "MS-SSIM": "ms-ssim", "DINO": "dino", "CLIP score": "clip", "FID": "fid",
    "KID": "kid", "KD-demo": "kid", "PD-demo": "demo-classifier", "FD-demo": "demo-classifier",
    "class accuracy": "demo-classifier",
}  # fmt: skip
WITHOUT_REFERENCE = {"CLIP score", "class accuracy"}  # metrics of the baseline that need no comparison


@dataclass(frozen=True)
class Earlier:
    """Earlier results.

    Args:
        rows: as in results.json.
        metrics: names of those that were measured.
        ids: of the images; empty if unknown.
    """

    rows: list[dict[str, Any]]
    metrics: list[str]
    ids: set[str]


def read(out: Path) -> Earlier | None:
    """The results in a folder; None where there are none that can be read: a run then writes them again."""
    found = convert(read_json(out / "results.json"))
    if not isinstance(found, dict):
        return None
    rows, measured = _objects(found.get("rows"), "method", "key"), _objects(found.get("metrics"), "name")
    try:
        ids = {row["id"] for row in spreadsheet.from_csv(read_text(out / "per_image.csv")) if "id" in row}
    except (OSError, ValueError):
        ids = set()
    return Earlier(rows, [metric["name"] for metric in measured if "skipped" not in metric], ids)


def _objects(value: Any, *names: str) -> list[dict[str, Any]]:
    """The objects of a list that have a text under each of these names."""
    return [
        each
        for each in (value if isinstance(value, list) else [])
        if isinstance(each, dict) and all(isinstance(each.get(name), str) for name in names)
    ]


def check_images(before: Earlier, out: Path, requests: Sequence[Request]) -> None:
    """EvalError where a run would replace figures of more images, or of other images, than its own."""
    missing = sorted(before.ids - {request.id for request in requests})
    if missing:
        raise EvalError(
            f"--out {shown(out)}: its results are of {len(before.ids)} images, and this run has {len(requests)}, "
            f"without {listed(missing)}; include these too (--limit, --only, --per-prompt) or give another --out"
        )


def merge_methods(
    before: Earlier, chosen: Sequence[Method], out: Path, settings: Settings, requests: Sequence[Request]
) -> list[Method]:
    """The methods of the results, then the other ones of this run; other seeds last.

    Args:
        before: the earlier results.
        chosen: the methods of this run.
        out: the folder.
        settings: of its images.
        requests: the images of each method.

    Raises:
        EvalError: a method of the results is not in this run and its images are incomplete, so it would lose its row.
    """
    own = {method.slug: method for method in chosen}
    kept = []
    for row in before.rows:
        if row["key"] in own:
            kept.append(own[row["key"]])
        elif row["key"] != BASELINE.slug or set(row.get("metrics") or {}) - WITHOUT_REFERENCE:
            kept += _method_of_row(row, out, settings, requests)
    methods = {method.slug: method for method in [*kept, *chosen]}
    last = [methods.pop(OTHER_SEEDS.slug)] if OTHER_SEEDS.slug in methods else []
    return [*methods.values(), *last]


def _method_of_row(row: dict[str, Any], out: Path, settings: Settings, requests: Sequence[Request]) -> list[Method]:
    """The method of a row that this run does not name; none for one that was skipped and is available now."""
    where, other = f"--out {shown(out)}: its results have {row['key']}", "or give another --out"
    ratio = row.get("ratio")
    try:
        ratios = [float(ratio)] if isinstance(ratio, int | float) else [0.5]
        (method,) = [OTHER_SEEDS] if row["key"] == OTHER_SEEDS.slug else parse_methods(row["method"], ratios)
    except EvalError as error:
        if isinstance(error.__cause__, UnknownMethodError):  # rows do not name the file of their method
            raise EvalError(
                f"{where}, and {row['method']} is no method of this package: add FILE.py:{row['method']} to --method, "
                f"{other}"
            ) from error
        raise EvalError(f"{where}, which this version does not know ({error}); give another --out") from error
    if "skipped" in row:
        return [method] if method.unavailable_reason else []
    if method.unavailable_reason:
        raise EvalError(f"{where}, which needs: {method.unavailable_reason}; install it {other}")
    if method.slug != row["key"]:
        raise EvalError(f"{where}, which is {method.slug} in this version; give another --out")
    existing = len(load_records(out, settings, method, requests))
    if existing < len(requests):
        option = "--seed-baseline" if method is OTHER_SEEDS else f"{row['method']!r} to --method"
        raise EvalError(
            f"{where}, of which {existing} of {len(requests)} images exist and are of this version; add {option} to "
            f"generate them, {other}"
        )
    return [method]


def merge_metrics(before: Earlier, given: str, known: Sequence[str]) -> str:
    """The value of --metrics with the further ones of the results. known: those of --metrics, by name."""
    names = ["lpips" if name.startswith("LPIPS") else OPTIONS.get(name) for name in before.metrics]
    more = [name for name in dict.fromkeys(names) if name is not None and name not in known]
    return ",".join([given, *more])


def lost_metrics(before: Earlier, described: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each metric of the results that this run cannot measure again."""
    now = {metric["name"]: metric.get("skipped") for metric in described}
    return [
        f"{name} was in the results and is left out: {now.get(name) or 'it has other weights than --metrics'}"
        for name in before.metrics
        if name not in now or now[name] is not None
    ]
