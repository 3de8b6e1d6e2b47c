"""The embedded models: their classes, labels and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..utils import did_you_mean
from . import scene_classes, texture_classes

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class DemoModel:
    """An embedded model.

    Args:
        name: of the model and of its folder in `WEIGHTS`.
        classes: each with a `prompt`, a `name` and `labels`.
        labels: the values of each label, by its name.
        classifier_size: side in pixels to which its classifier resizes images.
        stride: the list of prompts takes every class in steps of it, so that its first N are a mixture for any N.
        content: name of the model with the same images and classifier; its own, where it has a classifier.
        denoiser: "unet", "sd3" or "flux".
    """

    name: str
    classes: Sequence[Any]
    labels: dict[str, tuple[str, ...]]
    classifier_size: int
    stride: int
    content: str
    denoiser: str = "unet"

    @property
    def weights(self) -> Path:
        """The folder of its weights."""
        return WEIGHTS / self.name

    @property
    def classifier_file(self) -> Path:
        """The weights of the classifier of its images."""
        return WEIGHTS / self.content / "classifier.safetensors"

    @property
    def label_counts(self) -> tuple[int, ...]:
        """The number of values of each label."""
        return tuple(map(len, self.labels.values()))

    @property
    def labels_of_prompts(self) -> dict[str, tuple[int, ...]]:
        """The labels of each prompt, as positions in `labels`."""
        return {kind.prompt: kind.labels for kind in self.classes}

    @property
    def is_available(self) -> bool:
        """Whether its weights are installed."""
        return (self.weights / "model_index.json").is_file()


SCENES = DemoModel(
    "scenes",
    scene_classes.CLASSES,
    {"shape": scene_classes.SHAPES, "material": scene_classes.MATERIALS, "setting": scene_classes.SETTINGS},
    classifier_size=128,
    stride=37,
    content="scenes",
)
TEXTURES = DemoModel(
    "textures",
    texture_classes.CLASSES,
    {"thing": texture_classes.THINGS, "look": texture_classes.LOOKS},
    classifier_size=256,
    stride=13,
    content="textures",
)
SD3 = replace(TEXTURES, name="sd3", denoiser="sd3")
FLUX = replace(TEXTURES, name="flux", denoiser="flux")
MODELS = {model.name: model for model in (SCENES, TEXTURES, SD3, FLUX)}
EMBEDDED = {"demo": SCENES, "demo-textures": TEXTURES}  # by their names on command lines


def get_model(name: str) -> DemoModel:
    """Returns the embedded model with this name.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: its weights are missing.
    """
    if name not in MODELS:
        raise ValueError(f"unknown embedded model {name!r}{did_you_mean(name, MODELS)}; known: {', '.join(MODELS)}")
    model = MODELS[name]
    if not model.is_available:
        raise FileNotFoundError(
            f"the embedded model {name!r} has no weights in {model.weights}: reinstall tofu_sd, or train it again with "
            f"`python -m research.demo_training.train --content {model.content} --denoiser {model.denoiser}`"
        )
    return model
