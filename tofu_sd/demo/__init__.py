"""The embedded text-to-image model: small, trained here, of Stable Diffusion's own classes, loaded without network.

    pipe = tofu_sd.demo.load()
    pipe("A high-quality photograph of a golden torus in the desert").images[0]

What it is, how it was trained and how good it is: README.md beside this file.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..environment import check_torchvision

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from .classifier import DemoClassifier

WEIGHTS = Path(__file__).parent / "weights"
NATIVE_SIZE = 256  # pixels
GUIDANCE = 3.0  # at which its pictures are judged and compared; the pipeline's own default is Stable Diffusion's


def load(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The embedded model as a StableDiffusionPipeline that draws 256 × 256 pictures (512 × 512 on request)."""
    _check_weights()
    check_torchvision()
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch_dtype's newer name, which older diffusers lack
        pipe = StableDiffusionPipeline.from_pretrained(
            str(WEIGHTS), torch_dtype=dtype, local_files_only=True, safety_checker=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe.to(device)


def _check_weights() -> None:
    if not (WEIGHTS / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the embedded model has no weights in {WEIGHTS}: reinstall tofu_sd, or make them anew with "
            "`python -m research.demo_training.train`"
        )


def load_classifier(device: torch.device | str = "cpu") -> DemoClassifier:
    """The classifier of the demo's scenes, in float32. Its features compare pictures where no other net can be had."""
    _check_weights()
    from safetensors.torch import load_file

    from .classifier import DemoClassifier

    net = DemoClassifier()
    net.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS / "judge.safetensors").items()})
    return net.to(device).eval().requires_grad_(False)
