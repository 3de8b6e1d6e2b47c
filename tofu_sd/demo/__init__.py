"""The embedded text-to-image models: small, with Stable Diffusion's own classes, loaded without network.

    pipe = tofu_sd.demo.load()
    pipe("A high-quality photograph of a golden torus in the desert").images[0]

README.md in this folder says how they were trained and how good they are.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

import torch

from ..environment import check_torchvision
from .models import get_model

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from .classifier import DemoClassifier

NATIVE_SIZE = 256  # pixels
GUIDANCE = 3.0  # of all published figures; the pipeline's own default is Stable Diffusion's


def load(
    model: str = "scenes", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """Loads an embedded model as a StableDiffusionPipeline for 256 × 256 images (or 512 × 512).

    Args:
        model: "scenes" or "textures".
        device: where it runs.
        dtype: of its weights.

    Raises:
        ValueError: an unknown model.
        FileNotFoundError: its weights are missing.
    """
    folder = get_model(model).weights
    check_torchvision()
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch_dtype has a newer name, which older diffusers lack
        pipe = StableDiffusionPipeline.from_pretrained(
            str(folder), torch_dtype=dtype, local_files_only=True, safety_checker=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe.to(device)


def load_classifier(model: str = "scenes", device: torch.device | str = "cpu") -> DemoClassifier:
    """Loads a demo classifier in float32. Its features compare images where no other network is available.

    Args:
        model: the embedded model whose images it classifies.
        device: where it runs.

    Raises:
        ValueError: an unknown model.
        FileNotFoundError: its weights are missing.
    """
    shown = get_model(model)
    from safetensors.torch import load_file

    from .classifier import DemoClassifier

    net = DemoClassifier(shown)
    weights = load_file(shown.weights / "classifier.safetensors")
    net.load_state_dict({name: value.float() for name, value in weights.items()})
    return net.to(device).eval().requires_grad_(False)
