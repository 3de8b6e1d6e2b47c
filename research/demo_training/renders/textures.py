"""Renders dense images with the statistics of photographs, on which the second embedded model is trained.

An image is a dead-leaves composition (Lee, Mumford and Huang 2001): shapes that occlude each other, with radii r of
density r^-3, which makes image statistics independent of scale. Each shape has its own colour, relief, light and a
texture with amplitude ~ 1/f (Field 1987). 12 things (pebbles, leaves, buildings, pages of text, ...) x 6 looks (mossy,
rusty, ...) are 72 classes: "rusty leaves". Everything else (sizes, colours, light, order) follows from the seed.

Lengths are in units of the image side; x points right, y down; colours are sRGB values in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tofu_sd.demo.texture_classes import CLASSES, TextureClass

from .texture_shapes import KIND_OF, LOOK_OF, TILE, Array, Kind, Look, blend, look_up, noise_tiles


@dataclass
class _Light:
    """Direction to the light (unit vector towards the viewer's side), strength of the ambient part and the exposure."""

    x: float
    y: float
    z: float
    ambient: float
    exposure: float

    def shade(self, nx: Array | float, ny: Array | float, gloss: float) -> tuple[Array, Array]:
        """Matt and mirror-like light of a surface with slope (nx, ny)."""
        norm = 1 / np.sqrt(1 + np.square(nx) + np.square(ny))
        facing = np.clip((nx * self.x + ny * self.y + self.z) * norm, 0, 1)
        matt = self.exposure * (self.ambient + (1.15 - self.ambient) * facing)
        return np.float32(1) * matt, np.float32(gloss) * facing**24


def _light(rng: np.random.Generator) -> _Light:
    azimuth, height = rng.uniform(0, 2 * math.pi), rng.uniform(0.45, 1.1)
    x, y, z = math.cos(azimuth) * math.cos(height), math.sin(azimuth) * math.cos(height), math.sin(height)
    return _Light(x, y, z, rng.uniform(0.2, 0.45), rng.uniform(0.85, 1.25))


def _radii(kind: Kind, rng: np.random.Generator) -> Array:
    """Radii with density ~ r^-3 between the limits, as many as cover the image often enough."""
    low, high = kind.smallest * rng.uniform(0.8, 1.5), kind.largest * rng.uniform(0.7, 1.1)
    mean_square = 2 * math.log(high / low) / (low**-2 - high**-2)
    count = int(kind.cover / (math.pi * kind.breadth * mean_square))
    u = rng.random(count)
    return ((low**-2 - u * (low**-2 - high**-2)) ** -0.5).astype(np.float32)


def _place(kind: Kind, radii: Array, rng: np.random.Generator) -> Iterator[tuple[float, float, float, float, float]]:
    """(x, y, radius, angle, depth 0..1) of every shape, from back to front. Large shapes fill the back."""
    first = np.sort(rng.uniform(0.5, 1.0, 24) * kind.largest)[::-1]
    radii = np.concatenate([first.astype(np.float32), radii])
    x, y = rng.uniform(-0.1, 1.1, (2, len(radii)))
    lean = kind.angle + rng.normal() * 0.3 * (kind.turn > 0) * (not kind.upright)
    angles = lean + kind.turn * rng.uniform(-1, 1, len(radii))
    if kind.upright:  # nearer ones stand lower and are larger
        y = np.sort(rng.uniform(0.15, 1.15, len(radii)))
        radii = np.minimum(radii * (0.45 + 1.1 * y), 0.6)
    for i in range(len(radii)):
        yield float(x[i]), float(y[i]), float(radii[i]), float(angles[i]), i / len(radii)


def _paint(image: Array, at: tuple[float, float, float, float, float], kind: Kind, look: Look, light: _Light,
           rng: np.random.Generator) -> None:  # fmt: skip
    """Paints one shape over the image [size, size, 3]."""
    size = len(image)
    x, y, radius, angle, depth = at
    own = rng.random(8).astype(np.float32)
    base = np.asarray(look.palette[rng.integers(len(look.palette))], np.float32)
    base = base * np.float32(math.exp(0.28 * rng.normal())) + 0.04 * rng.normal(size=3).astype(np.float32)
    base = np.clip(base, 0.02, 1)
    offset = rng.random(2).tolist()
    c, s = math.cos(angle), math.sin(angle)
    reach_x = 1.15 * radius * (abs(c) + kind.breadth * abs(s)) if kind.breadth < 1 else 1.2 * radius
    reach_y = 1.15 * radius * (abs(s) + kind.breadth * abs(c)) if kind.breadth < 1 else 1.2 * radius
    x0, x1 = max(0, int((x - reach_x) * size)), min(size, int((x + reach_x) * size) + 2)
    y0, y1 = max(0, int((y - reach_y) * size)), min(size, int((y + reach_y) * size) + 2)
    if x0 >= x1 or y0 >= y1:
        return
    px = ((np.arange(x0, x1, dtype=np.float32) + 0.5) / size - x) / radius
    py = ((np.arange(y0, y1, dtype=np.float32) + 0.5) / size - y) / radius
    u, v = px[None, :] * c + py[:, None] * s, py[:, None] * c - px[None, :] * s
    surface = kind.shape(u, v, own)
    nx, ny = surface.nx * c - surface.ny * s, surface.nx * s + surface.ny * c
    texture = look_up(noise_tiles()[look.tile], u * radius + offset[0], v * radius + offset[1])
    matt, mirror = light.shade(nx, ny, look.gloss)
    tone = matt * (1 + look.rough * texture) * (0.7 + 0.3 * depth)
    tone = tone * (0.6 + 0.4 * np.clip(-4 * surface.distance, 0, 1))  # less light near the edge
    accent = base * 0.3 if kind.ink_dark else np.asarray(look.accent, np.float32)
    ink = np.asarray(surface.ink, np.float32)[..., None]
    colour = (base + ink * (accent - base)) * tone[..., None] + mirror[..., None]
    patch = image[y0:y1, x0:x1]
    shadow = 0.45 * np.clip(1 - surface.distance / 0.22, 0, 1)
    patch *= (1 - shadow * np.clip(0.4 + surface.alpha, 0, 1))[..., None]
    cover = np.clip(0.5 - surface.distance * radius * size, 0, 1) * surface.alpha
    patch += cover[..., None] * (colour - patch)


def _waves(size: int, look: Look, light: _Light, rng: np.random.Generator) -> Array:
    """Water seen at a slant: slopes of a height field in perspective, lit, mirroring, with foam where it is steep."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    z = 1 / (line[:, None] + rng.uniform(0.15, 0.9))
    scale, across = rng.uniform(0.25, 0.6), rng.uniform(1.2, 2.0)
    x = (line[None, :] - 0.5) * z * scale + float(rng.random())
    y = z * scale * across + float(rng.random()) + 0 * x
    height, step = noise_tiles()[4], 1 / TILE
    nx = 9 * (blend(height, x + step, y) - blend(height, x - step, y))
    ny = 9 * (blend(height, x, y + step) - blend(height, x, y - step))
    palette = np.asarray(look.palette, np.float32)
    deep, sky = palette[rng.permutation(len(palette))[:2]]
    matt, mirror = light.shade(nx, ny, 0.3 + look.gloss)
    up = np.clip(0.5 + 0.6 * ny, 0, 1)[..., None]
    foam = np.clip(2 * (np.hypot(nx, ny) - 1.2), 0, 1)[..., None]
    colour = (deep * 0.5 + up * (sky - deep * 0.5)) * matt[..., None] + mirror[..., None]
    return colour + 0.8 * foam * (np.asarray(look.accent, np.float32) - colour)


def _blurred(image: Array, sigma: float) -> Array:
    """A Gaussian blur of an image [size, size, 3] by sigma image sides."""
    size = len(image)
    reach = max(1, int(3 * sigma * size))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (sigma * size)) ** 2).astype(np.float32)
    taps /= taps.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(reach, reach) if a == axis else (0, 0) for a in range(3)], "edge")
        image = sum(tap * np.take(padded, range(i, i + size), axis) for i, tap in enumerate(taps))
    return image


def _draw(kind: TextureClass, seed: int, size: int) -> Array:
    """One image, float32 [size, size, 3] in 0..1."""
    rng, look = np.random.default_rng([seed, CLASSES.index(kind)]), LOOK_OF[kind.look]
    light = _light(rng)
    if kind.thing == "waves":
        image = _waves(size, look, light, rng)
    else:
        image = np.full((size, size, 3), 0.08, np.float32)
        layout = KIND_OF[kind.thing]
        places = list(_place(layout, _radii(layout, rng), rng))
        focus = rng.uniform(0.4, 0.97) if rng.random() < 0.4 else 0.0  # what lies behind is out of focus
        sharp_from = int(focus * len(places))
        for i, at in enumerate(places):
            if i == sharp_from and i:
                image = _blurred(image, rng.uniform(0.004, 0.016))
            _paint(image, at, layout, look, light, rng)
    line = np.arange(size, dtype=np.float32) / size
    x, y = line[None, :] * 0.5 + rng.random(), line[:, None] * 0.5 + rng.random()
    uneven = look_up(noise_tiles()[0], x + 0 * y, y + 0 * x)  # clouds, foliage, lamps: light is uneven too
    image = image * np.exp(0.16 * uneven)[..., None]
    image *= look.key * rng.uniform(0.8, 1.2) / image.mean()  # the camera's exposure
    return np.clip(image, 0, 1).astype(np.float32)


def render(kinds: Sequence[TextureClass], seeds: Sequence[int], size: int = 256) -> Array:
    """Images of `kinds`, one for each seed: float32 [B, 3, size, size] in 0..1, sRGB.

    An image depends only on its class, its seed and the size. ValueError where the two lists differ in length.
    """
    if len(kinds) != len(seeds):
        raise ValueError(f"{len(kinds)} classes but {len(seeds)} seeds: every image needs one of each")
    images = np.stack([_draw(kind, seed, size) for kind, seed in zip(kinds, seeds, strict=True)])
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
