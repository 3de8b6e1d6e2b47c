"""The options of `eval.run`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from tofu_sd import demo, recipes
from tofu_sd.demo.models import EMBEDDED

from .. import EvalError, suites
from ..common.cli import Help, Parser, as_path, explicit_options, finite, integer_from
from ..common.devices import add_device, add_dtype
from ..images.requests import KNOWN, default_prompts
from ..images.timing import TIMED
from ..methods.registry import known_methods
from ..metrics.clip import CLIP
from ..metrics.dino import DINO
from ..metrics.pairwise import LPIPS_NETS
from ..metrics.registry import NAMES

EXAMPLES = """examples:
  python -m eval.run --method tofu,tome
      ToFu and ToMe on the embedded model: 8 images each, minutes on two cores; --limit all takes all 96
  python -m eval.run --method tofu,kv:tome+p,tofu@window=8 --ratio 0.5,0.75 --seed-baseline
      more methods, each at two ratios, and the baseline under other seeds as a reference
  python -m eval.run --suite paper --model stable-diffusion-v1-5/stable-diffusion-v1-5
      ToFu's Table 5; --limit 20 to try it first, --dry-run to see what it would generate
  accelerate launch --num_processes 4 -m eval.run --suite paper
      the same on four GPUs; with a scheduler --shard 1/4 to --shard 4/4, then once without
"""


def parser() -> Parser:
    """The parser of eval.run."""
    p = Parser(
        prog="python -m eval.run",
        description="Speed and quality of methods against the baseline, the unpatched model, under the same seeds.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    _add_input_options(p)
    _add_image_options(p)
    _add_output_options(p)
    _add_stage_options(p)
    _add_metric_options(p)
    p.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 if something was skipped, or images are flat or NaN",
    )
    p.add_argument("--json", action="store_true", help="print the results as JSON and nothing else on stdout")
    return p


def _add_input_options(p: Parser) -> None:
    """Methods, model and prompts."""
    p.add_argument(
        "--method",
        default="tofu",
        metavar="A,B",
        help=f"baseline, {', '.join(recipes.RECIPES)}, also as kv:NAME, NAME+p, NAME@option=value; "
        f"{', '.join(known_methods())}; deepcache:NAME stacks the two, FILE.py:NAME loads one",
    )
    p.add_argument(
        "--suite", metavar="NAME", help=f"a named set of options: {', '.join(suites.NAMES)}; other options override it"
    )
    p.add_argument(
        "--model", default="demo", help=f"{', '.join(EMBEDDED)}, or a diffusers text-to-image model: its id or folder"
    )
    p.add_argument(
        "--variant",
        metavar="NAME",
        help="of the weights, such as fp16 (default: the plain ones, or fp16 if it is the only one)",
    )
    p.add_argument(
        "--prompts",
        help=f"{', '.join(KNOWN)}, or a .txt or .jsonl file (default: textures for demo-textures, else demo)",
    )
    p.add_argument(
        "--per-prompt", type=integer_from(1), default=1, metavar="N", help="images of each prompt of the list"
    )
    p.add_argument("--ratio", default="0.5", metavar="R,R", help="proportion of tokens merged; several give a row each")


def _add_image_options(p: Parser) -> None:
    """What decides the images."""
    p.add_argument("--steps", type=integer_from(1), default=20, help="sampling steps")
    p.add_argument("--size", type=integer_from(8), help="pixels a side (default: the model's own)")
    p.add_argument(
        "--seed", type=integer_from(0, 2**62), default=0, help="seed of the first image; the next ones follow"
    )
    p.add_argument("--batch", type=integer_from(1), default=4, help="images generated at once")
    p.add_argument(
        "--limit",
        type=limit,
        metavar="N",
        help="only the first N prompts of the list, or all (default: 8 of the embedded model's, else all)",
    )
    p.add_argument("--only", metavar="ID,A-B", help="only images of these ids or classes of the list: 0007_1,20-29")
    p.add_argument(
        "--guidance",
        type=finite,
        help=f"classifier-free guidance (default: the pipeline's; {demo.GUIDANCE:g} for {' and '.join(EMBEDDED)})",
    )
    add_device(p)
    add_dtype(p)


def _add_output_options(p: Parser) -> None:
    """Where the images go, and what else is recorded of them."""
    p.add_argument("--out", type=as_path, metavar="DIR", help="folder (default: one in runs/ named after the settings)")
    p.add_argument(
        "--reference", type=as_path, metavar="DIR", help="an earlier run, whose images of the baseline are copied"
    )
    p.add_argument(
        "--seed-baseline",
        action=argparse.BooleanOptionalAction,
        help="add the baseline under other seeds: how far unrelated images are",
    )
    p.add_argument(
        "--repeats", type=integer_from(1), default=1, metavar="N", help="generate each batch N times, time the fastest"
    )
    p.add_argument(
        "--timed",
        type=integer_from(0),
        default=TIMED,
        metavar="N",
        help="batches of each method in which the baseline runs too, step by step; 0: none, in half the time",
    )
    p.add_argument("--flops", action="store_true", help="also count the FLOPs of an image")
    p.add_argument("--maps", action="store_true", help="show merge maps in the report")
    p.add_argument(
        "--map-step",
        type=integer_from(1),
        metavar="N",
        help="merge maps of this step, from 1 (default: the middle one)",
    )
    p.add_argument(
        "--map-block",
        metavar="NAME",
        help="merge maps of blocks whose names contain this (default: the first and the last)",
    )


def _add_stage_options(p: Parser) -> None:
    """Which part of the work the run does."""
    stage = p.add_mutually_exclusive_group()
    stage.add_argument("--dry-run", action="store_true", help="print what would be generated, and stop")
    stage.add_argument("--generate-only", action="store_true", help="generate, and measure nothing")
    stage.add_argument("--metrics-only", action="store_true", help="generate nothing, measure the images in --out")
    stage.add_argument("--shard", type=shard, metavar="I/N", help="generate the I-th of N parts, and measure nothing")


def _add_metric_options(p: Parser) -> None:
    """Metrics and their networks."""
    p.add_argument("--metrics", default="standard", help=f"standard, all, or a list of {','.join(NAMES)}")
    p.add_argument("--lpips-net", default="alex", help=", ".join(LPIPS_NETS))
    p.add_argument(
        "--lpips-backbone",
        type=as_path,
        metavar="PATH",
        help="torchvision weights of that network (default: downloaded)",
    )
    p.add_argument("--inception-weights", type=as_path, metavar="PATH", help="for FID and KID (default: downloaded)")
    p.add_argument("--clip-model", default=CLIP, metavar="MODEL", help="for clip: its id or folder")
    p.add_argument("--dino-model", default=DINO, metavar="MODEL", help="for dino: its id or folder")


def limit(text: str) -> int | str:
    """Type of --limit: an integer >= 1, or 'all'."""
    number: int | str = "all" if text == "all" else integer_from(1)(text)
    return number


def shard(text: str) -> tuple[int, int]:
    """Type of --shard: '2/4' becomes (2, 4)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 1/4")
    return int(found[1]), int(found[2])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options on the command line, before those of a suite, before the defaults.

    Returns:
        The options. `typed` has the names of the first, `explicit` of the first two.
    """
    p = parser()
    options = p.parse_args(argv)
    of_suite = {}
    if options.suite is not None:
        of_suite = {name: value for name, value in suites.load(options.suite).items() if name != "about"}
        if unknown := sorted(of_suite.keys() - vars(options).keys()):
            raise EvalError(f"the suite {options.suite!r} has an unknown option {unknown[0]!r}")
        p.set_defaults(**of_suite)
        options = p.parse_args(argv)
    options.typed = explicit_options(p, argv)
    options.explicit = options.typed | of_suite.keys()
    if options.prompts is None:
        options.prompts = default_prompts(options.model)
    return options
