"""Writes trained weights in the layout of a diffusers model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from .networks import build_scheduler

# isort: split
# after .networks, which explains an installation that cannot import these

from .recipe import Recipe
from .stages import Denoiser


def export(work: Path, target: Path, figures: dict[str, Any], recipe: Recipe) -> None:
    """Writes pipeline and classifier as float16 safetensors to `target`, in the layout of a diffusers model folder."""
    model = Denoiser(recipe.shown)
    model.load_state_dict(load_file(work / f"{'large' if recipe.large else 'high'}.safetensors"))
    trained = AutoencoderKL.from_pretrained(work / "vae")
    vae = AutoencoderKL.from_config({k: v for k, v in trained.config.items() if k != "_name_or_path"})
    vae.load_state_dict(trained.state_dict())  # a model without the path of the folder it was loaded from
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(target, safe_serialization=True)
    export_for_transformers_4(target)
    classifier = load_file(work / "classifier.safetensors")
    save_file({k: v.half() for k, v in classifier.items()}, target / "classifier.safetensors")
    (target / "figures.json").write_text(json.dumps(figures, indent=1))


def export_for_transformers_4(target: Path) -> None:
    """Adds files that transformers 4 reads and 5 no longer writes; 5 reads both.

    These are the vocabulary as separate files, which CLIPTokenizer needs, and Stable Diffusion's names of the text
    encoder's weights, without which they would be random.
    """
    folder = target / "tokenizer"
    bpe = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False, indent=0), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    file, prefix = target / "text_encoder" / "model.safetensors", "text_model."
    weights = {prefix + name.removeprefix(prefix): value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
