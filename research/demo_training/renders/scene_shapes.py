"""Signed-distance shapes of the rendered scenes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _length(*parts: Tensor) -> Tensor:
    return torch.stack(parts, -1).norm(dim=-1)


def _box(p: Tensor, half: tuple[float, float, float], rounding: float) -> Tensor:
    q = p.abs() - p.new_tensor(half) + rounding
    return q.clamp_min(0).norm(dim=-1) + q.amax(-1).clamp_max(0) - rounding


def _sphere(p: Tensor) -> Tensor:
    return p.norm(dim=-1) - 0.85


def _cube(p: Tensor) -> Tensor:
    return _box(p, (0.58, 0.58, 0.58), 0.04)


def _torus(p: Tensor) -> Tensor:
    x, y, z = p.unbind(-1)
    return _length(_length(x, y) - 0.62, z) - 0.27


def _cylinder(p: Tensor) -> Tensor:
    x, y, z = p.unbind(-1)
    q = torch.stack((_length(x, z) - 0.45, y.abs() - 0.8), -1) + 0.03
    return q.clamp_min(0).norm(dim=-1) + q.amax(-1).clamp_max(0) - 0.03


def _cone(p: Tensor) -> Tensor:
    x, y, z = p.unbind(-1)
    rho, tip, base = _length(x, z), 0.9, -0.65
    slope = 0.72 / (tip - base)
    side = (rho - slope * (tip - y)) / math.sqrt(1 + slope * slope)
    return torch.maximum(side, base - y) - 0.02


def _arch(p: Tensor) -> Tensor:
    x, y, _ = p.unbind(-1)
    wall = _box(p, (0.72, 0.62, 0.26), 0.03)
    bore = torch.where(y > -0.05, _length(x, y + 0.05), x.abs()) - 0.4
    return torch.maximum(wall, -bore)


Distance = Callable[[Tensor], Tensor]  # p [M, 3] -> signed distance [M]


@dataclass(frozen=True)
class Shape:
    distance: Distance
    foot: float  # how far the lowest point lies below the origin
    turn: float  # the largest yaw, radians, at which the shape still shows what it is


SHAPE_OF = {
    "sphere": Shape(_sphere, 0.85, math.pi),
    "cube": Shape(_cube, 0.58, math.pi),
    "torus": Shape(_torus, 0.89, 0.8),
    "cylinder": Shape(_cylinder, 0.8, math.pi),
    "cone": Shape(_cone, 0.67, math.pi),
    "arch": Shape(_arch, 0.62, 0.7),
}
