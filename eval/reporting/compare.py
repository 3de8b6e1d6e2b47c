"""`python -m eval.compare A B`: two runs side by side, each against its own full model.

What decides what is drawn has to be the same in both (the model and its type, prompts, seeds, size, steps, guidance,
how many); what may tell two machines or versions apart is named instead. Times are compared on one machine alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import EvalError
from ..common.files import listed
from ..images.output_dir import DERIVED
from ..methods.method import BASELINE
from . import results as report
from .tables import commits, flaws, gained, gap, label, measured, short, spent, unlike

SAME = (
    *("model", "variant", "prompts", "seed", "size", "steps", "guidance", "dtype", "batch", "attention", "n"),
    *DERIVED,
)
TIMED = ("device", "torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Comparison:
    """told: what differs in the circumstances. rows: for each method of both runs and each metric, both and the gap.
    measured: what computed each metric. flaws: pictures of either that are none, or differ by more than their method.
    """  # fmt: skip

    told: dict[str, tuple[Any, Any]]
    rows: list[dict[str, str]]
    measured: list[str]
    flaws: list[str]


def compare(a: Path, b: Path) -> Comparison:
    """EvalError where the two were not drawn alike, naming what differs."""
    (first, first_images), (second, second_images) = report.read(a), report.read(b)
    report.alike(a, first, b, second, SAME)
    told = _differing(*({name: run["settings"][name] for name in TIMED} for run in (first, second)))
    machines, packages = ([_of_drawing(run, part) for run in (first, second)] for part in ("runtime", "packages"))
    told |= _differing(*machines)
    told |= _differing(*({name: of for name, of in one.items() if name not in TIMED} for one in packages))
    told |= _differing({"commit": commits(first)}, {"commit": commits(second)})
    mine = {m["name"]: m for m in first["metrics"] if "skipped" not in m}
    shared = [mine[m["name"]] for m in second["metrics"] if m["name"] in mine and "skipped" not in m]
    alike = not told.keys() & {*TIMED, *machines[0], *machines[1]}
    others = {row["key"]: row for row in second["rows"] if "skipped" not in row}
    rows = []
    for row in first["rows"]:
        if "skipped" in row or row["key"] == BASELINE.slug or row["key"] not in others:
            continue
        other = others[row["key"]]
        rows += [{"method": label(row), **times} for times in _times(row, other, alike)]
        own, theirs = (
            {image["id"]: image for image in images if image["key"] == row["key"]}
            for images in (first_images, second_images)
        )
        for one, other_one, where in ((own, theirs, b), (theirs, own, a)):
            if missing := sorted(one.keys() - other_one.keys()):
                raise EvalError(
                    f"{a.name} and {b.name} cannot be compared: {where.name} has no picture {listed(missing)}"
                )
        for metric in shared:
            rows.append({
                "method": label(row), "figure": metric["name"],
                "a": short(row["metrics"].get(metric["name"]), metric["digits"]),
                "b": short(other["metrics"].get(metric["name"]), metric["digits"]),
                "b - a": gap(list(theirs.values()), own, metric)
                if metric["per_image"] else "–",
            })  # fmt: skip
    if not rows:
        raise EvalError(f"{a.name} and {b.name} have no method in common")
    flawed = [
        f"{out.name}: {line}" for out, found in ((a, first), (b, second)) for line in (*flaws(found), *unlike(found))
    ]
    return Comparison(told, rows, measured(shared), flawed)


def _of_drawing(found: dict[str, Any], part: str) -> dict[str, str]:
    """What the runs that drew the pictures tell of their machine or packages; measuring can be done on another one."""
    runs = found["provenance"].get("drawn") or [found["provenance"]]
    names = dict.fromkeys(name for run in runs for name in run.get(part, {}))
    return {name: ", ".join(sorted({run.get(part, {}).get(name, "none") for run in runs})) for name in names}


def _differing(a: dict[str, str], b: dict[str, str]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*a, *b])
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _times(a: dict[str, Any], b: dict[str, Any], alike: bool) -> list[dict[str, str]]:
    """Both runs' medians with their percentiles. What two runs differ by is the machine's as much as the method's, so
    that there is no b - a."""
    return [
        {"figure": figure, "a": told(a), "b": told(b) if alike else "n/a (other circumstances)", "b - a": "–"}
        for figure, told in (("speed-up", gained), ("s/image", spent))
    ]
