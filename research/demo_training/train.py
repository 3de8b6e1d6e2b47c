"""Trains an embedded model: `python -m research.demo_training.train [--content textures] [--denoiser sd3]`.

    render      classes × images each                               renders.npy, 256 × 256
    classifier  demo classifier on renders; accuracy on fresh ones  classifier.safetensors
    features    a classifier for the autoencoder's perceptual loss  features.safetensors, only where the recipe has one
    vae         autoencoder on 96-pixel crops                       vae/
    encode      latents of the renders and their mirror images      latents-32.npy, latents-16.npy
    low         denoiser and text encoders on 16 × 16 latents       low.safetensors
    high        the same weights on 32 × 32 latents                 high.safetensors
    large       the same weights on 64 × 64 latents of 512 × 512 renders too, only where the recipe has it
    export      averaged weights in half precision -> tofu_sd/demo/weights/NAME

The transformers, sd3 and flux, use the autoencoder of the embedded model of their content instead of the stages
classifier, features and vae. Their other results have names of their own, such as sd3-low.safetensors, so that one
folder serves every denoiser of a content.

Each stage writes its result to --work and is skipped if that exists. After an interrupt, a training resumes from its
last checkpoint; renders and latents, which take minutes, are made again. Batches depend on (seed, step), so an
interrupted run uses the same samples.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, load_model, save_file, save_model

from tofu_sd import demo
from tofu_sd.demo.classifier import DemoClassifier
from tofu_sd.demo.models import MODELS

from .denoisers import DENOISERS
from .denoisers.base import Denoiser
from .export import export
from .fit import _whole
from .recipe import OF_AUTOENCODER, OF_DENOISER, RECIPES, Recipe, embedded_model
from .stages import make_latents, make_renders, train_classifier, train_denoiser, train_vae


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
        FloatingPointError: a training diverged.
    """
    work.mkdir(parents=True, exist_ok=True)
    training = _Training(recipe, work, device, workers)
    if recipe.denoiser == "unet":
        renders = training.renders()
        classifier = training.classifier("classifier", renders)
        vae = training.autoencoder(renders, training.classifier("features", renders) if recipe.features else classifier)
    else:
        vae = training.embedded_autoencoder()
    training.encode(vae)
    model = training.denoiser()
    _whole(out, lambda part: export(model, vae, part, training.figures, training.classifier_file))


class _Training:
    """The stages of a training, and its figures, which a JSON file in the folder holds.

    Args:
        recipe: what is trained.
        work: folder of the results.
        device: of the trainings.
        workers: processes that render.

    Raises:
        ValueError: the folder holds another recipe's results.
    """

    def __init__(self, recipe: Recipe, work: Path, device: torch.device, workers: int):
        self.recipe, self.work, self.device, self.workers = recipe, work, device, workers
        is_unet = recipe.denoiser == "unet"
        self.prefix = "" if is_unet else f"{recipe.denoiser}-"
        self.file = work / ("figures.json" if is_unet else f"figures-{recipe.denoiser}.json")
        self.classifier_file = work / "classifier.safetensors" if is_unet else None
        values = asdict(recipe)
        for file in sorted(work.glob("figures*.json")):
            _check_recipe(work, json.loads(file.read_text())["recipe"], values)
        before = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.figures: dict[str, Any] = before | {
            "recipe": values,
            "device": str(device),
            "torch": torch.__version__,
        }
        self._write()

    def _write(self) -> None:
        _whole(self.file, lambda part: part.write_text(json.dumps(self.figures, indent=1)))

    def _record(self, stage: str, values: dict[str, Any]) -> None:
        self.figures[stage] = values
        self._write()
        print(stage, json.dumps(values), flush=True)

    def renders(self, scale: int = 1) -> np.ndarray:
        """Returns the training images at the recipe's size, or at twice the size and in other numbers."""
        images = None if scale == 1 else self.recipe.large_images
        return make_renders(self.recipe, self.work, self.device, images, scale=scale, workers=self.workers)

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

    def embedded_autoencoder(self) -> AutoencoderKL:
        """Returns the autoencoder in the folder or, where there is none, that of the embedded model.

        Raises:
            ValueError: the recipe describes another autoencoder than the embedded model's.
        """
        embedded = RECIPES[self.recipe.content]
        for name in OF_AUTOENCODER:
            if (value := getattr(self.recipe, name)) != (needed := getattr(embedded, name)):
                raise ValueError(
                    f"{name} is {value}; {self.recipe.denoiser} uses the autoencoder of {self.recipe.content}, which "
                    f"was trained with {needed}"
                )
        folder = self.work / "vae"
        if not folder.exists():
            _whole(folder, demo.load(self.recipe.content).vae.save_pretrained)
        return AutoencoderKL.from_pretrained(folder).to(self.device)

    def encode(self, vae: AutoencoderKL) -> None:
        """Writes the latents that are missing, and the renders that they need."""
        size = self.recipe.size // 8
        for scale, sizes in ((1, (size, size // 2)), (2, (2 * size,) if self.recipe.large else ())):
            if not all((self.work / f"latents-{side}.npy").exists() for side in sizes):
                make_latents(self.work, self.device, self.renders(scale), vae, (1, 2) if scale == 1 else (1,))

    def denoiser(self) -> Denoiser:
        """Returns denoiser and text encoders, trained in stages."""
        torch.manual_seed(self.recipe.seed)  # of the initial weights
        model, size = DENOISERS[self.recipe.denoiser](self.recipe.shown).to(self.device), self.recipe.size // 8
        stages = {"low": (size // 2,), "high": (size,), "large": (2 * size, size)}
        for stage, sizes in stages.items():
            samples, name = getattr(self.recipe, stage), self.prefix + stage
            if not samples:
                continue
            file = self.work / f"{name}.safetensors"
            if not file.exists():
                place = (self.recipe, self.work, self.device)
                self._record(
                    stage, train_denoiser(name, model, *place, sizes=sizes, samples=samples, rate=model.rates[stage])
                )
                _whole(file, partial(save_model, copy.deepcopy(model).cpu()))
            load_model(model, file)
        return model


def _check_recipe(work: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compares a recipe with that of results in the folder.

    Args:
        work: the folder.
        held: the recipe of a record in the folder. Fields that it lacks have the default value.
        wanted: the recipe of the training.

    Raises:
        ValueError: they differ. Two denoisers share renders and latents, so that only the fields of these must agree.
    """
    is_same = held.get("denoiser", "unet") == wanted["denoiser"]
    for name, value in wanted.items():
        if (is_same or name not in OF_DENOISER) and (before := held.get(name, getattr(Recipe(), name))) != value:
            raise ValueError(f"{work.name} holds results for {name} {before}, not {value}")


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
        default = field.default if field.name in ("content", "denoiser") else "that of the embedded model"
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), help=f"default: {default}")
    args = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    work, device, workers = args.pop("work"), torch.device(args.pop("device")), args.pop("workers")
    if workers < 1:
        parser.error(f"--workers is {workers}; it must be an integer >= 1")
    try:
        name = embedded_model(args.get("content", Recipe.content), args.get("denoiser", Recipe.denoiser))
        out = args.pop("out", MODELS[name].weights)
        train(replace(RECIPES[name], **args), work, out, device, workers)
    except (ValueError, FloatingPointError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
