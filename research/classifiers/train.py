"""Trains a classifier on the embedded scenes or a folder of images: `python -m research.classifiers.train --out DIR`.

A vision transformer learns at twice its patch's size first, which costs a fifth, and goes on at its own (after
FlexiViT, CVPR 2023). Cut off, the same command goes on from the last checkpoint.
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
from eval.common.cli import Help, Parser, as_path, at_least, command, finite, said, working, written
from eval.common.devices import add_device, pick_device
from eval.common.files import check_place, read_json, shown, to_json, write, write_json
from tofu_sd import demo

from ..adaptivision.model import STRATEGIES, AdaptiVision
from ..demo_training.fit import fit
from ..demo_training.recipe import TEST_SEED
from . import datasets as labelled
from . import divergence
from .datasets import PIECE, Labelled
from .models import ABOUT, STEMS, WEIGHTS, Architecture, ConvolutionStem, described

RECIPE = "recipe.json"
PER_CLASS, FRESH = 200, 40  # scenes of a class to learn from and to be judged by
BATCH = 32
SIZES = ("side", "patch", "width", "depth", "heads")
OF_KIND = {"adaptivision": ("clusters", "strategy", "temperature", "focus", "guided"), "vit": ("coarse",)}


EXAMPLES = """examples:
  python -m research.classifiers.train --out runs/scenes
      a vision transformer on rendered scenes, a quarter of an hour on a core
  python -m research.classifiers.train --out runs/mine --data FOLDER --side 224 --patch 16 --stem patches
      one on pictures of one's own, in FOLDER/train/CLASS and FOLDER/val/CLASS
  python -m research.classifiers.train --out runs/condensed --kind adaptivision --clusters 12,48
      AdaptiVision, whose tokens are clustered before its first layer
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m research.classifiers.train",
        description="Train a classifier, to fuse tokens in.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    default = Architecture()
    p.add_argument("--out", type=as_path, required=True, metavar="DIR", help="folder for the classifier")
    p.add_argument(
        "--data", default="scenes", help="scenes, or a folder with train/ and val/, a folder a class in each"
    )
    p.add_argument("--kind", default=default.kind, help="vit or adaptivision")
    p.add_argument("--stem", default="convolutions", help=f"what makes tokens of pixels: {', '.join(STEMS)}")
    for name in SIZES:
        p.add_argument(f"--{name}", type=at_least(1), default=getattr(default, name), metavar="N")
    own = p.add_argument_group("of adaptivision")
    own.add_argument("--clusters", type=clusters, default="16,64", metavar="K,K", help="fewest and most, or none")
    own.add_argument("--strategy", default="clusters", help=", ".join(STRATEGIES))
    own.add_argument("--temperature", type=finite, default=150.0, help="of the clusters")
    own.add_argument("--focus", action=argparse.BooleanOptionalAction, default=True, help="modulate attention")
    own.add_argument("--guided", action="store_true", help="fuse tokens of a depth camera, which scenes have")
    p.add_argument(
        "--coarse", type=at_least(0), default=32_000, metavar="N", help="samples of a vit at twice the patch's size"
    )
    p.add_argument("--samples", type=at_least(1), default=12_800, metavar="N", help="samples at its own size")
    p.add_argument("--rate", type=positive, default=1e-3, help="learning rate")
    p.add_argument("--seed", type=at_least(0, 2**31), default=0, help="of the first weights and of the batches")
    add_device(p)
    return p


def positive(text: str) -> float:
    """A finite number above 0, as an argument's type."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def clusters(text: str) -> tuple[int, int] | None:
    """'16,64' as two numbers; None for 'none'."""
    if text == "none":
        return None
    found = re.fullmatch(r"(\d+),(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is neither two numbers such as 16,64 nor none")
    return int(found[1]), int(found[2])


@command(goes_on=True)
def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    kinds = {name: kind for kind, names in OF_KIND.items() for name in names}
    for name in sorted(said(parser(), argv) & kinds.keys()):
        if options.kind != kinds[name]:
            raise EvalError(f"{written(name)} is of {kinds[name]}, and --kind is {options.kind}")
    figures = train(options)
    print(f"{options.out.name}: {100 * figures['accuracy']:.2f} % of {figures['n']} fresh pictures", file=sys.stderr)
    return 0


def train(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the training, which stand in the folder beside the weights."""
    device = pick_device(options.device)
    check_place(options.out, "--out", folder=True)
    fitting(options)
    learnt, fresh = data(options.data, options.side, options.guided)
    architecture = asked_for(options, len(learnt.classes), 0 if learnt.guidance is None else learnt.guidance.shape[-1])
    torch.manual_seed(options.seed)
    model = begun(architecture, learnt)
    claim(options.out, recipe(options, learnt, device))
    figures: dict[str, Any] = {"data": learnt.name, "pictures": len(learnt), "torch": str(torch.__version__)}

    def stage(name: str, model: nn.Module, samples: int, rate: float) -> None:
        checkpoint = options.out / f"{name}.ckpt"
        steps = itertools.count(divergence.resumed_at(checkpoint) + 1)

        def loss(g: torch.Generator) -> Tensor:
            value = loss_of_batch(g)
            step = next(steps)
            if not value.isfinite():
                raise divergence.stopped(checkpoint, f"the loss is {value.item()} at step {step} of {name}", rate)
            return value

        def loss_of_batch(g: torch.Generator) -> Tensor:
            rows = torch.randint(len(learnt), (BATCH,), generator=g)
            pictures, labels = default_collate([learnt.pictures[i] for i in rows.tolist()])
            pictures, labels = augmented(pictures, g).to(device), labels.to(device)
            told = None if learnt.guidance is None else learnt.guidance[rows].to(device)
            with torch.autocast(device.type, torch.bfloat16):
                if isinstance(model, AdaptiVision):
                    return model.loss(pictures, labels, told)
                return F.cross_entropy(model(pictures).float(), labels, label_smoothing=0.05)

        with divergence.written(checkpoint):
            figures[name] = fit(
                name, model, loss, samples=samples, batch=BATCH, rate=rate, work=options.out, seed=options.seed
            )
        if not divergence.is_finite(model.state_dict().values()):
            raise divergence.stopped(checkpoint, f"weights are not finite after the last step of {name}", rate)

    coarse_first = begins_coarse(options)
    if coarse_first:
        coarse = begun(twice(architecture), learnt).to(device)
        stage("coarse", coarse, options.coarse, options.rate)
        refine(coarse, model)
    stage("fine", model.to(device), options.samples, options.rate / 2 if coarse_first else options.rate)
    model.eval()
    right = torch.cat(correct(model, fresh, device))
    figures |= {"accuracy": right.double().mean().item(), "n": len(right)}
    weights = {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}
    if not divergence.is_finite(weights.values()):
        raise divergence.stopped(options.out / "fine.ckpt", "weights are beyond half precision", options.rate)
    write(options.out / WEIGHTS, save(weights))
    write_json(options.out / ABOUT, described(architecture, options.seed, learnt.classes, figures))
    return figures


def asked_for(options: argparse.Namespace, classes: int, guided: int) -> Architecture:
    """Of a training of so many classes, with guidance of this width. EvalError for sizes that do not fit."""
    sizes = {name: getattr(options, name) for name in SIZES}
    own: dict[str, Any] = {}
    if options.kind == "adaptivision":
        own = {name: getattr(options, name) for name in OF_KIND["adaptivision"]} | {"guided": guided}
    return Architecture(options.kind, options.stem, **sizes, classes=classes, options=own)


def begun(architecture: Architecture, learnt: Labelled) -> nn.Module:
    """A classifier before its training. On scenes early convolutions begin as the embedded judge's, which has learnt
    from scenes already.
    """  # fmt: skip
    model = architecture.build()
    stem = getattr(model, "patch_embed", getattr(model, "embed", None))
    if learnt.name == "scenes" and isinstance(stem, ConvolutionStem):
        stem.begin_as(demo.load_classifier())
    return model


def recipe(options: argparse.Namespace, learnt: Labelled, device: torch.device) -> dict[str, Any]:
    """All that decides a training, as its folder tells it."""
    return {**vars(options), "out": None, "device": str(device), "data": learnt.name, "pictures": learnt.key}


def fitting(options: argparse.Namespace) -> None:
    """EvalError for options that make no model, before anything is read, drawn or written."""
    architecture = asked_for(options, classes=2, guided=PIECE**2 * options.guided)
    architecture.build()
    if begins_coarse(options):
        try:
            twice(architecture).build()
        except EvalError as error:
            raise EvalError(f"{error}: a vit's training begins at twice its size; --coarse 0 goes without") from error


def begins_coarse(options: argparse.Namespace) -> bool:
    return options.kind == "vit" and options.coarse > 0


def twice(architecture: Architecture) -> Architecture:
    """The same with patches of twice the size, of which there are a quarter."""
    return replace(architecture, patch=2 * architecture.patch)


def claim(out: Path, recipe: dict[str, Any]) -> None:
    """Makes the folder of a training, or goes on in it. EvalError for one of another recipe, naming what differs."""
    recipe = json.loads(to_json(recipe))  # as it is read again, without tuples
    before = read_json(out / RECIPE) if out.exists() else None
    if (out / RECIPE).exists() and not isinstance(before, dict):
        raise EvalError(f"--out {shown(out)}: its {RECIPE} cannot be read; put it right or give another folder")
    usual = json.loads(to_json(vars(parser().parse_args(["--out", "."])) | {"out": None}))
    held = recipe if before is None else {**recipe, **usual, **before}  # an option that was not there had its default
    for name, value in recipe.items():
        if held[name] not in (value, "auto"):  # the device, as older ones tell it
            raise EvalError(f"{out.name} holds a training with {name} {held[name]}, not {value}")
    write_json(out / RECIPE, recipe)


def data(name: str, side: int, guided: bool = False) -> tuple[Labelled, Labelled]:
    """(pictures to learn from, pictures to be judged by). EvalError where there are none."""
    if name == "scenes":
        parts = {0: PER_CLASS, TEST_SEED: FRESH}
        both = [labelled.rendered(side, per_class, seed) for seed, per_class in parts.items()]
        if guided:
            both = [labelled.guided(one, n, seed) for one, (seed, n) in zip(both, parts.items(), strict=True)]
        return both[0], both[1]
    if guided:
        raise EvalError(f"--guided takes scenes, whose depth is known; {Path(name).name!r} tells none")
    learnt, fresh = (labelled.folder(Path(name) / part, labelled.plain(side)) for part in ("train", "val"))
    if learnt.classes != fresh.classes:
        raise EvalError(f"train and val of {Path(name).name!r} are not of the same classes")
    return learnt, fresh


def augmented(pictures: Tensor, g: torch.Generator) -> Tensor:
    """The pictures [B, 3, H, W] cut a little smaller, half of them mirrored, each with a light of its own."""
    B, _, H, W = pictures.shape
    share, y, x = torch.rand(3, generator=g).tolist()
    h, w = (round(side * (0.7 + 0.3 * share)) for side in (H, W))
    top, left = int(y * (H - h + 1)), int(x * (W - w + 1))
    pictures = F.interpolate(pictures[..., top : top + h, left : left + w], (H, W), mode="bilinear", antialias=True)
    mirrored = torch.rand(B, generator=g) < 0.5
    pictures = torch.where(mirrored.view(B, 1, 1, 1), pictures.flip(-1), pictures)
    gain, shift = torch.rand(2, B, 1, 1, 1, generator=g)
    return (pictures - 0.5) * (0.7 + 0.6 * gain) + 0.5 + 0.2 * (shift - 0.5)


def refine(coarse: nn.Module, fine: nn.Module) -> None:
    """Gives a vision transformer the weights of one whose patches are larger."""
    weights = coarse.state_dict()
    mine: Any = fine
    if isinstance(mine.patch_embed, PatchEmbed):
        weights["patch_embed.proj.weight"] = timm.layers.resample_patch_embed(
            weights["patch_embed.proj.weight"].cpu(), list(mine.patch_embed.patch_size)
        )
    weights["pos_embed"] = timm.layers.resample_abs_pos_embed(
        weights["pos_embed"].cpu(), list(mine.patch_embed.grid_size), num_prefix_tokens=mine.num_prefix_tokens
    )
    fine.load_state_dict(weights)


@torch.no_grad()
def correct(model: nn.Module, data: Labelled, device: torch.device, batch: int = 64) -> list[Tensor]:
    """Of each batch, which pictures a classifier names right: bool [B]."""
    found: list[Tensor] = []
    batches: DataLoader[Any] = DataLoader(data.pictures, batch)
    for _, (pictures, labels) in zip(working(range(len(batches)), "judging"), batches, strict=True):
        at = sum(map(len, found))
        told = [] if data.guidance is None else [data.guidance[at : at + len(labels)].to(device)]
        found.append(model(pictures.to(device), *told).argmax(-1).cpu() == labels)
    return found


if __name__ == "__main__":
    sys.exit(main())
