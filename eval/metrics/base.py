"""The kinds of metric, and what their implementations share.

All take uint8 images [B, 3, H, W] as read from the saved PNGs and compute in float32 or better. A metric whose package
or weights are unavailable is a `Skipped` with the reason. Networks are imported when they are requested.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..common.files import without_paths


@dataclass(frozen=True)
class Pairwise:
    """A distance or similarity of two images: compute(a, b) -> float64 [B]."""

    name: str
    implementation: str
    lower_is_better: bool
    compute: Callable[[Tensor, Tensor], Tensor]
    digits: int = 4


@dataclass(frozen=True)
class PerImageMetric:
    """A figure of a single image: compute(images, prompts) -> float64 [B]. is_proportion: its values are 0 or 1."""

    name: str
    implementation: str
    lower_is_better: bool
    compute: Callable[[Tensor, Sequence[str]], Tensor]
    digits: int = 3
    is_proportion: bool = False


@dataclass(frozen=True)
class Features:
    """A feature space in which sets of images are compared: compute(images) -> [B, D]."""

    implementation: str
    compute: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DistributionMetric:
    """A distance of two sets of images by their features: distance([N, D], [N, D]).

    Metrics with the same `features` share them. minimum: a distance below it is impossible; an unbiased one can be
    below 0 by chance.
    """

    name: str
    implementation: str
    features: Features
    distance: Callable[[Tensor, Tensor], float]
    lower_is_better: bool = True
    digits: int = 4
    minimum: float = 0.0


@dataclass(frozen=True)
class Skipped:
    """A metric that cannot be computed here."""

    name: str
    reason: str


Metric = PerImageMetric | Pairwise | DistributionMetric | Skipped

# what damaged weight files and failed downloads raise
LOAD_ERRORS = (OSError, RuntimeError, KeyError, ValueError, EOFError, UnpicklingError, SafetensorError)


def is_flat(images: Tensor) -> Tensor:
    """Which of the images [B, 3, H, W] have one flat colour: black, as after NaN, or any other."""
    return (images.amax((2, 3)) == images.amin((2, 3))).all(1)


def to_unit(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images as float32 in 0..1 on the device."""
    return images.to(device).float() / 255


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, float32 means float32: no autocast (bfloat16 moves MS-SSIM by a third), no TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def install_hint(error: ImportError, package: str) -> str:
    """'pip install lpips', or the error where the package is installed and one of its dependencies is not."""
    return f"pip install {shlex.quote(package)}" if error.name == package.partition("[")[0] else first_line(error)


def first_line(error: Exception) -> str:
    """The first line of an error, without folders."""
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return without_paths(first)
