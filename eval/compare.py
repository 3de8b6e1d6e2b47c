"""Compares two runs: `python -m eval.compare FIRST SECOND`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from .common.cli import Help, Parser, as_path, command
from .common.files import to_json
from .reporting.compare import compare
from .reporting.tables import terminal_rows

EXAMPLES = """examples:
  python -m eval.compare runs/yesterday runs/today
      the methods of both: each metric in either run, and the difference on the same images
  python -m eval.compare runs/a runs/b --json
      the same as JSON
"""


def parser() -> Parser:
    """The parser of eval.compare."""
    p = Parser(
        prog="python -m eval.compare",
        description="Two runs of eval.run side by side.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    p.add_argument("a", type=as_path, metavar="FIRST", help="folder of a run, `a` in the table")
    p.add_argument("b", type=as_path, metavar="SECOND", help="folder of another run, `b` in the table")
    p.add_argument("--json", action="store_true", help="print it as JSON")
    return p


@command(resumes=False)
def main(argv: Sequence[str]) -> int:
    """Compares two runs."""
    options = parser().parse_args(argv)
    found = compare(options.a, options.b)
    if options.json:
        print(
            to_json(
                {
                    "differences": found.differences,
                    "rows": found.rows,
                    "metrics": found.metrics,
                    "warnings": found.warnings,
                }
            ),
            end="",
        )
        return 0
    titles, lines, last = ["method", "figure", "a", "b", "b - a"], list[list[str]](), ""
    for row in found.rows:
        lines.append(["" if row["method"] == last else row["method"], *(row[title] for title in titles[1:])])
        last = row["method"]
    console = Console(width=None if sys.stdout.isatty() else 120)
    terminal_rows(f"{options.a.name} and {options.b.name}", titles, lines, [], console, left=2)
    for name, (mine, its) in found.differences.items():
        console.print(f"{name}: {mine} in a, {its} in b", style="dim", highlight=False, markup=False)
    for line in found.warnings:
        console.print(line, highlight=False, markup=False)
    for line in (
        *found.metrics,
        "a, b: against the baseline of the same run, with 95 % intervals, times with their 5th to 95th percentile; "
        "b - a: on the same images, with a 95 % interval.",
    ):
        console.print(line, style="dim", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
