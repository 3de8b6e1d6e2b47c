"""Functional linearity (ToFu, WACV 2024, Eq. 8): how straight a layer carries the way from one token to another.

Where it is low, the average of two tokens comes out far from both, and pruning is the better way to fuse; where it is
near 1, averaging loses little. `python -m tofu_sd.linearity` measures it in every block of a model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from .config import TokenFusionConfig
from .patching.block_info import BlockInfo
from .patching.block_state import fusions
from .patching.linearity import PAIRS, ROLES, Linearity, best_split, by_depth, probing

PROMPTS = ("a photograph of a red fox in the snow", "a city street at night, oil painting", "a bowl of fruit", "")
STEPS = 4


@contextmanager
def measuring(model: Any, fusion: TokenFusionConfig | None = None, pairs: int = PAIRS) -> Iterator[list[Linearity]]:
    """`with measuring(pipe) as found: pipe(...)` measures every block's attention and feed-forward at every step.

    model: a pipeline or UNet of diffusers; ValueError for one with a patch. fusion: how tokens are matched. pairs: of
    each sample, spread evenly over those that would be fused.
    """
    from .hosts.diffusers_unet import find_blocks, unwrap

    unet, _ = unwrap(model)
    with probing(unet, find_blocks(unet), fusion, pairs) as found:
        yield found


def measure_split(pipe: Any, blocks: Sequence[BlockInfo], fusion: TokenFusionConfig) -> int:
    """d for a pipeline: from the FL of the layers that `fusion` fuses, in a few steps of a few small pictures.

    ValueError for what draws no pictures from prompts alone.
    """
    what = "depth_split is 'auto', which draws a few steps from prompts and so takes a text-to-image pipeline"
    if not hasattr(pipe, "unet"):
        raise ValueError(
            f"{what}; this is a {type(pipe).__name__}: give a number, as `measuring` and `best_split` find"
        )
    from diffusers import AutoPipelineForText2Image

    try:
        drawing = AutoPipelineForText2Image.from_pipe(pipe)
    except ValueError as error:
        raise ValueError(f"{what}; {type(pipe).__name__} cannot be made one: give a number") from error
    drawing.set_progress_bar_config(disable=True)
    fused = {block.depth for block, _ in fusions(blocks, replace(fusion, depth_split=0))}
    with measuring(drawing, replace(fusion, depth_split=0)) as found:
        generator = torch.Generator().manual_seed(0)
        drawing(list(PROMPTS), num_inference_steps=STEPS, generator=generator, output_type="latent")
    roles = [role for role in fusion.layers if role in ROLES]
    return best_split({d: value for d, value in by_depth(found, roles).items() if d in fused})


EXAMPLES = """examples:
  python -m tofu_sd.linearity
      the model that comes with the package
  python -m tofu_sd.linearity --model stabilityai/stable-diffusion-2-1-base --steps 20 --out linearity.json
      another one, every measurement kept
  python -m tofu_sd.linearity --model vit_small_patch16_224.augreg_in1k --pictures imagenet/val
      a classifier of timm's (ToFu Fig. 3)
  python -m tofu_sd.linearity --table linearity.json --plot linearity.svg
      its table again, and its curve over the depth
"""
SHOWN = 64  # pictures of a classifier, at most
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TITLES = {"attn": "attention", "mlp": "feed-forward"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m tofu_sd.linearity",
        description="Functional linearity (ToFu Eq. 8) of every block of a model, on the pairs of tokens that would be "
        "fused, and the depth from which on to average.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", default="demo", help="demo, what from_pretrained takes, or a classifier of timm's (demo)")
    drawn = p.add_argument_group("of a text-to-image model")
    drawn.add_argument("--prompt", action="append", help="may be given more than once; four of its own if not")
    drawn.add_argument("--steps", type=int, help=f"of the sampling ({STEPS})")
    drawn.add_argument("--ratio", type=float, help="share of tokens that would be fused away (0.5)")
    drawn.add_argument("--seed", type=int, help="of the pictures (0)")
    shown = p.add_argument_group("of a classifier")
    shown.add_argument("--pictures", metavar="DIR", help=f"a folder to show it pictures of, {SHOWN} at most")
    p.add_argument("--out", metavar="FILE", help="keep every measurement as JSON")
    p.add_argument("--table", metavar="FILE", help="measure nothing; print the table of such a file")
    p.add_argument("--plot", metavar="FILE", help="draw it over the depth, as SVG or PNG (needs matplotlib)")
    return p


@dataclass(frozen=True)
class Curve:
    """A model's linearity, and how it was measured. fused: the depths of the blocks that are fused by default.

    prompts, steps, ratio, seed: of what a text-to-image model drew. pictures: that a classifier was shown.
    """

    model: str
    versions: str
    fused: list[int]
    measured: list[Linearity]
    prompts: list[str] = field(default_factory=list)
    steps: int = 0
    ratio: float = 0.0
    seed: int = 0
    pictures: int = 0

    @property
    def roles(self) -> list[str]:
        return [role for role in ROLES if any(one.role == role for one in self.measured)]

    @property
    def deciding(self) -> str:
        """The role of what works on tokens that a block has fused: attention, and in a classifier the MLP behind it."""
        return "mlp" if self.pictures else "attn"

    @property
    def depth_split(self) -> int:
        own = by_depth(self.measured, [self.deciding])
        return best_split({depth: own[depth] for depth in self.fused})

    @classmethod
    def read(cls, file: str) -> Curve:
        """ValueError for a file that holds none."""
        try:
            told = json.loads(Path(file).read_text(encoding="utf-8"))
            curve = cls(**{**told, "measured": [Linearity(**one) for one in told["measured"]]})
            if curve.fused and set(curve.fused).issubset(by_depth(curve.measured, [curve.deciding])):
                return curve
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise ValueError(f"{Path(file).name} holds no measurements of this program")

    def __str__(self) -> str:
        """A line for each block: the mean over the calls of each layer's FL, and from the least to the most of them."""
        roles = self.roles
        lines = [f"| depth | block | {' | '.join(TITLES[role] for role in roles)} |", "|--:|---|" + "--:|" * len(roles)]
        for depth, name in sorted({(one.depth, one.block) for one in self.measured}):
            cells = []
            for role in roles:
                values = [one.value for one in self.measured if (one.depth, one.role) == (depth, role)]
                cells.append(f"{mean(values):.4f} ({min(values):.4f}–{max(values):.4f})" if values else "–")
            mark = " \\*" if depth in self.fused and len(self.fused) < len({one.depth for one in self.measured}) else ""
            lines.append(f"| {depth}{mark} | {name.replace('.transformer_blocks', '')} | {' | '.join(cells)} |")
        split = self.depth_split
        average = "" if split else ": average everywhere."
        if self.pictures:
            how = f"{self.pictures} pictures, pairs of patch tokens that would be fused first; means over the pictures"
            fused = "layers"
        else:
            how = (
                f"{len(self.prompts)} pictures, {self.steps} steps, seed {self.seed}, pairs at a ratio of "
                f"{self.ratio:g}; means over the steps"
            )
            fused = "fused blocks"
        marked = " \\* fused by default." if any(" \\* |" in line for line in lines) else ""
        return "\n".join([
            *lines, "",
            f"{self.model}: {how}, and the least and the most; {self.versions}.{marked}",
            f"depth_split={split}, by the {TITLES[self.deciding]} of the {fused}{average}",
        ])  # fmt: skip


def measure(model: str, prompts: Sequence[str], steps: int, ratio: float, seed: int) -> Curve:
    """The curve of a text-to-image model, by its name, over a sampling of a picture of each prompt."""
    import diffusers

    from .hosts.diffusers_unet import find_blocks, unwrap

    fusion = TokenFusionConfig(ratio, depth_split=0)
    if not ratio:
        raise ValueError("ratio is 0; pairs are measured that would be fused, so it must be above 0")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    pipe = _load(model)
    fused = [block.depth for block, _ in fusions(find_blocks(unwrap(pipe)[0]), fusion)]
    with measuring(pipe, fusion) as found:
        generator = torch.Generator().manual_seed(seed)
        pipe(list(prompts), num_inference_steps=steps, generator=generator, output_type="latent")
    if not found:
        raise ValueError(f"ratio is {ratio:g}; at it no token of this size would be fused")
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return Curve(model, versions, fused, found, list(prompts), steps, ratio, seed)


def measure_classifier(name: str, folder: str) -> Curve:
    """The curve of a classifier of timm's, with its pretrained weights, over pictures spread evenly over a folder."""
    import timm
    from PIL import Image

    from .hosts import timm as host

    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in ENDINGS)
    if not files:
        raise ValueError(f"there are no pictures in {folder!r}; looked for {', '.join(ENDINGS)}")
    files = [files[i] for i in sorted({round(i) for i in torch.linspace(0, len(files) - 1, SHOWN).tolist()})]
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    found: list[Linearity] = []
    for call, file in enumerate(files):
        with Image.open(file) as image:
            shown = transform(image.convert("RGB")).unsqueeze(0)
        found += [
            Linearity(f"blocks.{depth}", depth, role, call, None, value, host.PAIRS)
            for role in ROLES
            for depth, value in enumerate(host.linearity(model, shown, role=role)[:, 0].tolist())
        ]
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    return Curve(name, versions, list(range(len(host.find_blocks(model)))), found, pictures=len(files))


def _load(model: str) -> Any:
    if model == "demo":
        from . import demo

        return demo.load()
    from diffusers import AutoPipelineForText2Image

    return AutoPipelineForText2Image.from_pretrained(model)


def plot(curve: Curve, file: str) -> None:
    """The curve over the depth (ToFu Fig. 3), a line for each layer with the range over the calls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    for role in curve.roles:
        line = by_depth(curve.measured, [role])
        ends = [[one.value for one in curve.measured if (one.depth, one.role) == (d, role)] for d in line]
        ax.plot(list(line), list(line.values()), marker="o", label=TITLES[role])
        ax.fill_between(list(line), [min(end) for end in ends], [max(end) for end in ends], alpha=0.15)
    ax.set_xlabel("depth of the block")
    ax.set_ylabel("functional linearity")
    ax.legend(frameon=False)
    figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> int:
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
    """ValueError for options that say nothing of the model that is asked for."""
    drawn: dict[str, Any] = {"steps": STEPS, "ratio": 0.5, "seed": 0}
    given = [name for name in ("prompt", *drawn) if getattr(options, name) is not None]
    if options.pictures is not None:
        if given:
            raise ValueError(f"--{given[0]} is of text-to-image models, and --pictures of classifiers")
        return measure_classifier(options.model, options.pictures)
    if _of_timm(options.model):
        raise ValueError(f"{options.model} is a classifier of timm's, which has to be shown some: --pictures DIR")
    told = {name: usual if getattr(options, name) is None else getattr(options, name) for name, usual in drawn.items()}
    return measure(options.model, options.prompt or PROMPTS, **told)


def _of_timm(model: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return bool(timm.is_model(model))


if __name__ == "__main__":
    sys.exit(main())
