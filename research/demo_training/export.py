"""Writes trained weights in the layout of a diffusers model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from .denoisers.base import Denoiser


def export(
    model: Denoiser, vae: AutoencoderKL, target: Path, figures: dict[str, Any], classifier: Path | None = None
) -> None:
    """Writes a pipeline as float16 safetensors, in the layout of a diffusers model folder.

    Args:
        model: the trained denoiser.
        vae: the autoencoder.
        target: the folder.
        figures: of the training, for figures.json.
        classifier: weights of a classifier that is exported too.
    """
    # a model without the path of the folder it was loaded from; pipelines of transformers add the shift to latents
    config = {k: v for k, v in vae.config.items() if k != "_name_or_path"}
    decoder = AutoencoderKL.from_config(config | {"shift_factor": vae.config.shift_factor or 0.0})
    decoder.load_state_dict(vae.state_dict())
    pipe = model.pipeline(decoder)
    pipe.to(torch.float16).save_pretrained(target, safe_serialization=True)
    export_for_transformers_4(target)
    if classifier is not None:
        save_file({k: v.half() for k, v in load_file(classifier).items()}, target / "classifier.safetensors")
    (target / "figures.json").write_text(json.dumps(figures, indent=1))


def export_for_transformers_4(target: Path) -> None:
    """Adds what transformers 4 reads and 5 no longer writes; 5 reads both.

    These are the vocabulary of CLIP's tokenizers as separate files; the original names of the weights of CLIP's text
    encoders, without which they would be random; the name of the class of T5's tokenizer that reads tokenizer.json, and
    its configuration without an empty list, where 4 expects a table.
    """
    index = json.loads((target / "model_index.json").read_text())
    for part, (_, name) in ((part, kind) for part, kind in index.items() if isinstance(kind, list)):
        if name == "CLIPTokenizer":
            _write_vocabulary(target / part)
        elif name in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            _name_weights(target / part / "model.safetensors")
        elif name == "T5Tokenizer":
            index[part][1] = "T5TokenizerFast"
            file = target / part / "tokenizer_config.json"
            config = {key: value for key, value in json.loads(file.read_text()).items() if value != []}
            file.write_text(json.dumps(config, indent=2) + "\n")
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_vocabulary(folder: Path) -> None:
    """Writes vocab.json and merges.txt of a CLIP tokenizer."""
    bpe = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False, indent=0), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")


def _name_weights(file: Path) -> None:
    """Gives the weights of a CLIP text encoder their original names; the projection is outside of `text_model`."""
    prefix, projection = "text_model.", "text_projection."
    weights = {
        name if name.startswith(projection) else prefix + name.removeprefix(prefix): value
        for name, value in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
