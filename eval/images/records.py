"""The record beside each image: how it was generated, and how long that took."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeGuard

from ..common.files import read_json
from ..methods.method import Method
from .requests import Request
from .settings import RUNS, Settings, _asked, _sha


def record_of(out: Path, settings: Settings, method: Method, request: Request) -> dict[str, Any] | None:
    """The record of a finished picture; None where it is missing, damaged or was made otherwise."""
    record = read_json(out / method.slug / f"{request.id}.json")
    if not _whole(record) or any(
        record.get(name) != value for name, value in _asked(settings, method, request).items()
    ):
        return None
    return record if _sha(out / method.slug / f"{request.id}.png") == record.get("sha256") else None


def damaged(out: Path, method: Method, request: Request) -> bool:
    """Whether something lies where the picture should be, that is no picture with its record."""
    picture, told = (out / method.slug / f"{request.id}.{ending}" for ending in ("png", "json"))
    if not picture.exists() and not told.exists():
        return False
    record = read_json(told)
    return not _whole(record) or _sha(picture) != record.get("sha256")


LONGEST = 1e9  # seconds; beyond them figures are not finite


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LONGEST


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_run(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-]+", value) is not None  # it names a file


NEEDED: dict[str, Callable[[Any], bool]] = {  # what figures come from, in every record
    "run": _is_run,
    "batch": lambda value: _is_count(value, 1),
    "timed": lambda value: isinstance(value, bool),
    "seconds": _is_seconds,
}
FURTHER: dict[str, Callable[[Any], bool]] = {  # where a record has it
    "denoising": _is_seconds,
    "full_denoising": _is_seconds,
    "peak_bytes": _is_count,
    "reserved_bytes": _is_count,
    "held_bytes": _is_count,
    "finite": lambda value: isinstance(value, bool),
    "drawn_with": lambda value: isinstance(value, list) and all(isinstance(id, str) for id in value),
}


def _whole(record: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a record says all that figures come from, in their types and ranges."""
    if not isinstance(record, dict) or not all(fits(record.get(name)) for name, fits in NEEDED.items()):
        return False
    if record.get("full_denoising") is not None and record.get("denoising") is None:
        return False
    return all(fits(record[name]) for name, fits in FURTHER.items() if record.get(name) is not None)


def runs(out: Path, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is told of the runs that drew the pictures of these records, the first run first, with how many of them."""
    counts = Counter(record["run"] for record in records)

    def told(run: str) -> dict[str, Any]:
        found = read_json(out / RUNS / f"{run}.json")
        return _readable(found) if isinstance(found, dict) else {}

    found = [{**told(run), "run": run, "pictures": n} for run, n in counts.items()]
    return sorted(found, key=lambda run: str(run.get("started", "")))


def _readable(told: dict[str, Any]) -> dict[str, Any]:
    """What is told of a run without entries of another type than a run has: the file can have been edited."""
    tables = {"runtime", "packages"}

    def fits(name: str, value: Any) -> bool:
        if name in tables:
            return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
        return value is None or isinstance(value, str)

    return {name: value for name, value in told.items() if fits(name, value)}
