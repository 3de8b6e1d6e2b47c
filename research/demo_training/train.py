"""Trains every part of an embedded model from scratch: `python -m research.demo_training.train [--content textures]`.

    render      classes × images each                               renders.npy, 256 × 256
    classifier  demo classifier on renders; accuracy on fresh ones  classifier.safetensors
    features    a classifier for the autoencoder's perceptual loss  features.safetensors, only where the recipe has one
    vae         autoencoder on 96-pixel crops                       vae/
    encode      latents of the renders and their mirror images      latents-32.npy, latents-16.npy
    low         UNet and text encoder on 16 × 16 latents            unet/, text_encoder/
    high        the same weights on 32 × 32 latents
    large       the same weights on 64 × 64 latents of 512 × 512 renders too, only where the recipe has it
    export      averaged weights in half precision -> tofu_sd/demo/weights/NAME

Each stage writes its result to --work and is skipped if that exists. After an interrupt, a training resumes from its
last checkpoint; renders and latents, which take minutes, are made again. Batches depend on (seed, step), so an
interrupted run uses the same samples.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from tofu_sd.demo.classifier import DemoClassifier
from tofu_sd.demo.models import MODELS

# isort: split
# after .stages, which explains an installation that cannot import these

from .export import export
from .fit import _whole
from .recipe import Recipe
from .stages import Denoiser, make_latents, make_renders, train_classifier, train_denoiser, train_vae


def train(recipe: Recipe, work: Path, out: Path, device: torch.device, workers: int = 1) -> None:
    """Runs every stage whose result is not in `work` yet, then writes the weights to `out`.

    Args:
        recipe: what is trained.
        work: folder of renders and checkpoints.
        out: folder of the finished weights.
        device: of the trainings.
        workers: processes that render.

    Raises:
        ValueError: `work` holds another recipe's results.
    """
    work.mkdir(parents=True, exist_ok=True)
    training = _Training(recipe, work, device)
    renders = make_renders(recipe, work, device, workers=workers)
    classifier = training.classifier("classifier", renders)
    vae = training.autoencoder(renders, training.classifier("features", renders) if recipe.features else classifier)
    make_latents(work, device, renders, vae, (1, 2))
    stages: list[_Stage] = [("low", (recipe.size // 16,), 5e-4), ("high", (recipe.size // 8,), 3e-4)]
    if recipe.large:
        large = make_renders(recipe, work, device, recipe.large_images, scale=2, workers=workers)
        make_latents(work, device, large, vae, (1,))
        stages.append(("large", (recipe.size // 4, recipe.size // 8), 1e-4))
    training.denoiser(stages)
    _whole(out, lambda part: export(work, part, training.figures, recipe))


_Stage = tuple[str, tuple[int, ...], float]  # of the denoiser: name, sizes of the latents, learning rate


class _Training:
    """The stages of a training, and its figures, which figures.json in the folder holds."""

    def __init__(self, recipe: Recipe, work: Path, device: torch.device):
        self.recipe, self.work, self.device = recipe, work, device
        self.figures: dict[str, Any] = {"recipe": asdict(recipe), "device": str(device), "torch": torch.__version__}
        file = work / "figures.json"
        if file.exists():
            before = json.loads(file.read_text())
            for name, value in self.figures["recipe"].items():
                if (held := before["recipe"].get(name, getattr(Recipe(), name))) != value:
                    raise ValueError(f"{work.name} holds results for {name} {held}, not {value}")
            self.figures = before | self.figures
        self._write()

    def _write(self) -> None:
        _whole(self.work / "figures.json", lambda part: part.write_text(json.dumps(self.figures, indent=1)))

    def _record(self, stage: str, values: dict[str, Any]) -> None:
        self.figures[stage] = values
        self._write()
        print(stage, json.dumps(values), flush=True)

    def classifier(self, name: str, renders: np.ndarray) -> DemoClassifier:
        """Returns the classifier of a stage, trained or loaded."""
        file = self.work / f"{name}.safetensors"
        if file.exists():
            classifier = DemoClassifier(self.recipe.shown.model).to(self.device).eval().requires_grad_(False)
            classifier.load_state_dict(load_file(file))
            return classifier
        classifier, values = train_classifier(name, self.recipe, self.work, self.device, renders)
        self._record(name, values)
        _whole(file, lambda part: save_file(classifier.state_dict(), part))
        return classifier

    def autoencoder(self, renders: np.ndarray, classifier: DemoClassifier) -> AutoencoderKL:
        """Returns the autoencoder, trained or loaded."""
        folder = self.work / "vae"
        if folder.exists():
            return AutoencoderKL.from_pretrained(folder).to(self.device)
        vae, values = train_vae(self.recipe, self.work, self.device, renders, classifier)
        self._record("vae", values)
        _whole(folder, vae.save_pretrained)
        return vae

    def denoiser(self, stages: list[_Stage]) -> None:
        """Trains UNet and text encoder in stages."""
        torch.manual_seed(self.recipe.seed)  # of the initial weights
        model = Denoiser(self.recipe.shown).to(self.device)
        for name, sizes, rate in stages:
            file = self.work / f"{name}.safetensors"
            if not file.exists():
                samples = getattr(self.recipe, name)
                place = (self.recipe, self.work, self.device)
                self._record(name, train_denoiser(name, model, *place, sizes=sizes, samples=samples, rate=rate))
                _whole(file, lambda part: save_file(copy.deepcopy(model).cpu().state_dict(), part))
            model.load_state_dict(load_file(file))


def main(argv: list[str] | None = None) -> None:
    """Parses the options and trains."""
    parser = argparse.ArgumentParser(
        prog="python -m research.demo_training.train", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="folder for renders, checkpoints")
    parser.add_argument("--out", type=Path, help="folder for the finished weights (default: the embedded model's own)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes that render; default: %(default)s")
    for field in fields(Recipe):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help="default: %(default)s",
        )
    args = vars(parser.parse_args(argv))
    work, device = args.pop("work"), torch.device(args.pop("device"))
    out = args.pop("out") or MODELS.get(args["content"], MODELS["scenes"]).weights
    workers = args.pop("workers")
    if workers < 1:
        parser.error(f"--workers is {workers}; it must be an integer >= 1")
    try:
        train(Recipe(**args), work, out, device, workers)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
