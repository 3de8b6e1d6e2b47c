"""Labelled images, to train and evaluate classifiers: the embedded scenes, or a folder with a folder for each class."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from eval import EvalError
from eval.common.cli import progress
from eval.common.files import digest, without_paths
from tofu_sd.demo.scene_classes import CLASSES

from ..demo_training.renders import scene_materials, scene_shapes, scenes

CACHE = Path("runs/scenes")
RENDERER = digest(*(Path(str(module.__file__)) for module in (scenes, scene_shapes, scene_materials)))
CHUNK = 32  # scenes rendered at once
READ = 2**30  # bytes of a folder's images that its key is made of, about, besides all names and sizes


@dataclass(frozen=True)
class Labelled:
    """Images with labels.

    Args:
        images: a dataset of (image [3, side, side], label).
        classes: names of the classes.
        name: for tables.
        key: hash of the images; several may have the same name.
        guidance: [n, M, G], further tokens of each image, or None.
    """

    images: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]
    name: str
    key: str
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    @property
    def labels(self) -> list[int]:
        """The label of every image, without opening it."""
        return self.images.targets  # type: ignore[attr-defined]


class Renders(Dataset[tuple[Tensor, int]]):
    """Rendered scenes, equally many of each class. Image i has class i mod 96, so that any part is mixed."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows
        self.targets = [i % len(CLASSES) for i in range(len(rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.array(self.rows[i])).float() / 255, self.targets[i]  # a copy: the map is read-only


class Noisy(Dataset[tuple[Tensor, int]]):
    """Images in 0..1 with Gaussian noise of standard deviation `sigma`, clamped to 0..1; always the same noise."""

    def __init__(self, images: Dataset[tuple[Tensor, int]], sigma: float):
        self.images, self.sigma = images, sigma
        self.targets = images.targets  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = self.images[i]
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(i))
        return (image + self.sigma * noise).clamp(0, 1), label


def noisy(data: Labelled, sigma: float) -> Labelled:
    """Returns the same images with noise (as in ImageNet-C, Hendrycks & Dietterich, ICLR 2019).

    Without it accuracy may be too close to 100 % to compare methods.
    """
    suffix = f", noise {sigma:g}"
    return replace(data, images=Noisy(data.images, sigma), name=data.name + suffix, key=data.key + suffix)


def rendered(side: int, per_class: int, first_seed: int, cache: Path = CACHE) -> Labelled:
    """Returns scenes of all 96 classes, rendered once into `cache` with seeds from `first_seed` on."""
    rows = _cached(cache, f"{side}px", scenes.render, side, per_class, first_seed)
    key = f"scenes {RENDERER}, {side} px, {len(rows)} from {first_seed}"
    return Labelled(Renders(rows), tuple(kind.name for kind in CLASSES), "scenes", key)


DEPTH, PIECE = 28, 4  # side of a nearness image and of one of its pieces, in pixels


def guided(data: Labelled, per_class: int, first_seed: int, cache: Path = CACHE) -> Labelled:
    """Returns the same scenes with their nearness, as from a depth camera: 49 tokens of 4 × 4 pixels."""
    rows = _cached(cache, f"{DEPTH}px-near", scenes.nearness, DEPTH, per_class, first_seed)
    near = torch.from_numpy(np.array(rows)).float() / 255  # [n, 1, 28, 28]
    tokens = torch.nn.functional.unfold(near, PIECE, stride=PIECE).mT  # [n, 49, 16]
    return replace(data, guidance=tokens)


def _cached(
    cache: Path, what: str, draw: Callable[..., Tensor], side: int, per_class: int, first_seed: int
) -> np.ndarray:
    """Returns `draw(classes, seeds, side)` as uint8 [96 × per_class, C, side, side], from a file if there is one."""
    n = per_class * len(CLASSES)
    path = cache / f"{what}-{n}-from-{first_seed}-{RENDERER}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            _render(unfinished, what, draw, side, n, first_seed)
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise EvalError(f"{path.name} in {cache} is damaged; delete it, and it is rendered again") from error


def _render(file: Path, what: str, draw: Callable[..., Tensor], side: int, n: int, first_seed: int) -> None:
    """Writes the file that `_cached` reads."""
    out: Any = None
    for start in progress(range(0, n, CHUNK), f"{what}: {n} scenes"):
        rows = range(start, min(start + CHUNK, n))
        images = draw([CLASSES[i % len(CLASSES)] for i in rows], [first_seed + i for i in rows], side)
        if out is None:
            out = np.lib.format.open_memmap(file, "w+", np.uint8, (n, *images.shape[1:]))
            if hasattr(
                os, "posix_fallocate"
            ):  # a full disk is an error here, but a crash while the memory map is written
                with file.open("r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        out[start : start + len(rows)] = (images * 255).round().byte().numpy()
    out.flush()


class Mixed(Dataset[tuple[Tensor, int]]):
    """A folder's images: the first of every class, then the second of every class and so on; any part is mixed.

    Args:
        images: torchvision's ImageFolder, which has them class by class.
    """

    def __init__(self, images: Any):
        self.images = images
        count: Counter[int] = Counter()
        rank = []
        for label in images.targets:
            rank.append(count[label])
            count[label] += 1
        self.order = sorted(range(len(rank)), key=lambda i: (rank[i], images.targets[i]))
        self.targets = [images.targets[i] for i in self.order]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[self.order[i]]


def plain(side: int) -> Callable[[Any], Tensor]:
    """Returns the transform of a PIL image to its middle square: float [3, side, side] in 0..1."""
    from torchvision.transforms import v2

    steps = [v2.RGB(), v2.Resize(side), v2.CenterCrop(side), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose(steps)


def folder(path: Path, transform: Callable[[Any], Tensor]) -> Labelled:
    """Returns the images of a folder with a folder for each class, as torchvision's ImageFolder reads it.

    Raises:
        EvalError: there is no such folder.
    """
    from torchvision.datasets import ImageFolder

    if not path.is_dir():
        raise EvalError(f"there is no folder {str(path)!r} of images; it must hold a folder for each class")
    try:
        images = ImageFolder(str(path), transform)
    except FileNotFoundError as error:
        reason = without_paths(str(error))
        raise EvalError(f"the folder {str(path)!r} holds no folder of images for each class: {reason}") from error
    key = key_of([Path(name) for name, _ in images.samples], path)
    return Labelled(Mixed(images), tuple(images.classes), path.name, key)


def key_of(files: Sequence[Path], root: Path) -> str:
    """Returns a hash of the images in a folder, by names, sizes and content; a copy of the folder has the same.

    Of more than a GiB the content of every second image counts, of more every third and so on, as reading all of
    ImageNet takes minutes.
    """
    sizes = [file.stat().st_size for file in files]
    names = [(file.relative_to(root).as_posix(), size) for file, size in zip(files, sizes, strict=True)]
    key = hashlib.sha256(json.dumps(names).encode())
    for file in files[:: math.ceil(sum(sizes) / READ) or 1]:
        key.update(file.read_bytes())
    return key.hexdigest()[:16]
