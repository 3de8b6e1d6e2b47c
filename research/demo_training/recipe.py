"""What is trained, and for how many samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tofu_sd.demo.models import SCENES, TEXTURES, DemoModel

from .renders import textures
from .renders.scenes import render

CROP = 96  # side of the autoencoder's training crops in pixels, at full and at half size
PART = 160  # side of the classifier's training crops in pixels, where a part of an image shows its class
TEST_SEED = 10_000_000  # renders with seeds from here on are never used in training


@dataclass(frozen=True)
class Content:
    """The images that a model is trained on.

    Args:
        model: its name, classes and labels.
        render: (classes, seeds, size, device) -> images [B, 3, size, size] in 0..1.
        widths: of the UNet's levels.
        has_parts: whether a part of an image shows its class, so that the classifier may train on crops.
    """

    model: DemoModel
    render: Callable[[list[Any], list[int], int, torch.device], Tensor]
    widths: tuple[int, int, int]
    has_parts: bool = False

    @property
    def classes(self) -> Sequence[Any]:
        return self.model.classes


def _textures(kinds: list[Any], seeds: list[int], size: int, device: torch.device) -> Tensor:
    return torch.from_numpy(textures.render(kinds, seeds, size)).to(device)


CONTENTS = {
    "scenes": Content(SCENES, render, (64, 112, 160)),
    "textures": Content(TEXTURES, _textures, (64, 112, 144), has_parts=True),
}

DENOISERS = ("unet", "sd3", "flux")
SD3_PIXELS = 384  # side of the largest image; the table of positions is part of the weights, and grows with its square
OF_DENOISER = ("denoiser", "low", "high", "large")  # fields of a recipe on which renders and latents do not depend
OF_AUTOENCODER = ("features", "classifier", "vae")  # fields of which a transformer takes the embedded model's results


@dataclass(frozen=True)
class Recipe:
    """Samples of each stage; the default takes two CPU cores about two and a half hours."""

    content: str = "scenes"
    denoiser: str = "unet"
    images: int = 80  # renders of each class
    size: int = 256  # pixels; latents are size / 8
    features: int = 0  # a classifier for the autoencoder's perceptual loss; 0 takes the demo classifier
    classifier: int = 60_000
    vae: int = 48_000
    low: int = 60_000
    high: int = 60_000
    large: int = 0  # on 64 × 64 latents, with four times as many on 32 × 32 ones; 0 skips this stage
    large_images: int = 12  # renders of each class at twice the size
    seed: int = 0

    def __post_init__(self) -> None:
        if self.content not in CONTENTS:
            raise ValueError(f"content is {self.content!r}; it must be one of {', '.join(CONTENTS)}")
        if self.denoiser not in DENOISERS:
            raise ValueError(f"denoiser is {self.denoiser!r}; it must be one of {', '.join(DENOISERS)}")
        for name in ("features", "large"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be an integer >= 0")
        if self.size < 2 * CROP or self.size % 16:
            raise ValueError(f"size is {self.size}; it must be a multiple of 16 and at least {2 * CROP} pixels")
        self._check_sides()
        for name in ("images", "classifier", "vae", "low", "high", "large_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be an integer >= 1")

    def _check_sides(self) -> None:
        if self.denoiser == "flux" and self.size % 32:
            raise ValueError(
                f"size is {self.size}; flux packs 2 × 2 latents, so that it must be a multiple of 32 pixels"
            )
        if self.denoiser == "sd3" and (largest := 2 * self.size if self.large else self.size) > SD3_PIXELS:
            raise ValueError(f"the largest images have {largest} pixels; sd3 has positions for at most {SD3_PIXELS}")

    @property
    def shown(self) -> Content:
        return CONTENTS[self.content]

    def kinds(self, images: int | None = None) -> list[int]:
        """Returns the class index of every render, in file order."""
        return [c for c in range(len(self.shown.classes)) for _ in range(images or self.images)]


_TEXTURES = Recipe(
    "textures", images=100, features=48_000, classifier=768_000, vae=64_000, low=40_000, high=72_464, large=3_200
)
RECIPES = {  # of the embedded models
    "scenes": Recipe(),
    "textures": _TEXTURES,
    "sd3": replace(_TEXTURES, denoiser="sd3", low=140_000, high=90_000, large=0),
    "flux": replace(_TEXTURES, denoiser="flux", low=100_000, high=240_000, large=12_000),
}


def embedded_model(content: str, denoiser: str) -> str:
    """Returns the name of the embedded model with this content and denoiser.

    Raises:
        ValueError: there is none.
    """
    for name, recipe in RECIPES.items():
        if (recipe.content, recipe.denoiser) == (content, denoiser):
            return name
    known = ", ".join(f"{recipe.content} with {recipe.denoiser}" for recipe in RECIPES.values())
    raise ValueError(f"no embedded model is {content} with {denoiser}; known: {known}")
