"""Prints the tables of finished runs: `python -m eval.report runs/NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from . import EvalError
from .common.cli import Help, Parser, as_path, command, integer_from
from .common.files import check_place, png, write
from .common.schema_changes import METRIC_NAMES
from .methods.method import BASELINE
from .methods.registry import BASELINE_ALIAS
from .reporting import pareto
from .reporting.drawings import disagreement, pareto_plot
from .reporting.drawings.pictures import GRID_ROWS, grid
from .reporting.results import merge_runs, with_times, write_report
from .reporting.tables import markdown, markdown_against, with_rows

EXAMPLES = """examples:
  python -m eval.report runs/try
      writes report.html and grid.png again
  python -m eval.report runs/try --markdown --rows baseline 'tofu 50%' --columns speed-up LPIPS-alex
      some rows and columns of the table, for a page
  python -m eval.report runs/try --against 'tome 50%'
      the difference of every method from that one on the same images
  python -m eval.report runs/half runs/quarter --pareto
      the Pareto-optimal methods in cost and quality with the call for each, from two runs of the same settings
  python -m eval.report runs/half runs/quarter --times runs/speed --plot pareto.svg
      quality against cost as a plot, with the times of a third run that timed all the methods
  python -m eval.report runs/try --disagreement pair.png --rows 'faithful 50%' 'tome 50%'
      the image on which PSNR prefers one of the two and LPIPS or MS-SSIM the other, and how often that happens
"""
TAKES = {  # which of --rows, --columns, --by, --times and --first each part of a report uses
    "markdown": ("rows", "columns", "times"), "against": ("rows",), "grid": ("rows", "first"),
    "pareto": ("by", "times"), "plot": ("rows", "times"), "disagreement": ("rows",),
}  # fmt: skip

FILES = ("plot", "grid", "disagreement")  # parts that are written to the file that is named


def parser() -> Parser:
    """The parser of eval.report."""
    p = Parser(
        prog="python -m eval.report",
        description="Write the report of a run again, or print or plot a part of it.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    p.add_argument(
        "out", type=as_path, nargs="+", help="folder of a run; several of the same settings for a table or plot"
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--markdown", action="store_true", help="print the table for a README, write nothing")
    what.add_argument(
        "--against", metavar="ROW", help="print the difference of each row from this one, such as 'tome 50%%'"
    )
    what.add_argument("--pareto", action="store_true", help="print the Pareto-optimal methods and the call for each")
    what.add_argument("--plot", type=as_path, metavar="FILE", help="write a plot of quality against cost, as SVG")
    what.add_argument("--grid", type=as_path, metavar="FILE", help="write the images of --rows side by side, as PNG")
    what.add_argument(
        "--disagreement",
        type=as_path,
        metavar="FILE",
        help="write the image on which PSNR and LPIPS or MS-SSIM prefer different ones of two --rows, as PNG",
    )
    p.add_argument(
        "--rows", nargs="+", default=[], metavar="ROW", help="rows of the table, such as baseline 'tofu 50%%'"
    )
    p.add_argument(
        "--columns", nargs="+", default=[], metavar="TITLE", help="columns of the table, such as speed-up PSNR"
    )
    p.add_argument("--by", choices=list(pareto.COSTS), help="the cost of --pareto (default: the first one available)")
    p.add_argument(
        "--times",
        type=as_path,
        metavar="DIR",
        help="use the times of this run of the same settings, from any machine",
    )
    p.add_argument("--first", type=integer_from(1), metavar="N", help=f"prompts in the grid ({GRID_ROWS})")
    return p


@command(resumes=False)
def main(argv: Sequence[str]) -> int:
    """Writes the report of a run again, or prints or plots a part of it."""
    options = parser().parse_args(argv)
    part = next((name for name in TAKES if getattr(options, name)), "")
    for name in ("rows", "columns", "by", "times", "first"):
        if getattr(options, name) and name not in TAKES.get(part, ()):
            raise EvalError(f"--{name} has no effect on {f'--{part}' if part else 'the whole report'}")
    out = options.out[0]
    for name in FILES:
        if (place := getattr(options, name)) is not None:
            check_place(place, f"--{name}")
    if len(options.out) > 1 and part in ("", "grid", "disagreement"):
        raise EvalError(f"{f'--{part}' if part else 'the whole report'} shows the images of one folder")
    found, images = merge_runs(options.out)
    if options.times:
        found = with_times(found, out, options.times)
    found = with_rows(found, [BASELINE.name if row == BASELINE_ALIAS else row for row in options.rows])
    if options.against is not None:
        print(markdown_against(found, images, options.against), end="")
    elif options.markdown:
        print(markdown(found, [METRIC_NAMES.get(title, title) for title in options.columns]), end="")
    elif options.pareto:
        print(pareto.markdown(found, options.by), end="")
    elif part in FILES:
        _draw(options, found, images)
    else:
        write_report(out)
        print(f"wrote {out / 'report.html'} and {out / 'grid.png'}", file=sys.stderr)
    return 0


def _draw(options: argparse.Namespace, found: dict[str, Any], images: list[dict[str, str]]) -> None:
    """Writes the plot or the images."""
    if options.plot:
        write(options.plot, pareto_plot.svg(found))
    elif options.grid:
        write(options.grid, png(grid(options.out[0], found, images, options.first or GRID_ROWS)))
    else:
        sheet, text = disagreement.draw(options.out[0], found, images, options.rows)
        write(options.disagreement, png(sheet))
        print(text)


if __name__ == "__main__":
    sys.exit(main())
