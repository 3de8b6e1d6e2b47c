"""Evaluates token reduction in classifiers: `python -m research.classifiers.classify`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from eval.common.cli import Help, Parser, as_path, command, explicit_options, integer_from, integers
from eval.common.devices import add_device, add_dtype
from eval.common.files import check_place, write
from eval.reporting.tables import markdown_rows, terminal_rows
from tofu_sd.vit.methods import RECIPES

from .evaluate import deviation, refuse_idle, run
from .figures import linearity_plot, plot
from .tables import cells, linearity_table, notes, read, select_rows

EXAMPLES = """examples:
  python -m research.classifiers.classify --method full,tome,tofu-avg,tofu --r 8,12,16,20
      ToFu's tables 1 and 2 on the embedded classifiers
  python -m research.classifiers.classify --method full,tome --r 8,13 --model deit_small_patch16_224.fb_in1k --data val
      the same on ImageNet's validation images, a folder of 1,000 folders
  python -m research.classifiers.classify --method full,PPPPPPAAAAAA,AAAAAAPPPPPP --r 16
      ToFu's table 3: which layers prune and which average
  python -m research.classifiers.classify --noise 0.18
      the same on images that are harder to classify
  python -m research.classifiers.classify --method tome,tofu,atm --stress
      ATM's table 1: the most that each method saves at full accuracy
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m research.classifiers.classify",
        description="Accuracy, FLOPs and speed of classifiers under token reduction.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.add_argument(
        "--model",
        default="demo",
        help="demo, folders of research.classifiers.train separated by commas, or a model of timm's",
    )
    p.add_argument("--data", default="scenes", help="scenes, or a folder with a folder of images for each class")
    p.add_argument(
        "--method",
        default="baseline,tome,tofu-avg,tofu,prune,mlerp,atm",
        metavar="A,B",
        help=f"baseline, {', '.join(RECIPES)}, with any @option=value; words such as PPPPPPAAAAAA, a letter per layer",
    )
    p.add_argument(
        "--r",
        type=integers,
        metavar="N,N",
        help="tokens merged in each layer (default: 8,12,16,20; with --stress: all that are possible)",
    )
    p.add_argument("--limit", type=integer_from(1), metavar="N", help="only the first N images (default: all)")
    p.add_argument(
        "--noise",
        type=deviation,
        default=0.0,
        metavar="SIGMA",
        help="Gaussian noise on images in 0..1 (default: none)",
    )
    p.add_argument(
        "--batch", type=integer_from(1), default=64, help="images in a batch; ATM merges equally many in all of them"
    )
    p.add_argument(
        "--rounds", type=integer_from(0), default=10, help="timed batches of each method, interleaved; 0 for none"
    )
    p.add_argument("--stress", action="store_true", help="find the largest r of each method at full accuracy")
    add_device(p)
    add_dtype(p, "float32")  # in which the papers measure
    p.add_argument("--out", type=as_path, metavar="DIR", help="folder (default: runs/classify-MODEL)")
    p.add_argument(
        "--maps", type=as_path, metavar="FILE", help="draw which patches are merged in the last layers, as PNG"
    )
    p.add_argument("--plot", type=as_path, metavar="FILE", help="write the plot, as SVG")
    p.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="rows of --table, such as full 'tome, r = 16'")
    show = p.add_mutually_exclusive_group()
    show.add_argument(
        "--table", type=as_path, metavar="DIR", help="measure nothing; print a folder's table in Markdown"
    )
    show.add_argument(
        "--linearity", type=as_path, metavar="DIR", help="the same for each layer's functional linearity (ToFu Fig. 3)"
    )
    return p


@command(resumes=True)
def main(argv: Sequence[str]) -> int:
    """Returns 0; 2 after an error in the options; 130 after an interrupt."""
    options = parser().parse_args(argv)
    refuse_idle(options, explicit_options(parser(), argv))
    for name in ("out", "maps", "plot"):
        if (place := getattr(options, name)) is not None:
            check_place(place, f"--{name}", folder=name == "out")  # before minutes of measuring
    if options.table:
        results = read(options.table)
        print(
            markdown_rows(*cells({**results, "rows": select_rows(results["rows"], options.rows)}), notes(results)),
            end="",
        )
        if options.plot:
            write(options.plot, plot(results))
        return 0
    if options.linearity:
        results = read(options.linearity)
        print(markdown_rows(*linearity_table(results)), end="")
        if options.plot:
            write(options.plot, linearity_plot(results))
        return 0
    results, out = run(options, argv)
    terminal_rows("", *cells(results), notes(results), Console(width=None if sys.stdout.isatty() else 120))
    print(f"results: {out / 'classify.json'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
