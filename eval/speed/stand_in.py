"""Stable Diffusion 1.5 without its weights, in a folder for from_pretrained: `python -m eval.speed.stand_in FOLDER`.

Every size, step and setting is the model's own, so that a run of real size can be tried where the model is unavailable.
The weights are random and the images noise. The tokenizer learns its vocabulary from ImageNet's prompts, since CLIP's
cannot be redistributed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tofu_sd.demo.tokenizer import build_tokenizer

from .. import EvalError
from ..common.cli import Help, Parser, as_path, command
from ..common.files import check_place, without_paths
from ..images.requests import load_requests
from . import model_shapes

PIXELS = 512
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": PIXELS,
    "scaling_factor": 0.18215,
}
TEXT: dict[str, int] = {  # of CLIP ViT-L/14
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build(texts: Sequence[str], dtype: torch.dtype = torch.float16) -> Any:
    """The pipeline. texts: from which its tokenizer learns its vocabulary."""
    tokenizer = build_tokenizer(texts)
    # a row of the text encoder for each token, as in a whole model
    tokenizer.add_tokens([f"<unused-{i}>" for i in range(TEXT["vocab_size"] - len(tokenizer))])
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae, text_encoder = AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**TEXT, **special))
    return StableDiffusionPipeline(
        vae=nn.Module.to(vae, dtype).eval(),
        text_encoder=nn.Module.to(text_encoder, dtype).eval(),
        tokenizer=tokenizer,
        unet=model_shapes.unet(model_shapes.CASES[f"sd15-{PIXELS}"], 1, torch.device("cpu"), dtype)[0],
        scheduler=PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


EXAMPLES = """examples:
  python -m eval.speed.stand_in runs/standin
      then: python -m eval.run --suite paper --model runs/standin --limit 2
"""


def parser() -> Parser:
    """The parser of this command."""
    p = Parser(
        prog="python -m eval.speed.stand_in",
        description="Write a model of Stable Diffusion 1.5's sizes with random weights.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    p.add_argument("folder", type=as_path, help="a new folder; it takes 2.2 GB")
    return p


@command(resumes=False)
def main(argv: Sequence[str]) -> int:
    """Writes the model to a new folder."""
    folder = parser().parse_args(argv).folder
    if folder.exists():
        raise EvalError(f"{folder.name} exists already; give a new folder")
    check_place(folder, "folder", folder=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pipe = build([request.prompt for request in load_requests("imagenet1k")])
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
        try:
            pipe.save_pretrained(Path(unfinished) / folder.name)
        except SafetensorError as error:
            raise EvalError(f"cannot write {folder.name}: {without_paths(str(error))}") from error
        (Path(unfinished) / folder.name).rename(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
