"""Prints the tables of pages again from the results they name: `python -m eval.reporting.pages`.

A table stands between `<!-- python -m eval.report ARGUMENTS -->`, or one of the other `PROGRAMS`, and `<!-- end -->`.
It is what that command prints.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tofu_sd import TokenFusionConfig
from tofu_sd.options import describe_options

from .. import EvalError
from ..common.cli import Help, Parser, as_path, command
from ..common.files import read_text, write
from . import records

OPTIONS = "tofu_sd.config"
PROGRAMS = (
    "eval.report",
    "eval.bench",
    "eval.validate",
    "eval.support",
    "research.classifiers.classify",
    "research.adaptivision.ablations",
    "tofu_sd.linearity",
    OPTIONS,
)
TABLE = re.compile(
    rf"(<!-- python -m ({'|'.join(map(re.escape, PROGRAMS))})( .*?)? -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
RESULTS = Path("benchmarks/results")


def filled(page: str, to_root: str = "") -> str:
    """The page with every table as its command prints it now, run where the results are.

    to_root: from the page's folder to that of the results, such as "../"; links are relative to the page.

    Raises:
        EvalError: a command fails.
    """

    def table(match: re.Match[str]) -> str:
        printed = _printed(match[2], match[3] or "")
        return match[1] + printed.replace(f"]({RESULTS}/", f"]({to_root}{RESULTS}/") + match[4]

    return TABLE.sub(table, page)


def _printed(program: str, arguments: str) -> str:
    if program == OPTIONS:
        return describe_options(TokenFusionConfig) + "\n"
    try:
        argv = shlex.split(arguments)
    except ValueError as error:
        raise EvalError(f"{program}{arguments}: the arguments cannot be read: {error}") from error
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = importlib.import_module(program).main(argv)
    if code:
        raise EvalError(f"{program}{arguments} failed")
    return text.getvalue()


def pages_of(root: Path) -> list[Path]:
    """README.md and the pages of docs/ and docs/tables/, relative to `root`."""
    found = [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted((root / "docs/tables").glob("*.md"))]
    return [page.relative_to(root) for page in found]


EXAMPLES = """examples:
  python -m eval.reporting.pages
      the records of benchmarks/results and the tables of all pages, from the root of a checkout
  python -m eval.reporting.pages docs/tables/quality.md
      the tables of one page, as the commands above them print them now
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m eval.reporting.pages",
        description="Write the tables of pages again, from the results that they name.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    p.add_argument("pages", type=as_path, nargs="*", metavar="PAGE", help="a page in Markdown (default: all pages)")
    return p


@command(resumes=False)
def main(argv: Sequence[str]) -> int:
    pages = parser().parse_args(argv).pages
    if not pages:
        for file, text in records.written(RESULTS):
            write(file, text)
    for page in pages or pages_of(Path()):
        try:
            text = read_text(page)
        except ValueError as error:
            raise EvalError(f"cannot read the page {page.name}: {error}") from error
        write(page, filled(text, to_root(page)))
    return 0


def to_root(page: Path) -> str:
    """From the folder of a page, given relative to the root, back to the root."""
    return "" if page.is_absolute() else "../" * (len(page.parts) - 1)


if __name__ == "__main__":
    sys.exit(main())
