"""The options of `eval.run`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from tofu_sd import demo, recipes

from .. import EvalError, suites
from ..common.cli import Help, Parser, as_path, at_least, finite, said
from ..common.devices import add_device, add_dtype
from ..methods.registry import known_methods
from ..metrics import registry as metrics

EXAMPLES = """examples:
  python -m eval.run --method tofu,tome
      ToFu and ToMe on the embedded model, 96 pictures, minutes on two cores
  python -m eval.run --method tofu,kv:tome+p,tofu@window=8 --ratio 0.5,0.75 --scale-row
      more methods, each at two ratios, and how far other seeds are, for scale
  python -m eval.run --suite paper --model stable-diffusion-v1-5/stable-diffusion-v1-5
      ToFu's Table 5; --limit 20 to try it first, --dry-run to see what it would draw
  accelerate launch --num_processes 4 -m eval.run --suite paper
      the same on four GPUs; --shard 1/4 to --shard 4/4 where a scheduler starts them, then once without
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m eval.run",
        description="What token fusion costs and saves, against the full model under the same seeds.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.add_argument(
        "--method",
        default="tofu",
        metavar="A,B",
        help=f"full, {', '.join(recipes.RECIPES)}, also as kv:NAME, NAME+p, NAME@option=value; "
        f"{', '.join(known_methods())}; deepcache:NAME stacks the two, FILE.py:NAME loads one",
    )
    p.add_argument("--suite", metavar="NAME", help=f"options under a name: {', '.join(suites.NAMES)}; others override")
    p.add_argument("--model", default="demo", help="demo, or a diffusers text-to-image model: its id or folder")
    p.add_argument(
        "--variant", metavar="NAME", help="of the weights, as fp16 (default: the plain ones, or fp16 where it is alone)"
    )
    p.add_argument("--prompts", default="demo", help="demo, imagenet1k, or a .txt or .jsonl file")
    p.add_argument("--per-prompt", type=at_least(1), default=1, metavar="N", help="pictures of each prompt of the list")
    p.add_argument("--ratio", default="0.5", metavar="R,R", help="share of tokens fused away; several give a row each")
    p.add_argument("--steps", type=at_least(1), default=20, help="sampling steps")
    p.add_argument("--size", type=at_least(8), help="pixels a side (default: the model's own)")
    p.add_argument("--seed", type=at_least(0, 2**62), default=0, help="seed of the first picture; the others count on")
    p.add_argument("--batch", type=at_least(1), default=4, help="pictures drawn at once")
    p.add_argument("--limit", type=at_least(1), metavar="N", help="the first N of the list only (default: all)")
    p.add_argument("--only", metavar="ID,A-B", help="pictures of these ids or classes of the list only: 0007_1,20-29")
    p.add_argument(
        "--guidance",
        type=finite,
        help=f"classifier-free guidance (default: the pipeline's; {demo.GUIDANCE:g} for demo)",
    )
    add_device(p)
    add_dtype(p)
    p.add_argument("--out", type=as_path, metavar="DIR", help="folder (default: one in runs/ named after the settings)")
    p.add_argument("--reference", type=as_path, metavar="DIR", help="of an earlier run, for the full model's pictures")
    p.add_argument(
        "--scale-row", action=argparse.BooleanOptionalAction, help="add the full model under other seeds, for scale"
    )
    p.add_argument("--repeats", type=at_least(1), default=1, metavar="N", help="draw each batch N times, time the best")
    p.add_argument("--flops", action="store_true", help="count the floating-point operations of a picture too")
    p.add_argument("--maps", action="store_true", help="show in the report which token stood for which")
    p.add_argument("--map-step", type=at_least(1), metavar="N", help="at this step, from 1 (default: the middle one)")
    p.add_argument("--map-block", metavar="NAME", help="in blocks of such names (default: the first and the last)")
    stage = p.add_mutually_exclusive_group()
    stage.add_argument("--dry-run", action="store_true", help="say what would be drawn, and draw nothing")
    stage.add_argument("--generate-only", action="store_true", help="draw, and measure nothing")
    stage.add_argument("--metrics-only", action="store_true", help="draw nothing, measure what is in --out")
    stage.add_argument("--shard", type=shard, metavar="I/N", help="draw the I-th of N parts, and measure nothing")
    p.add_argument("--metrics", default="standard", help=f"standard, all, or some of {','.join(metrics.NAMES)}")
    p.add_argument("--lpips-net", default="alex", help=", ".join(metrics.LPIPS_NETS))
    p.add_argument(
        "--lpips-backbone", type=as_path, metavar="PATH", help="torchvision weights of that net (default: downloaded)"
    )
    p.add_argument("--inception-weights", type=as_path, metavar="PATH", help="for FID and KID (default: downloaded)")
    p.add_argument("--clip-model", default=metrics.CLIP, metavar="MODEL", help="for clip: its id or folder")
    p.add_argument("--dino-model", default=metrics.DINO, metavar="MODEL", help="for dino: its id or folder")
    p.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 if something was skipped, or pictures measured are flat or NaN",
    )
    p.add_argument("--json", action="store_true", help="print the results as JSON and nothing else on stdout")
    return p


def shard(text: str) -> tuple[int, int]:
    """'2/4' as (2, 4)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 1/4")
    return int(found[1]), int(found[2])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options typed, before those of a suite, before the defaults. `typed` names the first, `said` both."""
    p = parser()
    options = p.parse_args(argv)
    of_suite = {}
    if options.suite is not None:
        of_suite = {name: value for name, value in suites.load(options.suite).items() if name != "about"}
        if unknown := sorted(of_suite.keys() - vars(options).keys()):
            raise EvalError(f"the suite {options.suite!r} has an unknown option {unknown[0]!r}")
        p.set_defaults(**of_suite)
        options = p.parse_args(argv)
    options.typed = said(p, argv)
    options.said = options.typed | of_suite.keys()
    return options
