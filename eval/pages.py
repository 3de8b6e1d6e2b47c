"""Tables in pages: `python -m eval.pages README.md docs/results.md` writes each anew from the results it names.

A table stands between `<!-- python -m eval.report ARGUMENTS -->`, or eval.bench, eval.classify,
eval.condensation or tofu_sd.linearity in its place, and `<!-- end -->`; it is what that command prints.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

from . import EvalError
from .files import write

TABLE = re.compile(
    r"(<!-- python -m (eval\.(?:report|bench|classify|condensation)|tofu_sd\.linearity) (.*?) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)


def filled(page: str) -> str:
    """The page with every table as its command prints it now. EvalError for a command that fails."""
    return TABLE.sub(lambda found: found[1] + _printed(found[2], found[3]) + found[4], page)


def _printed(program: str, arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = importlib.import_module(program).main(shlex.split(arguments))
    if code:
        raise EvalError(f"{program} {arguments} failed")
    return text.getvalue()


def main(argv: list[str]) -> int:
    if not argv:
        print("usage: python -m eval.pages PAGE...", file=sys.stderr)
        return 2
    try:
        for page in map(Path, argv):
            write(page, filled(page.read_text(encoding="utf-8")))
    except (EvalError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
