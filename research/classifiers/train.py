"""Trains a classifier on the embedded scenes or a folder of images: `python -m research.classifiers.train --out DIR`.

A vision transformer trains at twice its patch size first, at a fifth of the cost, then at its own (after FlexiViT, CVPR
2023). After an interrupt, the same command resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from eval import EvalError
from eval.common.cli import Help, Parser, as_path, command, explicit_options, finite, flag, integer_from, progress
from eval.common.devices import add_device, pick_device
from eval.common.files import check_place, read_json, shown, to_json, write, write_json
from tofu_sd import demo

from ..adaptivision.model import STRATEGIES, AdaptiVision
from ..demo_training.fit import Schedule, fit
from ..demo_training.recipe import TEST_SEED
from . import datasets as labelled
from . import divergence
from .datasets import PIECE, Labelled
from .models import ABOUT, STEMS, WEIGHTS, Architecture, ConvolutionStem, described

RECIPE = "recipe.json"
PER_CLASS, FRESH = 200, 40  # scenes of each class for training and for evaluation
BATCH = 32
SIZES = ("side", "patch", "width", "depth", "heads")
OF_KIND = {"adaptivision": ("clusters", "strategy", "temperature", "focus", "guided"), "vit": ("coarse",)}


EXAMPLES = """examples:
  python -m research.classifiers.train --out runs/scenes
      a vision transformer on rendered scenes, a quarter of an hour on a core
  python -m research.classifiers.train --out runs/mine --data FOLDER --side 224 --patch 16 --stem patches
      one on your own images, in FOLDER/train/CLASS and FOLDER/val/CLASS
  python -m research.classifiers.train --out runs/condensed --kind adaptivision --clusters 12,48
      AdaptiVision, whose tokens are clustered before its first layer
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m research.classifiers.train",
        description="Train a classifier, to reduce its tokens.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    default = Architecture()
    p.add_argument("--out", type=as_path, required=True, metavar="DIR", help="folder for the classifier")
    p.add_argument(
        "--data", default="scenes", help="scenes, or a folder with train/ and val/, each with a folder for each class"
    )
    p.add_argument("--kind", default=default.kind, help="vit or adaptivision")
    p.add_argument("--stem", default="convolutions", help=f"what makes tokens of pixels: {', '.join(STEMS)}")
    for name in SIZES:
        p.add_argument(f"--{name}", type=integer_from(1), default=getattr(default, name), metavar="N")
    own = p.add_argument_group("of adaptivision")
    own.add_argument("--clusters", type=clusters, default="16,64", metavar="K,K", help="fewest and most, or none")
    own.add_argument("--strategy", default="clusters", help=", ".join(STRATEGIES))
    own.add_argument("--temperature", type=finite, default=150.0, help="of the clusters")
    own.add_argument("--focus", action=argparse.BooleanOptionalAction, default=True, help="modulate attention")
    own.add_argument("--guided", action="store_true", help="add tokens of a depth camera (scenes only)")
    p.add_argument(
        "--coarse", type=integer_from(0), default=32_000, metavar="N", help="samples of a vit at twice the patch size"
    )
    p.add_argument("--samples", type=integer_from(1), default=12_800, metavar="N", help="samples at its own patch size")
    p.add_argument("--rate", type=positive, default=1e-3, help="learning rate")
    p.add_argument("--seed", type=integer_from(0, 2**31), default=0, help="of the first weights and of the batches")
    add_device(p)
    return p


def positive(text: str) -> float:
    """Parses a finite number above 0, for argparse."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def clusters(text: str) -> tuple[int, int] | None:
    """Parses '16,64' as two numbers and 'none' as None, for argparse."""
    if text == "none":
        return None
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is neither two numbers such as 16,64 nor none")
    return int(match[1]), int(match[2])


@command(resumes=True)
def main(argv: Sequence[str]) -> int:
    """Returns 0; 2 after an error in the options; 130 after an interrupt."""
    options = parser().parse_args(argv)
    kinds = {name: kind for kind, names in OF_KIND.items() for name in names}
    for name in sorted(explicit_options(parser(), argv) & kinds.keys()):
        if options.kind != kinds[name]:
            raise EvalError(f"{flag(name)} applies to {kinds[name]}, and --kind is {options.kind}")
    figures = train(options)
    print(f"{options.out.name}: {100 * figures['accuracy']:.2f} % of {figures['n']} fresh images", file=sys.stderr)
    return 0


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains a classifier and writes it to `options.out`. Returns the figures of the training."""
    device = pick_device(options.device)
    check_place(options.out, "--out", folder=True)
    check_buildable(options)
    learnt, fresh = data(options.data, options.side, options.guided)
    guided = 0 if learnt.guidance is None else learnt.guidance.shape[-1]
    architecture = architecture_of(options, len(learnt.classes), guided)
    torch.manual_seed(options.seed)
    model = initialized(architecture, learnt)
    init_output_dir(options.out, recipe(options, learnt, device))
    figures: dict[str, Any] = {"data": learnt.name, "pictures": len(learnt), "torch": str(torch.__version__)}
    stages = _Stages(options, learnt, device)
    rate = options.rate
    if trains_coarse_first(options):
        coarse = initialized(with_double_patch(architecture), learnt).to(device)
        figures["coarse"] = stages.run("coarse", coarse, options.coarse, rate)
        refine(coarse, model)
        rate /= 2
    figures["fine"] = stages.run("fine", model.to(device), options.samples, rate)
    model.eval()
    right = torch.cat(correct(model, fresh, device))
    figures |= {"accuracy": right.double().mean().item(), "n": len(right)}
    _save(options, architecture, model, learnt.classes, figures)
    return figures


def _save(
    options: argparse.Namespace, architecture: Architecture, model: nn.Module, classes: tuple[str, ...],
    figures: dict[str, Any],
) -> None:  # fmt: skip
    """Writes weights in half precision, and model.json. EvalError for weights that are not finite."""
    weights = {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}
    if not divergence.is_finite(weights.values()):
        raise divergence.stopped(options.out / "fine.ckpt", "weights are beyond half precision", options.rate)
    write(options.out / WEIGHTS, save(weights))
    write_json(options.out / ABOUT, described(architecture, options.seed, classes, figures))


class _Stages:
    """The stages of a training: each fits a model to the same images.

    Args:
        options: of the command.
        learnt: the training images.
        device: of the training.
    """

    def __init__(self, options: argparse.Namespace, learnt: Labelled, device: torch.device):
        self.options, self.learnt, self.device = options, learnt, device

    def run(self, name: str, model: nn.Module, samples: int, rate: float) -> dict[str, Any]:
        """Trains a model from its last checkpoint on. Returns the figures. EvalError if the training diverges."""
        checkpoint = self.options.out / f"{name}.ckpt"
        steps = itertools.count(divergence.resumed_at(checkpoint) + 1)

        def loss(g: torch.Generator) -> Tensor:
            value = self._loss(model, g)
            step = next(steps)
            if not value.isfinite():
                raise divergence.stopped(checkpoint, f"the loss is {value.item()} at step {step} of {name}", rate)
            return value

        with divergence.explain_save_errors(checkpoint):
            figures = fit(name, model, loss, Schedule(samples, BATCH, rate, self.options.seed), self.options.out)
        if not divergence.is_finite(model.state_dict().values()):
            raise divergence.stopped(checkpoint, f"weights are not finite after the last step of {name}", rate)
        return figures

    def _loss(self, model: nn.Module, g: torch.Generator) -> Tensor:
        """Returns the loss of a random batch."""
        learnt, device = self.learnt, self.device
        rows = torch.randint(len(learnt), (BATCH,), generator=g)
        images, labels = default_collate([learnt.images[i] for i in rows.tolist()])
        images, labels = augmented(images, g).to(device), labels.to(device)
        guidance = None if learnt.guidance is None else learnt.guidance[rows].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            if isinstance(model, AdaptiVision):
                return model.loss(images, labels, guidance)
            return F.cross_entropy(model(images).float(), labels, label_smoothing=0.05)


def architecture_of(options: argparse.Namespace, classes: int, guided: int) -> Architecture:
    """Returns the architecture. guided: width of guidance tokens or 0. EvalError for sizes that do not fit."""
    sizes = {name: getattr(options, name) for name in SIZES}
    own: dict[str, Any] = {}
    if options.kind == "adaptivision":
        own = {name: getattr(options, name) for name in OF_KIND["adaptivision"]} | {"guided": guided}
    return Architecture(options.kind, options.stem, **sizes, classes=classes, options=own)


def initialized(architecture: Architecture, learnt: Labelled) -> nn.Module:
    """Builds a classifier before its training. On scenes its convolutions are copied from the demo classifier."""
    model = architecture.build()
    stem = getattr(model, "patch_embed", getattr(model, "embed", None))
    if learnt.name == "scenes" and isinstance(stem, ConvolutionStem):
        stem.copy_stages(demo.load_classifier())
    return model


def recipe(options: argparse.Namespace, learnt: Labelled, device: torch.device) -> dict[str, Any]:
    """Returns everything that decides a training, as recipe.json holds it."""
    return {**vars(options), "out": None, "device": str(device), "data": learnt.name, "pictures": learnt.key}


def check_buildable(options: argparse.Namespace) -> None:
    """Raises EvalError for options that make no model, before anything is read or written."""
    architecture = architecture_of(options, classes=2, guided=PIECE**2 * options.guided)
    architecture.build()
    if trains_coarse_first(options):
        try:
            with_double_patch(architecture).build()
        except EvalError as error:
            raise EvalError(f"{error}: a vit trains at twice its patch size first; --coarse 0 skips that") from error


def trains_coarse_first(options: argparse.Namespace) -> bool:
    return options.kind == "vit" and options.coarse > 0


def with_double_patch(architecture: Architecture) -> Architecture:
    """Returns the architecture with patches of twice the size: a quarter of the tokens."""
    return replace(architecture, patch=2 * architecture.patch)


def init_output_dir(out: Path, recipe: dict[str, Any]) -> None:
    """Creates the folder of a training, or resumes in it. EvalError, naming what differs, for another recipe."""
    recipe = json.loads(to_json(recipe))  # as it is read back, without tuples
    before = read_json(out / RECIPE) if out.exists() else None
    if (out / RECIPE).exists() and not isinstance(before, dict):
        raise EvalError(f"--out {shown(out)}: its {RECIPE} cannot be read; repair it or give another folder")
    defaults = json.loads(to_json(vars(parser().parse_args(["--out", "."])) | {"out": None}))
    held = recipe if before is None else {**recipe, **defaults, **before}  # a missing option had its default
    for name, value in recipe.items():
        if held[name] not in (value, "auto"):  # the device, in older files
            raise EvalError(f"{out.name} holds a training with {name} {held[name]}, not {value}")
    write_json(out / RECIPE, recipe)


def data(name: str, side: int, guided: bool = False) -> tuple[Labelled, Labelled]:
    """Returns (training images, evaluation images). EvalError where there are none."""
    if name == "scenes":
        parts = {0: PER_CLASS, TEST_SEED: FRESH}
        both = [labelled.rendered(side, per_class, seed) for seed, per_class in parts.items()]
        if guided:
            both = [labelled.guided(one, n, seed) for one, (seed, n) in zip(both, parts.items(), strict=True)]
        return both[0], both[1]
    if guided:
        raise EvalError(f"--guided needs scenes, whose depth is known; {Path(name).name!r} has none")
    learnt, fresh = (labelled.folder(Path(name) / part, labelled.plain(side)) for part in ("train", "val"))
    if learnt.classes != fresh.classes:
        raise EvalError(f"train and val of {Path(name).name!r} have different classes")
    return learnt, fresh


def augmented(images: Tensor, g: torch.Generator) -> Tensor:
    """Augments images [B, 3, H, W]: a random crop, half of them mirrored, random contrast and brightness."""
    B, _, H, W = images.shape
    share, y, x = torch.rand(3, generator=g).tolist()
    h, w = (round(side * (0.7 + 0.3 * share)) for side in (H, W))
    top, left = int(y * (H - h + 1)), int(x * (W - w + 1))
    images = F.interpolate(images[..., top : top + h, left : left + w], (H, W), mode="bilinear", antialias=True)
    mirrored = torch.rand(B, generator=g) < 0.5
    images = torch.where(mirrored.view(B, 1, 1, 1), images.flip(-1), images)
    gain, shift = torch.rand(2, B, 1, 1, 1, generator=g)
    return (images - 0.5) * (0.7 + 0.6 * gain) + 0.5 + 0.2 * (shift - 0.5)


def refine(coarse: nn.Module, fine: nn.Module) -> None:
    """Copies the weights of a vision transformer to one with smaller patches, resampled."""
    weights = coarse.state_dict()
    target: Any = fine
    if isinstance(target.patch_embed, PatchEmbed):
        weights["patch_embed.proj.weight"] = timm.layers.resample_patch_embed(
            weights["patch_embed.proj.weight"].cpu(), list(target.patch_embed.patch_size)
        )
    weights["pos_embed"] = timm.layers.resample_abs_pos_embed(
        weights["pos_embed"].cpu(), list(target.patch_embed.grid_size), num_prefix_tokens=target.num_prefix_tokens
    )
    fine.load_state_dict(weights)


@torch.no_grad()
def correct(model: nn.Module, data: Labelled, device: torch.device, batch: int = 64) -> list[Tensor]:
    """Returns, for each batch, which images a classifier classifies correctly: bool [B]."""
    results: list[Tensor] = []
    batches: DataLoader[Any] = DataLoader(data.images, batch)
    for _, (images, labels) in zip(progress(range(len(batches)), "evaluating"), batches, strict=True):
        start = sum(map(len, results))
        guidance = [] if data.guidance is None else [data.guidance[start : start + len(labels)].to(device)]
        results.append(model(images.to(device), *guidance).argmax(-1).cpu() == labels)
    return results


if __name__ == "__main__":
    sys.exit(main())
