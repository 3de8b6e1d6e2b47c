"""Whose images a folder holds, and what may be added to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from .. import EvalError
from ..common.files import check_place, read_json, shown, write, write_json
from ..methods.method import BASELINE, Method
from .records import record_of
from .requests import Request
from .settings import RUNS, Settings

# what a run writes beside its pictures
FILES = ("settings.json", "results.json", "per_image.csv", "report.html", "grid.png")
FOLDERS = (RUNS, "measured", "flops", "maps")
# settings that follow from others: where both differ, those say why
DERIVED = ("prompts_hash", "pipeline", "tokenizers")


def claim(out: Path, settings: Settings) -> None:
    """Makes `out` a folder of pictures under these settings, or refuses one that holds pictures under others."""
    if refuse_others(out, settings):
        write_json(out / "settings.json", asdict(settings))


def refuse_others(out: Path, settings: Settings) -> bool:
    """EvalError for a folder that holds something else, naming what differs. True for one that holds nothing yet."""
    new = asdict(settings)
    check_place(out, "--out", folder=True)
    others = out.exists() and any(path.name[0] != "." for path in out.iterdir())  # dots: what is not whole yet
    settings_of(out)  # refuses what cannot be read
    old = read_json(out / "settings.json")  # after the look: another process may write them between the two
    if not isinstance(old, dict):
        if others:
            raise EvalError(f"--out {shown(out)}: the folder is not empty and holds no settings.json; give another")
        return True
    if name := differing(new, old):
        raise EvalError(
            f"--out {out.name}: its pictures were made with {name} {old.get(name)!r}, this run has "
            f"{new.get(name)!r}; give another folder or delete it"
        )
    return False


def differing(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The setting to name where two pictures cannot be compared; None where they can."""
    names = sorted(dict.fromkeys([*one, *other]), key=DERIVED.__contains__)
    return next((name for name in names if one.get(name) != other.get(name)), None)


def settings_of(out: Path, option: str = "--out") -> Settings | None:
    """Those of the pictures in a folder, which is an option's; None where none are told."""
    path = out / "settings.json"
    told = read_json(path)
    if path.exists() and not isinstance(told, dict):
        raise EvalError(f"{option} {out.name}: its settings.json cannot be read; put it right or give another folder")
    names = {field.name for field in fields(Settings)}
    if not isinstance(told, dict) or not told.keys() <= names:
        return None
    hints = get_type_hints(Settings)
    for name, value in told.items():
        number = isinstance(value, int) and hints[name] == float | None  # other programs write 3.0 as 3
        if isinstance(value, bool) or not (isinstance(value, hints[name]) or number):
            raise EvalError(f"{option} {out.name}: {name} in its settings.json is {value!r}; it must be {hints[name]}")
    try:
        return Settings(**told)
    except TypeError:  # of an older version, which had fewer
        return None


def take_over(reference: Path, out: Path, settings: Settings, requests: Sequence[Request]) -> int:
    """Copies pictures of the full model from another run's folder: those that are what this run would draw.

    That is said by their content: their record's hash of settings, prompt and seed, and the picture's own. Returns how
    many are the other's, taken now or before.
    """
    theirs = 0
    for request in requests:
        record, own = (record_of(folder, settings, BASELINE, request) for folder in (reference, out))
        if record is not None and own is None:
            write(
                out / BASELINE.slug / f"{request.id}.png",
                (reference / BASELINE.slug / f"{request.id}.png").read_bytes(),
            )
            write_json(out / BASELINE.slug / f"{request.id}.json", record)
            told = read_json(reference / RUNS / f"{record['run']}.json")
            if told is not None:
                write_json(out / RUNS / f"{record['run']}.json", told)
        theirs += record is not None and own in (None, record)
    return theirs


def refuse_obstacles(out: Path, methods: Sequence[Method], requests: Sequence[Request]) -> None:
    """EvalError where a folder is in the place of a file that a run writes, or a file in that of a folder.

    Else it is an error after hours, and the same one again where the run resumes.
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
