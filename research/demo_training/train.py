"""Trains every part of an embedded model from scratch: `python -m research.demo_training.train [--content textures]`.

    render   classes × images each -> renders.npy                  the training pictures, 256 × 256
    judge    classifier on renders; accuracy on fresh ones           judge.safetensors
    vae      autoencoder on 96-pixel crops                           vae/
    encode   latents of the renders and their mirror images          latents-32.npy, latents-16.npy
    low      UNet and text encoder on 16 × 16 latents                unet/, text_encoder/
    high     the same weights on 32 × 32 latents
    large    the same weights on 64 × 64 latents of 512 × 512 renders, for textures alone
    export   averaged weights in half precision -> tofu_sd/demo/weights

Each stage leaves its result in --work and is skipped when that exists. Cut off, a training goes on from its last
checkpoint, and renders and latents, which take minutes, begin anew. Batches are drawn from (seed, step), so an
interrupted run sees the samples an uninterrupted one would.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tofu_sd.demo import WEIGHTS
from tofu_sd.demo.classifier import DemoClassifier

# isort: split
# after .model, which says in words what is wrong with an installation that cannot import these
from diffusers import AutoencoderKL

from .export import export
from .fit import _whole
from .recipe import Recipe
from .stages import Denoiser, make_latents, make_renders, train_denoiser, train_judge, train_vae


def train(recipe: Recipe, work: Path, out: Path, device: torch.device, workers: int = 1) -> None:
    """Runs every stage whose result `work` does not hold yet, then writes the weights to `out`.

    ValueError for a folder that holds another recipe's results.
    """
    work.mkdir(parents=True, exist_ok=True)
    note = work / "figures.json"
    figures: dict[str, Any] = {"recipe": asdict(recipe), "device": str(device), "torch": torch.__version__}
    if note.exists():
        before = json.loads(note.read_text())
        for name, value in figures["recipe"].items():
            if (held := before["recipe"].get(name, getattr(Recipe(), name))) != value:
                raise ValueError(f"{work.name} holds results for {name} {held}, not {value}")
        figures = before | figures

    def record(stage: str, values: dict[str, Any]) -> None:
        figures[stage] = values
        _note()
        print(stage, json.dumps(values), flush=True)

    def _note() -> None:
        _whole(note, lambda part: part.write_text(json.dumps(figures, indent=1)))

    _note()
    renders = make_renders(recipe, work, device, workers=workers)
    judge = DemoClassifier(recipe.shown.answers).to(device).eval().requires_grad_(False)
    if (work / "judge.safetensors").exists():
        judge.load_state_dict(load_file(work / "judge.safetensors"))
    else:
        judge, values = train_judge(recipe, work, device, renders)
        record("judge", values)
        _whole(work / "judge.safetensors", lambda part: save_file(judge.state_dict(), part))
    if (work / "vae").exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").to(device)
    else:
        vae, values = train_vae(recipe, work, device, renders, judge)
        record("vae", values)
        _whole(work / "vae", vae.save_pretrained)
    make_latents(work, device, renders, vae, (1, 2))

    stages = [("low", recipe.size // 16, 5e-4), ("high", recipe.size // 8, 3e-4)]
    if recipe.large:
        large = make_renders(recipe, work, device, recipe.large_images, scale=2, workers=workers)
        make_latents(work, device, large, vae, (1,))
        stages.append(("large", recipe.size // 4, 1e-4))
    torch.manual_seed(recipe.seed)  # of the first weights
    model = Denoiser(recipe.shown).to(device)
    for name, size, rate in stages:
        done = work / f"{name}.safetensors"
        if not done.exists():
            samples = getattr(recipe, name)
            record(name, train_denoiser(name, model, recipe, work, device, size=size, samples=samples, rate=rate))
            _whole(done, lambda part: save_file(copy.deepcopy(model).cpu().state_dict(), part))
        model.load_state_dict(load_file(done))
    _whole(out, lambda part: export(work, part, figures, recipe))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m research.demo_training.train", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="folder for renders, checkpoints")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the finished weights")
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
    work, out, device = args.pop("work"), args.pop("out"), torch.device(args.pop("device"))
    workers = args.pop("workers")
    if workers < 1:
        parser.error(f"--workers is {workers}; it must be at least 1")
    try:
        train(Recipe(**args), work, out, device, workers)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
