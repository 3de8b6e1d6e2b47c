"""`python -m eval.compare A B`: two runs side by side, each against its own full model.

What decides what is drawn has to be the same in both (the model and its type, prompts, seeds, size, steps, guidance,
how many); what may tell two machines or versions apart is named instead. Times are compared on one machine alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import EvalError, report
from .files import listed, to_json
from .generate import DERIVED
from .methods import FULL
from .options import Help, Parser, as_path, command
from .table import commits, flaws, gained, gap, label, measured, short, spent, unlike

SAME = (
    *("model", "variant", "prompts", "seed", "size", "steps", "guidance", "dtype", "batch", "attention", "n"),
    *DERIVED,
)
TIMED = ("device", "torch", "diffusers", "transformers")


EXAMPLES = """examples:
  python -m eval.compare runs/yesterday runs/today
      the methods of both, each metric in one and in the other, and the difference on the same pictures
  python -m eval.compare runs/a runs/b --json
      the same for a program
"""


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
        if "skipped" in row or row["key"] == FULL.key or row["key"] not in others:
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


def parser() -> Parser:
    p = Parser(
        prog="python -m eval.compare",
        description="Two runs of eval.run side by side.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    p.add_argument("a", type=as_path, help="folder of a run")
    p.add_argument("b", type=as_path, help="folder of another")
    p.add_argument("--json", action="store_true", help="print it as JSON")
    return p


@command(goes_on=False)
def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    found = compare(options.a, options.b)
    if options.json:
        print(
            to_json({"differ": found.told, "rows": found.rows, "measured": found.measured, "flaws": found.flaws}),
            end="",
        )
        return 0
    drawn = Table(title=f"{options.a.name} and {options.b.name}", box=SIMPLE_HEAD)
    for title in ("method", "figure", "a", "b", "b - a"):
        drawn.add_column(title, justify="left" if title in ("method", "figure") else "right")
    last = ""
    for row in found.rows:
        drawn.add_row(row["method"] if row["method"] != last else "", *(row[t] for t in ("figure", "a", "b", "b - a")))
        last = row["method"]
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(drawn)
    for name, (mine, its) in found.told.items():
        console.print(f"{name}: {mine} in a, {its} in b", style="dim", highlight=False, markup=False)
    for line in found.flaws:
        console.print(line, highlight=False, markup=False)
    for line in (
        *found.measured,
        "a, b: against the full model of the same run, with 95 % intervals, times with their 5th to 95th percentile; "
        "b - a: on the same pictures, with a 95 % interval.",
    ):
        console.print(line, style="dim", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
