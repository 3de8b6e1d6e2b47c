"""The embedded text-to-image model: small, with Stable Diffusion's own classes, loaded without network.

    pipe = tofu_sd.demo.load()
    pipe("A high-quality photograph of a golden torus in the desert").images[0]

README.md in this folder says how it was trained and how good it is.
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
GUIDANCE = 3.0  # of all published figures; the pipeline's own default is Stable Diffusion's


def load(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Loads the embedded model as a StableDiffusionPipeline for 256 × 256 images (or 512 × 512)."""
    _check_weights()
    check_torchvision()
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch_dtype has a newer name, which older diffusers lack
        pipe = StableDiffusionPipeline.from_pretrained(
            str(WEIGHTS), torch_dtype=dtype, local_files_only=True, safety_checker=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe.to(device)


def _check_weights() -> None:
    if not (WEIGHTS / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the embedded model has no weights in {WEIGHTS}: reinstall tofu_sd, or train it again with "
            "`python -m research.demo_training.train`"
        )


def load_classifier(device: torch.device | str = "cpu") -> DemoClassifier:
    """Loads the demo classifier in float32. Its features compare images where no other network is available."""
    _check_weights()
    from safetensors.torch import load_file

    from .classifier import DemoClassifier

    net = DemoClassifier()
    net.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS / "classifier.safetensors").items()})
    return net.to(device).eval().requires_grad_(False)
