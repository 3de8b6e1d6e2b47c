"""Prints the prompts of a list: `python -m eval.prompts imagenet1k`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .common.cli import Help, Parser, command
from .images.requests import KNOWN, load_requests

EXAMPLES = """examples:
  python -m eval.prompts imagenet1k
      a prompt for each class of ImageNet, twice, as in the paper
  python -m eval.prompts mine.jsonl
      checks that your own list can be read
"""


def parser() -> Parser:
    """The parser of eval.prompts."""
    p = Parser(
        prog="python -m eval.prompts",
        description="Print a list of prompts, one on each line.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    p.add_argument("name", help=f"{', '.join(KNOWN)}, or a .txt or .jsonl file")
    return p


@command(resumes=False)
def main(argv: Sequence[str]) -> int:
    """Prints the prompts of a list."""
    for request in load_requests(parser().parse_args(argv).name):
        print(request.prompt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
