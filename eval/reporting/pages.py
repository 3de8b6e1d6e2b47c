"""Prints the tables of pages again from the results they name: `python -m eval.reporting.pages README.md`.

A table stands between `<!-- python -m eval.report ARGUMENTS -->`, or eval.bench, research.classifiers.classify,
research.adaptivision.ablations or tofu_sd.linearity in its place, and `<!-- end -->`; it is what that command prints.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Sequence

from .. import EvalError
from ..common.cli import Help, Parser, as_path, command
from ..common.files import read_text, write

TABLE = re.compile(
    r"(<!-- python -m (eval\.(?:report|bench|classify|condensation)|tofu_sd\.linearity) (.*?) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)


def filled(page: str) -> str:
    """The page with every table as its command prints it now. EvalError for a command that fails."""
    return TABLE.sub(lambda found: found[1] + _printed(found[2], found[3]) + found[4], page)


def _printed(program: str, arguments: str) -> str:
    try:
        argv = shlex.split(arguments)
    except ValueError as error:
        raise EvalError(f"{program} {arguments}: the arguments cannot be read: {error}") from error
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = importlib.import_module(program).main(argv)
    if code:
        raise EvalError(f"{program} {arguments} failed")
    return text.getvalue()


EXAMPLES = """examples:
  python -m eval.reporting.pages README.md docs/results.md
      their tables, as the commands above them print them now
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m eval.reporting.pages",
        description="Write the tables of pages anew, from the results that they name.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    p.add_argument("pages", type=as_path, nargs="+", metavar="PAGE", help="a page in Markdown")
    return p


@command(resumes=False)
def main(argv: Sequence[str]) -> int:
    for page in parser().parse_args(argv).pages:
        try:
            text = read_text(page)
        except ValueError as error:
            raise EvalError(f"cannot read the page {page.name}: {error}") from error
        write(page, filled(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
