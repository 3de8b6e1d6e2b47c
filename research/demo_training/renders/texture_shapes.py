"""Shapes, noise and colours of the dense images."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]  # of float32

TILE = 512  # side of a noise tile, which repeats without a seam


@functools.cache
def noise_tiles() -> Array:
    """Five seamless tiles of noise, mean 0, standard deviation 1: [5, TILE, TILE].

    Four have amplitude ~ 1/f, two of them along one direction; the last, a height field whose slopes do, has 1/f^2.
    """
    rng = np.random.default_rng(1987)
    f = np.fft.fftfreq(TILE)
    tiles = []
    for stretch, power in ((1.0, 1), (1.0, 1), (0.2, 1), (0.08, 1), (1.0, 2)):
        radius = np.hypot(f[:, None], f[None, :] / stretch)
        radius[0, 0] = np.inf
        tile = np.fft.ifft2(np.fft.fft2(rng.standard_normal((TILE, TILE))) / radius**power).real
        tiles.append(tile / tile.std())
    return np.stack(tiles).astype(np.float32)


@functools.cache
def text_tile() -> Array:
    """Rows of made-up letters on a page, 1 where there is ink: [TILE, TILE]."""
    rng = np.random.default_rng(26)
    strokes = rng.random((26, 7, 4)) < 0.45
    strokes[:, :, 0] |= rng.random((26, 7)) < 0.5
    page = np.zeros((TILE, TILE), np.float32)
    for y in range(3, TILE - 16, 20):
        x = 4
        while x < TILE - 14:
            if rng.random() < 0.16:
                x += 10
                continue
            page[y : y + 14, x : x + 8] = np.kron(strokes[rng.integers(26)], np.ones((2, 2), np.float32))
            x += 10
    return page


def look_up(tile: Array, x: Array, y: Array) -> Array:
    """Values of a tile at positions in image sides (a tile spans one side), to the nearest sample."""
    return tile[(y * TILE).astype(np.int64) % TILE, (x * TILE).astype(np.int64) % TILE]


def blend(tile: Array, x: Array, y: Array) -> Array:
    """As `look_up`, bilinear."""
    x, y = x * TILE, y * TILE
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = x - x0, y - y0
    i, j, i1, j1 = (a.astype(np.int64) % TILE for a in (y0, x0, y0 + 1, x0 + 1))
    upper, lower = tile[i, j] * (1 - fx) + tile[i, j1] * fx, tile[i1, j] * (1 - fx) + tile[i1, j1] * fx
    return upper * (1 - fy) + lower * fy


@dataclass(frozen=True)
class Look:
    """Colours and surface. accent: a rare colour; tile: which noise; rough: its contrast; gloss: strength of
    highlights; key: mean brightness of an image."""

    palette: tuple[tuple[float, float, float], ...]
    accent: tuple[float, float, float]
    tile: int
    rough: float
    gloss: float
    key: float


LOOK_OF = {
    "mossy": Look(((0.22, 0.36, 0.12), (0.36, 0.46, 0.16), (0.16, 0.24, 0.12), (0.46, 0.44, 0.30)),
                  (0.62, 0.66, 0.22), 0, 0.30, 0.05, 0.34),
    "rusty": Look(((0.56, 0.28, 0.14), (0.42, 0.20, 0.12), (0.68, 0.42, 0.24), (0.34, 0.24, 0.20)),
                  (0.30, 0.40, 0.42), 1, 0.34, 0.10, 0.34),
    "frosty": Look(((0.78, 0.84, 0.92), (0.62, 0.72, 0.84), (0.90, 0.93, 0.97), (0.46, 0.56, 0.70)),
                   (0.36, 0.42, 0.52), 0, 0.16, 0.35, 0.58),
    "golden": Look(((0.80, 0.60, 0.18), (0.92, 0.76, 0.34), (0.60, 0.42, 0.10), (0.70, 0.56, 0.28)),
                   (0.96, 0.92, 0.70), 2, 0.14, 0.75, 0.48),
    "charred": Look(((0.12, 0.11, 0.11), (0.22, 0.20, 0.20), (0.32, 0.30, 0.30), (0.16, 0.13, 0.12)),
                    (0.84, 0.30, 0.08), 3, 0.40, 0.12, 0.2),
    "painted": Look(((0.82, 0.16, 0.20), (0.14, 0.34, 0.74), (0.94, 0.78, 0.16), (0.16, 0.60, 0.52),
                     (0.92, 0.90, 0.86)), (0.60, 0.22, 0.62), 1, 0.12, 0.30, 0.44),
}  # fmt: skip


@dataclass
class Surface:
    """distance: signed, below 0 inside, in radii. nx, ny: slope of the relief. ink: 0..1, how far towards the accent
    or a darker tone. alpha: opacity inside."""

    distance: Array
    nx: Array | float = 0.0
    ny: Array | float = 0.0
    ink: Array | float = 0.0
    alpha: Array | float = 1.0


def _pebble(u: Array, v: Array, r: Array) -> Surface:
    v = v / (0.55 + 0.4 * r[0])
    angle = np.arctan2(v, u)
    rho = np.hypot(u, v) * (1 + 0.07 * np.sin(2 * angle + 6 * r[1]) + 0.05 * np.sin(3 * angle + 6 * r[2]))
    return Surface(rho - 1, u * rho, v * rho)


def _leaf(u: Array, v: Array, r: Array) -> Surface:
    v = v - (r[1] - 0.5) * 0.5 * (1 - u * u)
    width = 0.28 + 0.22 * r[0]
    teeth = 0.05 * np.abs(np.sin(16 * u)) * (r[2] > 0.5)
    vein = np.abs((6 * (u - np.abs(v))) % 1 - 0.5) > 0.42
    ink = np.maximum(np.abs(v) < 0.035, 0.5 * vein)
    return Surface(np.abs(v) - width * (1 - u * u) - teeth, 0.2 * u, np.sign(v) * 0.5, ink)


def _polygon(u: Array, v: Array, r: Array, sides: int, jitter: float) -> Surface:
    distance = np.full_like(u, -np.inf)
    nx, ny = np.zeros_like(u), np.zeros_like(u)
    for j in range(sides):
        angle = 2 * math.pi * (j + jitter * (r[j % 8] - 0.5)) / sides
        c, s = math.cos(angle), math.sin(angle)
        side = u * c + v * s - (0.62 + 0.25 * r[(j + 3) % 8])
        nearer = side > distance
        distance = np.where(nearer, side, distance)
        nx, ny = np.where(nearer, c, nx), np.where(nearer, s, ny)
    bevel = distance > -0.25
    return Surface(distance, 0.7 * bevel * nx + (r[6] - 0.5), 0.7 * bevel * ny + (r[7] - 0.5))


def _rubble(u: Array, v: Array, r: Array) -> Surface:
    return _polygon(u, v, r, 6, 0.7)


def _shard(u: Array, v: Array, r: Array) -> Surface:
    flat = _polygon(u, v * (1 + 1.2 * r[4]), r, 3, 0.9)
    stripe = np.abs((3 * u * (r[1] - 0.5) + 3 * v * (r[2] - 0.5)) % 1 - 0.5) < 0.12
    return Surface(flat.distance, flat.nx, flat.ny, 0.6 * stripe)


def _plank(u: Array, v: Array, r: Array) -> Surface:
    width = 0.10 + 0.12 * r[0]
    grain = np.sin(30 * v / width * (0.2 + 0.1 * r[1]) + 4 * np.sin(3 * u + 6 * r[2]))
    nail = np.hypot(np.abs(u) - 0.85, v) < 0.04
    ink = np.maximum(np.float32(0.35) * (grain > 0.6), nail)
    return Surface(np.maximum(np.abs(u) - 1, np.abs(v) - width), 0.1 * grain, 0.4 * v / width, ink)


def _flower(u: Array, v: Array, r: Array) -> Surface:
    rho, angle = np.hypot(u, v), np.arctan2(v, u)
    petals = 5 + int(4 * r[0])
    edge = 0.68 + 0.3 * np.cos(petals * angle + 6 * r[1])
    heart = rho < 0.25
    fold = np.sin(petals * angle + 6 * r[1]) * 0.5
    return Surface(rho - edge, 0.6 * u - fold * v, 0.6 * v + fold * u, np.where(heart, 1.0, 0.3 * (rho < 0.4)))


def _ring(u: Array, v: Array, r: Array) -> Surface:
    v = v / (0.6 + 0.4 * r[0])
    rho = np.hypot(u, v) + 1e-6
    width = 0.16 + 0.1 * r[1]
    across = (rho - (1 - width)) / width
    return Surface((np.abs(across) - 1) * width, across * u / rho, across * v / rho)


def _bubble(u: Array, v: Array, r: Array) -> Surface:
    rho = np.hypot(u, v)
    return Surface(rho - 1, u, v, 0.25 * (rho > 0.86), 0.3 + 0.65 * np.clip(rho, 0, 1) ** 3)


def _blade(u: Array, v: Array, r: Array) -> Surface:
    v = v - (r[0] - 0.5) * 0.16 * (u + 1) ** 2
    width = 0.045 * (1.15 - u)
    return Surface(np.maximum(np.abs(v) - width, np.abs(u) - 1), 0.3 * u, v / (width + 0.02), 0.4 * (np.abs(v) < 0.012))


def _building(u: Array, v: Array, r: Array) -> Surface:
    width, columns, rows = 0.35 + 0.4 * r[0], 3 + int(5 * r[1]), 5 + int(9 * r[2])
    x, y = (u / width + 1) / 2 * columns, (v + 1) / 2 * rows
    window = (np.abs(x % 1 - 0.5) < 0.30) & (np.abs(y % 1 - 0.5) < 0.16 + 0.2 * r[3])
    lit = np.sin(np.floor(x) * 12.99 + np.floor(y) * 78.23 + 9 * r[4]) * 43758.5 % 1
    roof = v < -0.94
    return Surface(np.maximum(np.abs(u) - width, np.abs(v) - 1), 0.35 * np.sign(u), 0.0,
                   np.where(window, 0.35 + 0.65 * (lit > 0.6), 0.3 * roof))  # fmt: skip


def _page(u: Array, v: Array, r: Array) -> Surface:
    curl = 0.12 * np.sin(2 * u + 6 * r[2])
    distance = np.maximum(np.abs(u) - 0.72, np.abs(v + curl * u) - 0.95)
    scale = 0.16 + 0.14 * r[3]
    letters = look_up(text_tile(), u * scale + 10 * r[0], (v + curl * u) * scale + 10 * r[1])
    ink = letters * (np.abs(u) < 0.6) * (np.abs(v) < 0.85)
    return Surface(distance, 0.3 * np.cos(2 * u + 6 * r[2]), 0.0, ink)


@dataclass(frozen=True)
class Kind:
    """How a thing is laid out.

    smallest, largest: radii. breadth: reach across its long side, in radii. turn: spread of the angle about `angle`,
    radians. cover: how often the shapes cover the image. upright: shapes stand on the ground, nearer ones lower.
    ink_dark: ink is a darker tone of the shape's colour, else the look's accent.
    """

    shape: Callable[[Array, Array, Array], Surface]
    smallest: float
    largest: float
    breadth: float = 1.0
    turn: float = math.pi
    angle: float = 0.0
    cover: float = 3.0
    upright: bool = False
    ink_dark: bool = True


KIND_OF = {
    "pebbles": Kind(_pebble, 0.030, 0.26),
    "leaves": Kind(_leaf, 0.05, 0.34, breadth=0.75, cover=4.5),
    "rubble": Kind(_rubble, 0.030, 0.28),
    "planks": Kind(_plank, 0.12, 0.70, breadth=0.25, turn=0.35, cover=5.0),
    "flowers": Kind(_flower, 0.035, 0.24, cover=4.0, ink_dark=False),
    "rings": Kind(_ring, 0.04, 0.26, cover=5.0),
    "buildings": Kind(_building, 0.08, 0.55, turn=0.0, cover=5.0, upright=True, ink_dark=False),
    "bubbles": Kind(_bubble, 0.028, 0.24, cover=4.0),
    "grass": Kind(_blade, 0.10, 0.42, breadth=0.35, turn=0.5, angle=-math.pi / 2, cover=16.0),
    "shards": Kind(_shard, 0.04, 0.36, cover=4.0, ink_dark=False),
    "pages": Kind(_page, 0.08, 0.36, turn=0.6, cover=3.0),
}
