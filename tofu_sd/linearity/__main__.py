"""Measures the functional linearity of every block of a model: `python -m tofu_sd.linearity`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..utils import show_log
from .curve import Curve, plot
from .measurement import MAX_IMAGES, PROMPTS, STEPS, measure, measure_classifier

EXAMPLES = """examples:
  python -m tofu_sd.linearity
      the embedded model
  python -m tofu_sd.linearity --model stabilityai/stable-diffusion-2-1-base --steps 20 --out linearity.json
      another model; every measurement is saved
  python -m tofu_sd.linearity --model vit_small_patch16_224.augreg_in1k --images imagenet/val
      a classifier of timm's (ToFu Fig. 3)
  python -m tofu_sd.linearity --table linearity.json --plot linearity.svg
      the table and the plot of a saved file
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m tofu_sd.linearity",
        description="Functional linearity (ToFu Eq. 8) of every block of a model, between pairs of tokens that would "
        "be merged, and the depth from which averaging is better than pruning.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--model",
        default="demo",
        help="demo, demo-textures, what from_pretrained takes, or a classifier of timm's (demo)",
    )
    generated = p.add_argument_group("text-to-image models")
    generated.add_argument("--prompt", action="append", help="may be given several times (default: four prompts)")
    generated.add_argument("--steps", type=int, help=f"sampling steps ({STEPS})")
    generated.add_argument("--ratio", type=float, help="share of tokens that would be merged (0.5)")
    generated.add_argument("--seed", type=int, help="seed of the images (0)")
    classifiers = p.add_argument_group("classifiers")
    classifiers.add_argument(
        "--images", metavar="DIR", help=f"folder of images, of which at most {MAX_IMAGES} are used"
    )
    p.add_argument("--out", metavar="FILE", help="save every measurement as JSON")
    p.add_argument("--table", metavar="FILE", help="measure nothing; print the table of a saved file")
    p.add_argument("--plot", metavar="FILE", help="plot linearity over depth, as SVG or PNG (needs matplotlib)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after an error, which is printed in one line."""
    show_log()
    options = parser().parse_args(argv)
    try:
        curve = Curve.read(options.table) if options.table else _measured(options)
        if options.out:
            Path(options.out).write_text(json.dumps(asdict(curve), indent=1) + "\n", encoding="utf-8")
        if options.plot:
            plot(curve, options.plot)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:  # timm raises RuntimeError for names
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(curve)
    return 0


def _measured(options: argparse.Namespace) -> Curve:
    """Measures the model. ValueError for options that do not apply to it."""
    defaults: dict[str, Any] = {"steps": STEPS, "ratio": 0.5, "seed": 0}
    explicit = [name for name in ("prompt", *defaults) if getattr(options, name) is not None]
    if options.images is not None:
        if explicit:
            raise ValueError(f"--{explicit[0]} applies to text-to-image models, and --images to classifiers")
        return measure_classifier(options.model, options.images)
    if _is_of_timm(options.model):
        raise ValueError(f"{options.model} is a classifier of timm's, which needs images: --images DIR")
    settings = {name: getattr(options, name) if name in explicit else value for name, value in defaults.items()}
    return measure(options.model, options.prompt or PROMPTS, **settings)


def _is_of_timm(model: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return bool(timm.is_model(model))


if __name__ == "__main__":
    sys.exit(main())
