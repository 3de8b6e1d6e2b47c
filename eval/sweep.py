"""Runs a grid of methods and plots quality against cost: `python -m eval.sweep`.

Every reduction in every form at every ratio, with every option, and other people's methods, as one run of eval.run. All
options of eval.run work here too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tofu_sd import recipes

from . import EvalError
from .common.cli import Help, Parser, choices, command
from .evaluation.options import parser as run_parser
from .evaluation.printed import run_and_print
from .images.model import denoiser_class
from .methods.registry import known_methods

FORMS = {"plain": "{}", "p": "{}+p", "kv": "kv:{}", "kv+p": "kv:{}+p"}
REDUCTIONS = ("tofu", "tome", "prune", "mlerp")

EXAMPLES = """examples:
  python -m eval.sweep
      prune, mean, MLERP and the hybrid, with and without log n, for all tokens or only keys and values; `faithful`
      and `asymmetric`; at three ratios; and all other methods
  python -m eval.sweep --reduction tofu,tome --form plain,p --ratio 0.5 --with window=8 --with match_interval=3
      two of them, also in windows, also with matching in every third step
  python -m eval.sweep --model MODEL --prompts imagenet1k --limit 200 --dry-run
      what that would generate with your own model
"""


def parser() -> Parser:
    """The parser of eval.sweep, without the options of eval.run."""
    p = Parser(
        prog="python -m eval.sweep",
        description="Quality against time over a grid of methods. Takes eval.run's options but --method, --suite.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.add_argument("--reduction", default=",".join(REDUCTIONS), metavar="A,B", help=", ".join(recipes.RECIPES))
    p.add_argument("--form", default=",".join(FORMS), metavar="A,B", help=f"{', '.join(FORMS)}")
    p.add_argument("--ratio", default="0.25,0.5,0.75", metavar="R,R", help="proportions of tokens merged")
    p.add_argument(
        "--with",
        dest="options",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="each method also with this option",
    )
    p.add_argument(
        "--also",
        metavar="A,B",
        help="further methods, as in eval.run, or none (default: faithful, asymmetric and others that fit the model)",
    )
    return p


def others(model: str) -> list[str]:
    """The further methods: recipes outside the grid, and those that are not this package's and fit the model."""
    denoiser = denoiser_class(model)
    stacked = [f"{name}:tofu" for name in known_methods(stackable=True, denoiser=denoiser)]
    return ["faithful", "asymmetric", *known_methods(denoiser=denoiser), *stacked]


def grid(reductions: str, forms: str, options: Sequence[str], also: str) -> str:
    """The value of --method for a grid."""
    names = [
        FORMS[form].format(reduction) + (f"@{option}" if option else "")
        for reduction in choices(reductions, recipes.RECIPES, "reduction")
        for form in choices(forms, FORMS, "form")
        for option in ("", *options)
    ]
    return ",".join(names + ([] if also == "none" else also.split(",")))


@command(resumes=True)
def main(argv: Sequence[str]) -> int:
    """Runs the grid, with the exit codes of eval.run."""
    options, rest = parser().parse_known_args(argv)
    if any(option.partition("=")[0] in ("--method", "--suite") for option in rest):
        raise EvalError("the grid names the methods: --reduction, --form, --with and --also")
    also = options.also or ",".join(others(run_parser().parse_args(rest).model))
    methods = grid(options.reduction, options.form, options.options, also)
    flops = [] if "--metrics-only" in rest else ["--flops"]
    return run_and_print(["--method", methods, "--ratio", options.ratio, *flops, *rest])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
