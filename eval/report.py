"""Prints the tables of finished runs: `python -m eval.report runs/NAME`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import EvalError
from .common.cli import Help, Parser, as_path, at_least, command
from .common.files import check_place, png, write
from .reporting import pareto as frontier
from .reporting.html import GRID_ROWS, grid
from .reporting.results import draw, joined, with_times
from .reporting.tables import markdown, markdown_against, with_rows

EXAMPLES = """examples:
  python -m eval.report runs/try
      report.html and grid.png anew
  python -m eval.report runs/try --markdown --rows full 'tofu 50%' --columns speed-up LPIPS-alex
      a part of the table, for a page
  python -m eval.report runs/try --against 'tome 50%'
      how far every method is from that one, picture by picture
  python -m eval.report runs/half runs/quarter --frontier
      the methods that no other beats in both cost and quality, and the call for each, of two runs of the same settings
  python -m eval.report runs/half runs/quarter --times runs/speed --plot frontier.svg
      the same as a drawing, by the times of a third run, in which all their methods took turns
"""
TAKES = {  # what of --rows, --columns, --by, --times and --first the parts of a report take
    "markdown": ("rows", "columns", "times"), "against": ("rows",), "grid": ("rows", "first"),
    "frontier": ("by", "times"), "plot": ("rows", "times"),
}  # fmt: skip


def parser() -> Parser:
    p = Parser(
        prog="python -m eval.report",
        description="Draw the report of a run anew, or print or draw a part of it.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    p.add_argument(
        "out", type=as_path, nargs="+", help="folder of eval.run; several of the same settings for a table or plot"
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--markdown", action="store_true", help="print the table for a README, write nothing")
    what.add_argument("--against", metavar="ROW", help="print how each row differs from this one, say 'tome 50%%'")
    what.add_argument("--frontier", action="store_true", help="print the methods that no other beats in both, and how")
    what.add_argument("--plot", type=as_path, metavar="FILE", help="write quality against cost as a drawing, as SVG")
    what.add_argument("--grid", type=as_path, metavar="FILE", help="write the pictures of --rows side by side, as PNG")
    p.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="of the table, say full 'tofu 50%%'")
    p.add_argument("--columns", nargs="+", default=[], metavar="TITLE", help="of the table, say speed-up PSNR")
    p.add_argument("--by", choices=list(frontier.COSTS), help="the cost of --frontier (default: the first it has)")
    p.add_argument(
        "--times",
        type=as_path,
        metavar="DIR",
        help="take the times of this run of the same settings, of any machine",
    )
    p.add_argument("--first", type=at_least(1), metavar="N", help=f"so many prompts in the grid ({GRID_ROWS})")
    return p


@command(goes_on=False)
def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    part = next((name for name in TAKES if getattr(options, name)), "")
    for name in ("rows", "columns", "by", "times", "first"):
        if getattr(options, name) and name not in TAKES.get(part, ()):
            raise EvalError(f"--{name} says nothing of {f'--{part}' if part else 'the whole report'}")
    out = options.out[0]
    for name in ("plot", "grid"):
        if (place := getattr(options, name)) is not None:
            check_place(place, f"--{name}")
    if len(options.out) > 1 and part in ("", "grid"):
        raise EvalError(f"{'--grid' if part else 'the whole report'} shows the pictures of one folder")
    found, images = joined(options.out)
    if options.times:
        found = with_times(found, out, options.times)
    found = with_rows(found, options.rows)
    if options.against is not None:
        print(markdown_against(found, images, options.against), end="")
    elif options.markdown:
        print(markdown(found, options.columns), end="")
    elif options.frontier:
        print(frontier.markdown(found, options.by), end="")
    elif options.plot:
        write(options.plot, frontier.svg(found))
    elif options.grid:
        write(options.grid, png(grid(out, found, images, options.first or GRID_ROWS)))
    else:
        draw(out)
        print(f"wrote {out / 'report.html'} and {out / 'grid.png'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
