"""The output folder: whose images it holds, and what may be added to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from .. import EvalError
from ..common.files import check_place, read_json, shown, write, write_json
from ..methods.method import BASELINE, Method
from .records import load_record
from .requests import Request
from .settings import RUNS, Settings, image_path, record_path

# what a run writes besides its images
FILES = ("settings.json", "results.json", "per_image.csv", "report.html", "grid.png")
FOLDERS = (RUNS, "measured", "flops", "maps")
# settings that follow from others; where those differ too, they are named
DERIVED = ("prompts_hash", "pipeline", "tokenizers")


def init_output_dir(out: Path, settings: Settings) -> None:
    """Makes `out` a folder of images under these settings.

    Raises:
        EvalError: it holds something else.
    """
    if check_settings_match(out, settings):
        write_json(out / "settings.json", asdict(settings))


def check_settings_match(out: Path, settings: Settings) -> bool:
    """Whether the folder is new; False where it holds images under these settings.

    Raises:
        EvalError: it holds something else; the message names what differs.
    """
    new = asdict(settings)
    check_place(out, "--out", folder=True)
    has_files = out.exists() and any(path.name[0] != "." for path in out.iterdir())  # dots: temporary files
    load_settings(out)  # refuses a file that cannot be read
    old = read_json(out / "settings.json")  # after the listing: another process may write it in between
    if not isinstance(old, dict):
        if has_files:
            raise EvalError(f"--out {shown(out)}: the folder is not empty and holds no settings.json; give another")
        return True
    if name := differing_setting(new, old):
        raise EvalError(
            f"--out {out.name}: its images were generated with {name} {old.get(name)!r}, this run has "
            f"{new.get(name)!r}; give another folder or delete it"
        )
    return False


def differing_setting(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first setting that differs, those that follow from others last; None where all are equal."""
    names = sorted(dict.fromkeys([*one, *other]), key=DERIVED.__contains__)
    return next((name for name in names if one.get(name) != other.get(name)), None)


def load_settings(out: Path, option: str = "--out") -> Settings | None:
    """The settings of the images in a folder; None where it has none of this version.

    Raises:
        EvalError: the file is damaged. option: the one that names the folder, for the message.
    """
    path = out / "settings.json"
    found = read_json(path)
    if path.exists() and not isinstance(found, dict):
        raise EvalError(f"{option} {out.name}: its settings.json cannot be read; put it right or give another folder")
    names = {field.name for field in fields(Settings)}
    if not isinstance(found, dict) or not found.keys() <= names:
        return None
    hints = get_type_hints(Settings)
    for name, value in found.items():
        number = isinstance(value, int) and hints[name] == float | None  # other programs write 3.0 as 3
        if isinstance(value, bool) or not (isinstance(value, hints[name]) or number):
            raise EvalError(f"{option} {out.name}: {name} in its settings.json is {value!r}; it must be {hints[name]}")
    try:
        return Settings(**found)
    except TypeError:  # of an older version, which had fewer
        return None


def copy_reference_images(reference: Path, out: Path, settings: Settings, requests: Sequence[Request]) -> int:
    """Copies the baseline's images from the folder of another run, where they are those that this run would generate.

    The records decide: their hash of the configuration, prompt and seed, and that of the image itself.

    Returns:
        How many of this folder's images come from the other one, copied now or before.
    """
    copied = 0
    for request in requests:
        record, own = (load_record(folder, settings, BASELINE, request) for folder in (reference, out))
        if record is not None and own is None:
            image = image_path(reference, BASELINE.slug, request.id).read_bytes()
            write(image_path(out, BASELINE.slug, request.id), image)
            write_json(record_path(out, BASELINE.slug, request.id), record)
            metadata = read_json(reference / RUNS / f"{record['run']}.json")
            if metadata is not None:
                write_json(out / RUNS / f"{record['run']}.json", metadata)
        copied += record is not None and own in (None, record)
    return copied


def check_no_obstacles(out: Path, methods: Sequence[Method], requests: Sequence[Request]) -> None:
    """Raises an EvalError where a folder is in the place of a file that a run writes, or a file in that of a folder.

    Otherwise the error would come after hours, and again whenever the run resumes.
    """
    place = f"--out {shown(out)}: the place of"
    for name in (*FOLDERS, *(method.slug for method in methods)):
        check_place(out / name, place, folder=True)
    for name in FILES:
        check_place(out / name, place)
    for method in methods:
        for name in (f"{method.slug}/{request.id}.{ending}" for request in requests for ending in ("png", "json")):
            if (out / name).is_dir():
                raise EvalError(f"--out {shown(out)}: {name} is a folder; remove it, a file belongs there")
