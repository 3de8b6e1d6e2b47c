"""Noise, sky, ground and materials of the rendered scenes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .scene_shapes import Shape

TILE = 256  # side of a noise tile; it repeats without a seam


@functools.cache
def noise_tiles(count: int = 8, falloff: float = 1.25, device: str = "cpu") -> Tensor:
    """`count` seamless tiles of noise with amplitude ~ 1/f^falloff, mean 0, standard deviation 1: [count, TILE, TILE].

    Always the same tiles: scenes differ in where they sample them.
    """
    g = torch.Generator().manual_seed(1987)
    f = torch.fft.fftfreq(TILE)
    radius = (f[:, None] ** 2 + f[None, :] ** 2).sqrt()
    radius[0, 0] = math.inf  # no constant part
    white = torch.fft.fft2(torch.randn(count, TILE, TILE, generator=g))
    tiles = torch.fft.ifft2(white * radius**-falloff).real
    return (tiles / tiles.std(dim=(1, 2), keepdim=True)).to(device)


def noise2(uv: Tensor, tile: Tensor) -> Tensor:
    """Bilinear look-up of tile `tile` [M] at uv [M, 2], where one tile spans one unit: [M]."""
    tiles = noise_tiles(device=str(uv.device))
    at = uv.remainder(1.0) * TILE
    low = at.floor()
    fx, fy = (at - low).unbind(-1)
    x0, y0 = (low.long() % TILE).unbind(-1)
    x1, y1 = (x0 + 1) % TILE, (y0 + 1) % TILE
    top = tiles[tile, y0, x0] * (1 - fx) + tiles[tile, y0, x1] * fx
    low_row = tiles[tile, y1, x0] * (1 - fx) + tiles[tile, y1, x1] * fx
    return top * (1 - fy) + low_row * fy


def noise3(p: Tensor, tile: Tensor) -> Tensor:
    """Solid noise at p [M, 3]: the mean of three plane look-ups, rescaled to standard deviation about 1: [M]."""
    return (
        noise2(p[:, [0, 1]], tile) + noise2(p[:, [1, 2]] + 0.37, tile) + noise2(p[:, [2, 0]] + 0.71, tile)
    ) / math.sqrt(3)


def _rgb(*rows: tuple[float, float, float]) -> Tensor:
    return torch.tensor(rows).pow(2.2)  # written as seen on a screen, used as linear light


#                 meadow              desert              snow                sunset
ZENITH = _rgb((0.24, 0.46, 0.82), (0.36, 0.58, 0.86), (0.62, 0.69, 0.78), (0.30, 0.32, 0.55))

HORIZON = _rgb((0.74, 0.85, 0.95), (0.93, 0.86, 0.74), (0.87, 0.90, 0.94), (0.98, 0.62, 0.33))

CLOUD = _rgb((0.97, 0.98, 1.00), (0.98, 0.95, 0.90), (0.78, 0.82, 0.88), (0.96, 0.52, 0.42))

SUNLIGHT = _rgb((1.00, 0.96, 0.88), (1.00, 0.93, 0.80), (0.95, 0.96, 1.00), (1.00, 0.76, 0.52))

GROUND_A = _rgb((0.22, 0.42, 0.12), (0.83, 0.66, 0.43), (0.90, 0.93, 0.97), (0.50, 0.47, 0.47))

GROUND_B = _rgb((0.55, 0.62, 0.22), (0.70, 0.50, 0.30), (0.74, 0.80, 0.90), (0.30, 0.29, 0.34))

HILL = _rgb((0.26, 0.40, 0.24), (0.66, 0.46, 0.32), (0.58, 0.64, 0.72), (0.25, 0.20, 0.30))

CLOUDINESS = torch.tensor([0.45, 0.1, 0.8, 0.5])

SUN_POWER = torch.tensor([2.3, 2.6, 1.3, 2.2])


@dataclass
class SceneBatch:
    """Scenes of one shape as stacked tensors; a ray's `row` [M] names its scene."""

    shape: Shape
    material: Tensor  # [B] long
    setting: Tensor  # [B] long
    sun: Tensor  # [B, 3]
    yaw: Tensor  # [B]
    u: Tensor  # [B, 16]

    def tile(self, row: Tensor, channel: int) -> Tensor:
        return (self.u[row, channel] * len(noise_tiles())).long()

    def local(self, v: Tensor, row: Tensor, sign: int = 1) -> Tensor:
        """Directions v [M, 3] turned into the object's frame (sign=-1: back out of it)."""
        cos, sin = self.yaw[row].cos(), -sign * self.yaw[row].sin()
        x, y, z = v.unbind(-1)
        return torch.stack((cos * x + sin * z, y, cos * z - sin * x), -1)


def mix(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return a + (b - a) * t.unsqueeze(-1)


def smooth(low: float, high: float, x: Tensor) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def sky(d: Tensor, row: Tensor, s: SceneBatch) -> Tensor:
    """Light from direction d [M, 3]: gradient, clouds, sun glow, a line of hills: [M, 3]."""
    kind, up = s.setting[row], d[:, 1].clamp_min(0)
    colour = mix(HORIZON.to(d)[kind], ZENITH.to(d)[kind], (up * 1.6).clamp(0, 1) ** 0.6)
    toward = (d * s.sun[row]).sum(-1).clamp(0, 1)
    glow = SUNLIGHT.to(d)[kind] * (0.35 * toward**12 + 3.0 * toward**900).unsqueeze(-1)
    dome = d[:, [0, 2]] / (up + 0.18).unsqueeze(-1)  # clouds lie on a plane above
    puff = noise2(dome * 0.11 + s.u[row, 0:2], s.tile(row, 2)) + 0.35 * noise2(
        dome * 0.5 + s.u[row, 1:3], s.tile(row, 3)
    )
    cover = CLOUDINESS.to(d)[kind] + 0.5 * (s.u[row, 3] - 0.5)
    cloud = smooth(1.4 - 2.2 * 0.5, 2.2, puff + 2.2 * (cover - 0.5)) * smooth(0.0, 0.18, up)
    colour = mix(colour + glow, CLOUD.to(d)[kind] * (0.8 + 0.4 * toward).unsqueeze(-1), 0.85 * cloud)
    azimuth = torch.atan2(d[:, 0], d[:, 2]) / (2 * math.pi)
    ridge = 0.05 + 0.035 * noise2(torch.stack((azimuth, s.u[row, 4]), -1), s.tile(row, 5))
    hill = smooth(-0.004, 0.004, ridge * (0.4 + s.u[row, 5]) - d[:, 1])
    hazy = mix(HILL.to(d)[kind], HORIZON.to(d)[kind], 0.35 + 0.3 * s.u[row, 6])
    return mix(colour, hazy, hill)


def ground(p: Tensor, row: Tensor, s: SceneBatch) -> tuple[Tensor, Tensor]:
    """Albedo and slope of the ground at p [M, 3] (y = 0): [M, 3], [M, 2]."""
    kind, xz = s.setting[row], p[:, [0, 2]]
    broad = noise2(xz * 0.035 + s.u[row, 6:8], s.tile(row, 4))
    fine = noise2(xz * 0.19 + s.u[row, 7:9], s.tile(row, 6))
    # sand carries wind ripples, warped by the broad noise
    along = xz[:, 0] * 0.8 + xz[:, 1] * 0.6
    ripple = torch.sin(along * 7.0 + 3.0 * broad) * (kind == 1)
    blade = noise2(xz * 0.9 + s.u[row, 7:9], s.tile(row, 6)) * (kind == 0)  # grass is rougher than sand and snow
    t = (0.5 + 0.22 * broad + 0.2 * fine + 0.12 * ripple + 0.2 * blade).clamp(0, 1)
    albedo = mix(GROUND_A.to(p)[kind], GROUND_B.to(p)[kind], t)
    slope = torch.stack((fine, noise2(xz * 0.23 + s.u[row, 8:10], s.tile(row, 7))), -1) * 0.12
    slope = slope + (torch.cos(along * 7.0 + 3.0 * broad) * (kind == 1) * 0.15).unsqueeze(-1)
    return albedo * (0.85 + 0.3 * s.u[row, 9:10]), slope


Surface = tuple[Tensor, Tensor, Tensor]  # albedo [M, 3], gloss [M] in 0..1, metal [M]: 0 or 1


def _marble(p: Tensor, n: Tensor, row: Tensor, s: SceneBatch) -> Surface:
    warp = noise3(p * 0.07 + s.u[row, 10:13], s.tile(row, 13))
    cloud = noise3(p * 0.2 + s.u[row, 10:13], s.tile(row, 13))
    vein = 1 - torch.sin((p @ p.new_tensor([1.3, 2.1, 0.9])) * 1.9 + 3.5 * warp).abs()
    white, grey = _rgb((0.95, 0.94, 0.92), (0.30, 0.32, 0.37)).to(p)
    albedo = mix(white, grey, (0.9 * vein**4 + 0.06 * cloud).clamp(0, 1))
    return albedo, torch.full_like(warp, 0.55), torch.zeros_like(warp)


def _wooden(p: Tensor, n: Tensor, row: Tensor, s: SceneBatch) -> Surface:
    warp = noise3(p * 0.1 + s.u[row, 10:13], s.tile(row, 13))
    grain = noise3(p * p.new_tensor([1.2, 0.15, 1.2]) + s.u[row, 10:13], s.tile(row, 13))  # drawn out along the trunk
    from_core = (p[:, [0, 2]] + 0.4).norm(dim=-1) + 0.06 * warp + 0.12 * p[:, 1]
    ring = 0.5 + 0.5 * torch.sin(24 * from_core)
    pale, dark = _rgb((0.72, 0.48, 0.26), (0.36, 0.19, 0.09)).to(p)
    albedo = mix(pale, dark, (0.8 * ring**2 + 0.12 * grain).clamp(0, 1))
    return albedo, torch.full_like(warp, 0.15), torch.zeros_like(warp)


def _golden(p: Tensor, n: Tensor, row: Tensor, s: SceneBatch) -> Surface:
    stain = noise3(p * 0.9 + s.u[row, 10:13], s.tile(row, 13))
    (gold,) = _rgb((1.00, 0.76, 0.26)).to(p)
    return gold * (1 + 0.06 * stain).unsqueeze(-1), torch.ones_like(stain), torch.ones_like(stain)


COURSE, STONE = 0.2, 0.42  # height and length of a brick with its joint


def _brick(p: Tensor, n: Tensor, row: Tensor, s: SceneBatch) -> Surface:
    # courses climb along y; on top faces along z; stones run along the axis that the face turns away from least
    level, along_z = n[:, 1].abs() > 0.8, n[:, 0].abs() > n[:, 2].abs()
    course = torch.where(level, p[:, 2], p[:, 1]) / COURSE
    stone = torch.where(along_z & ~level, p[:, 2], p[:, 0]) / STONE + 0.5 * (course.floor() % 2)
    to_joint = torch.minimum((0.5 - (course % 1 - 0.5).abs()) * COURSE, (0.5 - (stone % 1 - 0.5).abs()) * STONE)
    own = (course.floor() * 12.9898 + stone.floor() * 78.233).sin() * 43.7585 % 1  # a number of each stone's own
    soot = noise3(p * 0.9 + s.u[row, 10:13], s.tile(row, 13))
    red, burnt, mortar = _rgb((0.66, 0.26, 0.18), (0.45, 0.17, 0.13), (0.74, 0.70, 0.65)).to(p)
    albedo = mix(mortar, mix(red, burnt, (0.8 * own + 0.15 * soot).clamp(0, 1)), smooth(0.008, 0.022, to_joint))
    return albedo, torch.full_like(own, 0.05), torch.zeros_like(own)


MATERIAL_OF = (_marble, _wooden, _golden, _brick)  # in the order of MATERIALS
