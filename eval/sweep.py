"""Grids of methods, and which of them are worth it: `python -m eval.sweep`.

Every reduction in every form at every ratio, with every option, and the peers, as one run of eval.run; its report then
draws quality against time and operations. What is not said here is said to eval.run, whose options all hold.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tofu_sd import recipes

from . import EvalError
from .common.cli import Help, Parser, choices, command
from .evaluation.printed import run_and_print
from .methods.registry import known_methods

FORMS = {"plain": "{}", "p": "{}+p", "kv": "kv:{}", "kv+p": "kv:{}+p"}
REDUCTIONS = ("tofu", "tome", "prune", "mlerp")

EXAMPLES = """examples:
  python -m eval.sweep
      prune, mean, MLERP and the hybrid, with log n or not, of all or of keys and values, and `faithful`, at three
      ratios; and all peers
  python -m eval.sweep --reduction tofu,tome --form plain,p --ratio 0.5 --with window=8 --with match_interval=3
      two of them, each also in windows, each also matched every third step
  python -m eval.sweep --model MODEL --prompts imagenet1k --limit 200 --dry-run
      what that would draw with a model of one's own
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m eval.sweep",
        description="Quality against time over a grid of methods. eval.run's options hold, but --method and --suite.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.add_argument("--reduction", default=",".join(REDUCTIONS), metavar="A,B", help=", ".join(recipes.RECIPES))
    p.add_argument("--form", default=",".join(FORMS), metavar="A,B", help=f"{', '.join(FORMS)}")
    p.add_argument("--ratio", default="0.25,0.5,0.75", metavar="R,R", help="share of tokens fused away")
    p.add_argument(
        "--with", dest="options", action="append", default=[], metavar="OPTION=VALUE", help="each again with this"
    )
    p.add_argument(
        "--also",
        default=",".join(_others()),
        metavar="A,B",
        help="methods beside the grid, as eval.run takes them, or none",
    )
    return p


def _others() -> list[str]:
    """What is run beside the grid: a recipe that is no point of it, and all methods that are not this package's."""
    return ["faithful", *known_methods(), *(f"{name}:tofu" for name in known_methods(stackable=True))]


def grid(reductions: str, forms: str, options: Sequence[str], also: str) -> str:
    """The methods of a grid as eval.run takes them."""
    names = [
        FORMS[form].format(reduction) + (f"@{option}" if option else "")
        for reduction in choices(reductions, recipes.RECIPES, "reduction")
        for form in choices(forms, FORMS, "form")
        for option in ("", *options)
    ]
    return ",".join(names + ([] if also == "none" else also.split(",")))


@command(goes_on=True)
def main(argv: Sequence[str]) -> int:
    """Runs the grid; the codes are eval.run's."""
    asked, rest = parser().parse_known_args(argv)
    if any(option.partition("=")[0] in ("--method", "--suite") for option in rest):
        raise EvalError("the grid names the methods: --reduction, --form, --with and --also")
    methods = grid(asked.reduction, asked.form, asked.options, asked.also)
    counted = [] if "--metrics-only" in rest else ["--flops"]
    return run_and_print(["--method", methods, "--ratio", asked.ratio, *counted, *rest])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
