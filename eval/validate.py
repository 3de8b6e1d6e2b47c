"""Measures whether a model predicts what methods do to photographs: `python -m eval.validate`.

A model that fails a criterion is a weak witness: nothing should be recommended on its word.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tofu_sd.demo.models import EMBEDDED

from . import EvalError
from .common import formats
from .common.cli import Help, Parser, as_path, command, integer_from
from .common.devices import add_device
from .common.files import check_place, write_results
from .common.schema_changes import SCHEMA
from .metrics.statistics import MIN_GROUPS
from .reporting.footnotes import RECORD
from .reporting.tables import markdown_rows, terminal_rows

FILE = "validity.json"
TITLES = ["criterion", "measured", "required", "holds"]

EXAMPLES = """examples:
  python -m eval.validate --model demo-textures
      24 images of each of 23 methods, an hour on two cores; an interrupted run resumes
  python -m eval.validate --table runs/validity-demo-textures
      the table of a finished run in Markdown
"""


def parser() -> Parser:
    """The parser of eval.validate."""
    p = Parser(
        prog="python -m eval.validate",
        description="Measure whether a model predicts what methods do to photographs.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.add_argument("--model", default="demo", help=f"{', '.join(EMBEDDED)}, or a diffusers text-to-image model")
    p.add_argument("--limit", type=integer_from(MIN_GROUPS), default=24, metavar="N", help="images of each method")
    p.add_argument(
        "--lpips-backbone", type=as_path, metavar="FILE", help="SqueezeNet's weights; without them LPIPS is left out"
    )
    add_device(p)
    p.add_argument("--out", type=as_path, metavar="DIR", help="folder (default: runs/validity-MODEL)")
    p.add_argument("--table", type=as_path, metavar="DIR", help="measure nothing; print a finished run in Markdown")
    return p


@command(resumes=True)
def main(argv: Sequence[str]) -> int:
    """Returns 0; 2 after an error in the options; 130 after an interrupt."""
    options = parser().parse_args(argv)
    if options.table:
        print(markdown(read(options.table)), end="")
        return 0
    options.out = options.out or Path("runs") / f"validity-{Path(options.model).name}"
    check_place(options.out, "--out", folder=True)
    from .validity.measurement import measure

    found = measure(options, argv)
    write_results(options.out / FILE, found)
    console = Console(width=None if sys.stdout.isatty() else 120)
    terminal_rows(f"{options.model}: does it predict?", TITLES, cells(found), notes(found), console)
    return 0


def read(out: Path) -> dict[str, Any]:
    """Reads validity.json. EvalError where it is missing or damaged."""
    if not out.is_dir():
        raise EvalError(f"{out} is no folder")
    found = formats.read(out / FILE, formats.VALIDITY, SCHEMA, "eval.validate", out.name)
    if (out / RECORD).exists():
        found["provenance"]["record"] = f"[{out.name}]({(out / RECORD).as_posix()})"
    return found


def cells(found: dict[str, Any]) -> list[list[str]]:
    """Returns the cells of each row."""
    return [
        [row["name"], row["measured"], row["required"], "yes" if row["holds"] else "**no**"] for row in found["rows"]
    ]


def notes(found: dict[str, Any]) -> list[str]:
    """Returns the lines below the table."""
    s, provenance = found["settings"], found["provenance"]
    failed = sum(not row["holds"] for row in found["rows"])
    lines = [
        f"{s['model']}, {s['n']} images a method, {s['steps']} steps, {s['size']} px, {s['dtype']} on {s['device']}, "
        f"commit {provenance['commit'] or 'unknown'}; intervals 95 %.",
        f"{len(found['rows']) - failed} of {len(found['rows'])} criteria hold."
        + (" Nothing should be recommended on this model's word alone." if failed else ""),
    ]
    return [*lines, *([provenance["record"]] if "record" in provenance else [])]


def markdown(found: dict[str, Any]) -> str:
    """Returns the table for a page."""
    return markdown_rows(TITLES, cells(found), notes(found))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
