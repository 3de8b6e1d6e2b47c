"""Prints which features work with which diffusion transformers: `python -m eval.support`.

Each cell is found out by running a tiny random model of the family, with and without a patch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

import diffusers
import torch

from tofu_sd.utils import markdown_table

from .common.cli import Help, Parser, choices, command, progress
from .families.cells import ABSENT, REFUSED, WRONG, Cell, cell
from .families.features import FEATURES
from .families.tiny import FAMILIES

EXAMPLES = """examples:
  python -m eval.support
      every family, about a minute on one core
  python -m eval.support --family sd3,flux.1
      two of them
"""
HOW_TO_READ = """
- yes: tokens are merged, ratio 0 equals the unpatched model bit for bit, and so does the model without its patch again.
- refused: an error names the reason. … is the class of the model.
- –: diffusers does not have it, or fails without a patch.
"""


def parser() -> Parser:
    """The parser of eval.support."""
    p = Parser(
        prog="python -m eval.support",
        description="Print which features work with which diffusion transformers, in Markdown.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.add_argument("--family", default=",".join(FAMILIES), metavar="A,B", help="columns of the table")
    return p


@command(resumes=False)
def main(argv: Sequence[str]) -> int:
    """Prints the table. Exit codes: 0, 1 where something is wrong, 2 for wrong options, 130 after Ctrl-C."""
    families = choices(parser().parse_args(argv).family, FAMILIES, "family")
    pairs = [(feature, family) for feature in FEATURES for family in families]
    with _quiet():
        cells = {
            (feature.name, family): cell(family, FAMILIES[family], feature)
            for feature, family in progress(pairs, "features")
        }
    reasons: dict[str, int] = {}
    rows = [[f.name, *(_text(cells[f.name, family], reasons) for family in families)] for f in FEATURES]
    print("\n".join(markdown_table(["", *families], rows)))
    print(HOW_TO_READ)
    print("\n".join(markdown_table(["", "reason"], [[f"{n}", reason] for reason, n in reasons.items()], 2)))
    return int(any(each.kind == WRONG for each in cells.values()))


def _text(each: Cell, reasons: dict[str, int]) -> str:
    """Returns the text of a cell; adds its reason to the numbered ones."""
    if not each.reason:
        return each.kind
    number = reasons.setdefault(each.reason.replace("|", "\\|"), len(reasons) + 1)
    return f"{each.kind} {number}" if each.kind in (ABSENT, REFUSED) else f"**{each.kind}** {number}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, libraries do not log, and one thread runs: results must not depend on the machine."""
    threads, verbosity = torch.get_num_threads(), diffusers.logging.get_verbosity()
    disabled = logging.root.manager.disable
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        diffusers.logging.set_verbosity(verbosity)
        logging.disable(disabled)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
