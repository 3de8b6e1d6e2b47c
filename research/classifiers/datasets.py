"""Pictures with labels, to train classifiers on and to judge them by: the embedded scenes, or a folder of folders."""

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

from ..demo_training import scenes

CACHE = Path("runs/scenes")
CHUNK = 32  # scenes rendered at once
READ = 2**30  # bytes of a folder's pictures that its key is made of, about, beside all their names and sizes


@dataclass(frozen=True)
class Labelled:
    """pictures: a dataset of (float [3, side, side], label). classes: their names. name: for tables. key: of what the
    pictures are: the name alone can be that of others.

    guidance [n, M, G]: what else is known of each picture, as tokens; None for nothing.
    """

    pictures: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]
    name: str
    key: str
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pictures)  # type: ignore[arg-type]

    @property
    def labels(self) -> list[int]:
        """Of every picture, without opening it."""
        return self.pictures.targets  # type: ignore[attr-defined]


class Renders(Dataset[tuple[Tensor, int]]):
    """Rendered scenes, as many of each class; picture i is of class i mod 96, so that a part is as mixed as all."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows
        self.targets = [i % len(CLASSES) for i in range(len(rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.array(self.rows[i])).float() / 255, self.targets[i]  # a copy: the map is read-only


class Noisy(Dataset[tuple[Tensor, int]]):
    """Pictures in 0..1 under Gaussian noise of a deviation `sigma`, cut to 0..1 again; the same noise every time."""

    def __init__(self, pictures: Dataset[tuple[Tensor, int]], sigma: float):
        self.pictures, self.sigma = pictures, sigma
        self.targets = pictures.targets  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.pictures)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture, label = self.pictures[i]
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(i))
        return (picture + self.sigma * noise).clamp(0, 1), label


def noisy(data: Labelled, sigma: float) -> Labelled:
    """The same pictures under noise (as in ImageNet-C, Hendrycks & Dietterich, ICLR 2019): where all are named right,
    accuracy tells nothing apart.
    """  # fmt: skip
    told = f", noise {sigma:g}"
    return replace(data, pictures=Noisy(data.pictures, sigma), name=data.name + told, key=data.key + told)


def rendered(side: int, per_class: int, first_seed: int, cache: Path = CACHE) -> Labelled:
    """Scenes of all 96 classes, side pixels wide, seeds from `first_seed` on. Rendered once and kept in `cache`."""
    rows = _kept(cache, f"{side}px", scenes.render, side, per_class, first_seed)
    key = f"scenes {digest(Path(scenes.__file__))}, {side} px, {len(rows)} from {first_seed}"
    return Labelled(Renders(rows), tuple(kind.name for kind in CLASSES), "scenes", key)


DEPTH, PIECE = 28, 4  # pixels a side of a picture of nearness, and of a piece of it


def guided(data: Labelled, per_class: int, first_seed: int, cache: Path = CACHE) -> Labelled:
    """The same rendered scenes with their nearness, as a depth camera would see it: 49 tokens of 4 × 4 pixels."""
    rows = _kept(cache, f"{DEPTH}px-near", scenes.nearness, DEPTH, per_class, first_seed)
    near = torch.from_numpy(np.array(rows)).float() / 255  # [n, 1, 28, 28]
    tokens = torch.nn.functional.unfold(near, PIECE, stride=PIECE).mT  # [n, 49, 16]
    return replace(data, guidance=tokens)


def _kept(
    cache: Path, what: str, draw: Callable[..., Tensor], side: int, per_class: int, first_seed: int
) -> np.ndarray:
    """uint8 [96 × per_class, C, side, side] of what `draw` makes of classes and seeds, from a file if it is there."""
    n = per_class * len(CLASSES)
    path = cache / f"{what}-{n}-from-{first_seed}-{digest(Path(scenes.__file__))}.npy"
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
        raise EvalError(f"{path.name} in {cache} is damaged; delete it, it is rendered again") from error


def _render(file: Path, what: str, draw: Callable[..., Tensor], side: int, n: int, first_seed: int) -> None:
    """Writes what `_kept` reads."""
    out: Any = None
    for begin in progress(range(0, n, CHUNK), f"{what}: {n} scenes"):
        rows = range(begin, min(begin + CHUNK, n))
        drawn = draw([CLASSES[i % len(CLASSES)] for i in rows], [first_seed + i for i in rows], side)
        if out is None:
            out = np.lib.format.open_memmap(file, "w+", np.uint8, (n, *drawn.shape[1:]))
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash where the map is written
                with file.open("r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        out[begin : begin + len(rows)] = (drawn * 255).round().byte().numpy()
    out.flush()


class Mixed(Dataset[tuple[Tensor, int]]):
    """A folder's pictures, the first of every class, then the second of every class, and so on: a part is as mixed as
    all. found: torchvision's ImageFolder, which has them class by class.
    """  # fmt: skip

    def __init__(self, found: Any):
        self.found = found
        seen: Counter[int] = Counter()
        rank = []
        for label in found.targets:
            rank.append(seen[label])
            seen[label] += 1
        self.order = sorted(range(len(rank)), key=lambda i: (rank[i], found.targets[i]))
        self.targets = [found.targets[i] for i in self.order]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.found[self.order[i]]


def plain(side: int) -> Callable[[Any], Tensor]:
    """Of a PIL image, the middle square as a float tensor [3, side, side] in 0..1."""
    from torchvision.transforms import v2

    steps = [v2.RGB(), v2.Resize(side), v2.CenterCrop(side), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose(steps)


def folder(path: Path, transform: Callable[[Any], Tensor]) -> Labelled:
    """Pictures of a folder with a folder for each class, as torchvision's ImageFolder reads it, ImageNet's val too.

    EvalError where it is none.
    """
    from torchvision.datasets import ImageFolder

    if not path.is_dir():
        raise EvalError(f"there is no folder {str(path)!r} of pictures; it holds a folder of them for each class")
    try:
        found = ImageFolder(str(path), transform)
    except FileNotFoundError as error:
        reason = without_paths(str(error))
        raise EvalError(f"the folder {str(path)!r} holds no folder of pictures for each class: {reason}") from error
    key = key_of([Path(name) for name, _ in found.samples], path)
    return Labelled(Mixed(found), tuple(found.classes), path.name, key)


def key_of(files: Sequence[Path], root: Path) -> str:
    """Of pictures in a folder, wherever a copy of it lies: by their names, their sizes and what they hold.

    Beyond a gibibyte, what every second of them holds, every third and so on: to read all of ImageNet takes minutes.
    """
    sizes = [file.stat().st_size for file in files]
    told = [(file.relative_to(root).as_posix(), size) for file, size in zip(files, sizes, strict=True)]
    key = hashlib.sha256(json.dumps(told).encode())
    for file in files[:: math.ceil(sum(sizes) / READ) or 1]:
        key.update(file.read_bytes())
    return key.hexdigest()[:16]
