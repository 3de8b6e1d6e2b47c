"""The embedded text-to-image models: small, with the classes of published models, loaded without network.

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
from .pipelines import GUIDANCE as GUIDANCE
from .pipelines import call_options as call_options

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .classifier import DemoClassifier

NATIVE_SIZE = 256  # pixels


def load(
    model: str = "scenes", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """Loads an embedded model as a diffusers pipeline for 256 × 256 images.

    Args:
        model: "scenes" or "textures", a StableDiffusionPipeline; "sd3", a StableDiffusion3Pipeline; "flux", a
            FluxPipeline.
        device: where it runs.
        dtype: of its weights.

    Raises:
        ValueError: an unknown model.
        FileNotFoundError: its weights are missing.
    """
    folder = get_model(model).weights
    check_torchvision()
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch_dtype has a newer name, which older diffusers lack
        pipe = DiffusionPipeline.from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True)
    if hasattr(pipe, "default_sample_size"):  # Flux's own default is 1024 px
        pipe.default_sample_size = NATIVE_SIZE // pipe.vae_scale_factor
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
    weights = load_file(shown.classifier_file)
    net.load_state_dict({name: value.float() for name, value in weights.items()})
    return net.to(device).eval().requires_grad_(False)
