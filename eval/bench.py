"""Times methods side by side: `python -m eval.bench`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from rich.console import Console

from .common.cli import Help, Parser, as_path, command, integer_from
from .common.devices import add_device, add_dtype
from .common.files import check_place, to_json, write_results
from .methods.method import BASELINE
from .methods.registry import BASELINE_ALIAS
from .speed.benchmark import DEFAULT_METHODS, DEFAULT_SCOPES, TRANSFORMER_DEFAULTS, bench
from .speed.contender import BACKENDS, MODES, SCOPES
from .speed.model_shapes import CASES
from .speed.tables import markdown, part, quality, read, terminal
from .speed.transformer_shapes import CASES as TRANSFORMERS

EXAMPLES = """examples:
  python -m eval.bench --quick
      the attention of Stable Diffusion 1.5 at 512 px, with and without merging
  python -m eval.bench --case sd15-1024 --method tomesd,tofu,faithful --compile no,default --out bench.json
      also a UNet step of larger images, compiled and not
  python -m eval.bench --case sd3-medium-1024,flux1-2048 --batch 1
      one block of each kind of diffusion transformers, and the ceilings of a step
  python -m eval.bench --table bench.json --scope unet
      a part of the results, for a page
"""


def parser() -> Parser:
    """The parser of eval.bench."""
    p = Parser(
        prog="python -m eval.bench",
        description="Time, memory and the share of the ideal saving, at the sizes of real models with random weights.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.add_argument("--case", default="sd15-512", metavar="A,B", help=", ".join([*CASES, *TRANSFORMERS]))
    scope, methods = TRANSFORMER_DEFAULTS
    p.add_argument(
        "--scope",
        metavar="A,B",
        help=f"{', '.join(SCOPES)} (default: {DEFAULT_SCOPES}; {scope} of transformers, which have no scope attention)",
    )
    p.add_argument(
        "--method",
        metavar="A,B",
        help=f"as in eval.run; baseline and ideal always run (default: {DEFAULT_METHODS}; of transformers {methods})",
    )
    p.add_argument("--ratio", type=float, default=0.5, help="proportion of tokens merged")
    p.add_argument("--batch", type=integer_from(1), default=2, help="samples of a step: two for an image with guidance")
    p.add_argument("--compile", default="no", metavar="A,B", help=f"modes of torch.compile: {', '.join(MODES)}")
    p.add_argument("--backend", default="default", metavar="A,B", help=", ".join(BACKENDS))
    p.add_argument("--rounds", type=integer_from(2), default=20, help="timed samples of each row")
    p.add_argument("--minutes", type=integer_from(1), metavar="N", help="start no setup after N minutes")
    p.add_argument(
        "--quick", action="store_true", help="only the attention of sd15-512, within three minutes on two cores"
    )
    add_device(p)
    add_dtype(p)
    p.add_argument("--out", type=as_path, metavar="FILE", help="also write the results to this file, as JSON")
    p.add_argument("--json", action="store_true", help="print the rows as JSON and nothing else on stdout")
    p.add_argument(
        "--table",
        type=as_path,
        metavar="FILE",
        help="measure nothing; print the rows of FILE, of --scope and --method, for a page",
    )
    p.add_argument(
        "--quality",
        type=as_path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="runs of eval.run whose quality is added to --table",
    )
    return p


@command(resumes=False)
def main(argv: Sequence[str]) -> int:
    """Measures, or prints a table of earlier results. Exit codes: 0, 2 for wrong options, 130 after Ctrl-C."""
    options = parser().parse_args(argv)
    if options.table:
        method = re.sub(rf"(?<![\w:]){BASELINE_ALIAS}(?![\w:@])", BASELINE.name, options.method or "")
        found = part(read(options.table), options.scope, method)
        print(markdown(found, quality(options.quality)), end="")
        return 0
    if options.out:
        check_place(options.out, "--out")  # before minutes of measuring
    with contextlib.redirect_stdout(sys.stderr) if options.json else nullcontext():
        found = bench(options, argv)
    if options.out:
        write_results(options.out, found)
    if options.json:
        print(to_json(found["rows"]), end="")
    else:
        terminal(found, Console(width=None if sys.stdout.isatty() else 120))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
