"""The record of each image: how it was generated and how long that took."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from ..common.files import read_json
from ..common.schema_changes import convert_record, convert_run
from ..methods.method import Method
from .requests import Request
from .settings import RUNS, Settings, expected_record, file_sha256, image_path, record_path

MAX_SECONDS = 1e9  # larger values give figures that are not finite


def load_record(out: Path, settings: Settings, method: Method, request: Request) -> dict[str, Any] | None:
    """The record of a complete image; None where it is missing, corrupt or of another configuration."""
    record = convert_record(read_json(record_path(out, method.slug, request.id)))
    expected = expected_record(settings, method, request)
    if not _is_complete(record) or any(record.get(name) != value for name, value in expected.items()):
        return None
    return record if file_sha256(image_path(out, method.slug, request.id)) == record.get("sha256") else None


def load_records(
    out: Path, settings: Settings, method: Method, requests: Sequence[Request]
) -> dict[str, dict[str, Any]]:
    """The records of a method's complete images, by their ids."""
    found = {request.id: load_record(out, settings, method, request) for request in requests}
    return {image_id: record for image_id, record in found.items() if record is not None}


def is_corrupt(out: Path, method: Method, request: Request) -> bool:
    """Whether the files of an image exist and are not an image with its record."""
    image, path = image_path(out, method.slug, request.id), record_path(out, method.slug, request.id)
    if not image.exists() and not path.exists():
        return False
    record = convert_record(read_json(path))
    return not _is_complete(record) or file_sha256(image) != record.get("sha256")


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_SECONDS


def _is_count(value: Any, minimum: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_run_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-]+", value) is not None  # it names a file


REQUIRED: dict[str, Callable[[Any], bool]] = {
    "run": _is_run_id,
    "batch": lambda value: _is_count(value, 1),
    "timed": lambda value: isinstance(value, bool),
    "seconds": _is_seconds,
}
OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "denoiser_seconds": _is_seconds,
    "baseline_denoiser_seconds": _is_seconds,
    "peak_bytes": _is_count,
    "reserved_bytes": _is_count,
    "held_bytes": _is_count,
    "finite": lambda value: isinstance(value, bool),
    "batch_ids": lambda value: isinstance(value, list) and all(isinstance(image_id, str) for image_id in value),
}


def _is_complete(record: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a record has all values that figures need, in their types and ranges."""
    if not isinstance(record, dict) or not all(is_valid(record.get(name)) for name, is_valid in REQUIRED.items()):
        return False
    if record.get("baseline_denoiser_seconds") is not None and record.get("denoiser_seconds") is None:
        return False
    return all(is_valid(record[name]) for name, is_valid in OPTIONAL.items() if record.get(name) is not None)


def generating_runs(out: Path, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metadata of the runs that generated the images of these records, the first run first, with their image counts."""
    counts = Counter(record["run"] for record in records)

    def metadata(run: str) -> dict[str, Any]:
        found = read_json(out / RUNS / f"{run}.json")
        return _valid_metadata(convert_run(found)) if isinstance(found, dict) else {}

    runs = [{**metadata(run), "run": run, "images": n} for run, n in counts.items()]
    return sorted(runs, key=lambda run: str(run.get("started", "")))


def _valid_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a run without entries of the wrong type: someone may have edited the file."""
    tables = {"runtime", "packages"}

    def is_valid(name: str, value: Any) -> bool:
        if name in tables:
            return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
        return value is None or isinstance(value, str)

    return {name: value for name, value in metadata.items() if is_valid(name, value)}
