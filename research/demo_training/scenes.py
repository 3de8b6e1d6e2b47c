"""Renders lit scenes with names, on which the embedded model is trained.

A scene is one object (6 shapes × 4 materials) in one of 4 settings, 96 classes in all: "golden torus in the desert".
`render` renders any number of them with torch: signed-distance shapes by sphere tracing, one sun with soft shadows, sky
light, and textures with the spectrum of natural images (amplitude ~ 1/f, Field 1987). Everything else (camera, sun,
colours, wear, clouds, hills) follows from the seed.

Distances are in units of the object's bounding radius; y points up; colours are linear light until the last line.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tofu_sd.demo.scene_classes import SHAPES, SceneClass

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


_SHAPES = {
    "sphere": Shape(_sphere, 0.85, math.pi),
    "cube": Shape(_cube, 0.58, math.pi),
    "torus": Shape(_torus, 0.89, 0.8),
    "cylinder": Shape(_cylinder, 0.8, math.pi),
    "cone": Shape(_cone, 0.67, math.pi),
    "arch": Shape(_arch, 0.62, 0.7),
}


@dataclass
class Scene:
    """The parameters of one image, from a seed. Tensors have no batch axis; `render` stacks them."""

    kind: SceneClass
    eye: Tensor  # [3] camera position
    look: Tensor  # [3] point the camera looks at
    zoom: float  # focal length over half the image's height
    roll: float  # camera roll, radians
    yaw: float  # the object's turn about the vertical, radians
    sun: Tensor  # [3] unit vector to the sun
    u: Tensor  # [16] uniform numbers in [0, 1) for everything else


def draw_scene(kind: SceneClass, seed: int) -> Scene:
    """Returns the scene of a seed, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(32, generator=g).tolist()

    def between(low: float, high: float) -> float:
        return low + (high - low) * u.pop()

    turn = _SHAPES[kind.shape].turn
    distance, height, azimuth = between(3.1, 4.3), between(0.5, 2.0), between(-math.pi, math.pi)
    eye = torch.tensor([distance * math.sin(azimuth), height, distance * math.cos(azimuth)])
    look = torch.tensor([between(-0.35, 0.35), between(0.55, 1.05), between(-0.35, 0.35)])
    sunset = kind.setting.endswith("sunset")
    sun_height = between(0.16, 0.32) if sunset else between(0.5, 1.05)
    sun_azimuth = azimuth + math.pi * (1 + between(-0.35, 0.35)) if sunset else azimuth + between(-2.2, 2.2)
    sun = torch.tensor(
        [
            math.sin(sun_azimuth) * math.cos(sun_height),
            math.sin(sun_height),
            math.cos(sun_azimuth) * math.cos(sun_height),
        ]
    )
    return Scene(kind, eye, look, between(2.0, 2.6), between(-0.05, 0.05), azimuth + between(-turn, turn), sun,
                 torch.tensor(u[:16]))  # fmt: skip


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
class _Batch:
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


def _mix(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return a + (b - a) * t.unsqueeze(-1)


def _smooth(low: float, high: float, x: Tensor) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _sky(d: Tensor, row: Tensor, s: _Batch) -> Tensor:
    """Light from direction d [M, 3]: gradient, clouds, sun glow, a line of hills: [M, 3]."""
    kind, up = s.setting[row], d[:, 1].clamp_min(0)
    colour = _mix(HORIZON.to(d)[kind], ZENITH.to(d)[kind], (up * 1.6).clamp(0, 1) ** 0.6)
    toward = (d * s.sun[row]).sum(-1).clamp(0, 1)
    glow = SUNLIGHT.to(d)[kind] * (0.35 * toward**12 + 3.0 * toward**900).unsqueeze(-1)
    dome = d[:, [0, 2]] / (up + 0.18).unsqueeze(-1)  # clouds lie on a plane above
    puff = noise2(dome * 0.11 + s.u[row, 0:2], s.tile(row, 2)) + 0.35 * noise2(
        dome * 0.5 + s.u[row, 1:3], s.tile(row, 3)
    )
    cover = CLOUDINESS.to(d)[kind] + 0.5 * (s.u[row, 3] - 0.5)
    cloud = _smooth(1.4 - 2.2 * 0.5, 2.2, puff + 2.2 * (cover - 0.5)) * _smooth(0.0, 0.18, up)
    colour = _mix(colour + glow, CLOUD.to(d)[kind] * (0.8 + 0.4 * toward).unsqueeze(-1), 0.85 * cloud)
    azimuth = torch.atan2(d[:, 0], d[:, 2]) / (2 * math.pi)
    ridge = 0.05 + 0.035 * noise2(torch.stack((azimuth, s.u[row, 4]), -1), s.tile(row, 5))
    hill = _smooth(-0.004, 0.004, ridge * (0.4 + s.u[row, 5]) - d[:, 1])
    hazy = _mix(HILL.to(d)[kind], HORIZON.to(d)[kind], 0.35 + 0.3 * s.u[row, 6])
    return _mix(colour, hazy, hill)


def _ground(p: Tensor, row: Tensor, s: _Batch) -> tuple[Tensor, Tensor]:
    """Albedo and slope of the ground at p [M, 3] (y = 0): [M, 3], [M, 2]."""
    kind, xz = s.setting[row], p[:, [0, 2]]
    broad = noise2(xz * 0.035 + s.u[row, 6:8], s.tile(row, 4))
    fine = noise2(xz * 0.19 + s.u[row, 7:9], s.tile(row, 6))
    # sand carries wind ripples, warped by the broad noise
    along = xz[:, 0] * 0.8 + xz[:, 1] * 0.6
    ripple = torch.sin(along * 7.0 + 3.0 * broad) * (kind == 1)
    blade = noise2(xz * 0.9 + s.u[row, 7:9], s.tile(row, 6)) * (kind == 0)  # grass is rougher than sand and snow
    t = (0.5 + 0.22 * broad + 0.2 * fine + 0.12 * ripple + 0.2 * blade).clamp(0, 1)
    albedo = _mix(GROUND_A.to(p)[kind], GROUND_B.to(p)[kind], t)
    slope = torch.stack((fine, noise2(xz * 0.23 + s.u[row, 8:10], s.tile(row, 7))), -1) * 0.12
    slope = slope + (torch.cos(along * 7.0 + 3.0 * broad) * (kind == 1) * 0.15).unsqueeze(-1)
    return albedo * (0.85 + 0.3 * s.u[row, 9:10]), slope


Surface = tuple[Tensor, Tensor, Tensor]  # albedo [M, 3], gloss [M] in 0..1, metal [M]: 0 or 1


def _marble(p: Tensor, n: Tensor, row: Tensor, s: _Batch) -> Surface:
    warp = noise3(p * 0.07 + s.u[row, 10:13], s.tile(row, 13))
    cloud = noise3(p * 0.2 + s.u[row, 10:13], s.tile(row, 13))
    vein = 1 - torch.sin((p @ p.new_tensor([1.3, 2.1, 0.9])) * 1.9 + 3.5 * warp).abs()
    white, grey = _rgb((0.95, 0.94, 0.92), (0.30, 0.32, 0.37)).to(p)
    albedo = _mix(white, grey, (0.9 * vein**4 + 0.06 * cloud).clamp(0, 1))
    return albedo, torch.full_like(warp, 0.55), torch.zeros_like(warp)


def _wooden(p: Tensor, n: Tensor, row: Tensor, s: _Batch) -> Surface:
    warp = noise3(p * 0.1 + s.u[row, 10:13], s.tile(row, 13))
    grain = noise3(p * p.new_tensor([1.2, 0.15, 1.2]) + s.u[row, 10:13], s.tile(row, 13))  # drawn out along the trunk
    from_core = (p[:, [0, 2]] + 0.4).norm(dim=-1) + 0.06 * warp + 0.12 * p[:, 1]
    ring = 0.5 + 0.5 * torch.sin(24 * from_core)
    pale, dark = _rgb((0.72, 0.48, 0.26), (0.36, 0.19, 0.09)).to(p)
    albedo = _mix(pale, dark, (0.8 * ring**2 + 0.12 * grain).clamp(0, 1))
    return albedo, torch.full_like(warp, 0.15), torch.zeros_like(warp)


def _golden(p: Tensor, n: Tensor, row: Tensor, s: _Batch) -> Surface:
    stain = noise3(p * 0.9 + s.u[row, 10:13], s.tile(row, 13))
    (gold,) = _rgb((1.00, 0.76, 0.26)).to(p)
    return gold * (1 + 0.06 * stain).unsqueeze(-1), torch.ones_like(stain), torch.ones_like(stain)


def _brick(p: Tensor, n: Tensor, row: Tensor, s: _Batch) -> Surface:
    # courses climb along y; on top faces along z; stones run along the axis that the face turns away from least
    level, along_z = n[:, 1].abs() > 0.8, n[:, 0].abs() > n[:, 2].abs()
    course = torch.where(level, p[:, 2], p[:, 1]) / COURSE
    stone = torch.where(along_z & ~level, p[:, 2], p[:, 0]) / STONE + 0.5 * (course.floor() % 2)
    to_joint = torch.minimum((0.5 - (course % 1 - 0.5).abs()) * COURSE, (0.5 - (stone % 1 - 0.5).abs()) * STONE)
    own = (course.floor() * 12.9898 + stone.floor() * 78.233).sin() * 43.7585 % 1  # a number of each stone's own
    soot = noise3(p * 0.9 + s.u[row, 10:13], s.tile(row, 13))
    red, burnt, mortar = _rgb((0.66, 0.26, 0.18), (0.45, 0.17, 0.13), (0.74, 0.70, 0.65)).to(p)
    albedo = _mix(mortar, _mix(red, burnt, (0.8 * own + 0.15 * soot).clamp(0, 1)), _smooth(0.008, 0.022, to_joint))
    return albedo, torch.full_like(own, 0.05), torch.zeros_like(own)


COURSE, STONE = 0.2, 0.42  # height and length of a brick with its joint
_MATERIALS = (_marble, _wooden, _golden, _brick)  # in the order of MATERIALS


BOUND = 1.08  # radius of the sphere outside which no ray is traced
MARCH_STEPS = 40
SHADOW_STEPS = 20


def _near_sphere(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays o + t d (o, d [M, 3]) pass the object's bounding sphere: (hit [M], t_in [M], t_out [M])."""
    b = (o * d).sum(-1)
    root = b * b - (o * o).sum(-1) + BOUND * BOUND
    half = root.clamp_min(0).sqrt()
    return (root > 0) & (half > b), (-b - half).clamp_min(0), half - b


def _march(distance: Distance, o: Tensor, d: Tensor, t: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Sphere tracing from t to end [M]: (t [M], gap [M]), gap being the least distance / path length met on the way."""
    gap = torch.full_like(t, math.inf)
    for _ in range(MARCH_STEPS):
        step = distance(o + t.unsqueeze(-1) * d)
        gap = torch.minimum(gap, step / t.clamp_min(1e-3))
        t = torch.minimum(t + 0.95 * step.clamp_min(0), end)
    return t, gap


def _sunlit(distance: Distance, p: Tensor, sun: Tensor) -> Tensor:
    """How much of the sun p [M, 3] sees past the object, 0..1, with a penumbra that widens with distance: [M]."""
    hit, t, end = _near_sphere(p, sun)
    lit = torch.ones_like(t)
    at = hit.nonzero().squeeze(-1)
    o, d, t, end = p[at], sun[at], t[at].clamp_min(0.03), end[at]
    seen = torch.ones_like(t)
    for _ in range(SHADOW_STEPS):
        step = distance(o + t.unsqueeze(-1) * d)
        seen = torch.minimum(seen, (14 * step / t).clamp(0, 1))
        t = torch.minimum(t + step.clamp(0.02, 0.25), end)
    lit[at] = _smooth(0.0, 1.0, seen)
    return lit


def _normal(distance: Distance, p: Tensor) -> Tensor:
    """Unit gradient of the distance at p [M, 3] by differences at the corners of a tetrahedron: [M, 3]."""
    corners = p.new_tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    taps = torch.stack([distance(p + 2e-3 * corner) for corner in corners], -1)  # [M, 4]
    return F.normalize(taps @ corners, dim=-1)


def _camera(scenes: list[Scene], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Camera rays of every pixel in raster order: origins [B, 3], unit directions [B, size * size, 3]."""
    eye = torch.stack([s.eye for s in scenes]).to(device)
    ahead = F.normalize(torch.stack([s.look for s in scenes]).to(device) - eye, dim=-1)
    right = F.normalize(torch.linalg.cross(ahead, eye.new_tensor([[0.0, 1.0, 0.0]]).expand_as(ahead)), dim=-1)
    up = torch.linalg.cross(right, ahead)
    roll = eye.new_tensor([s.roll for s in scenes]).unsqueeze(-1)
    right, up = right * roll.cos() + up * roll.sin(), up * roll.cos() - right * roll.sin()
    line = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(-line, line, indexing="ij")
    zoom = eye.new_tensor([s.zoom for s in scenes]).view(-1, 1, 1)
    d = ahead.unsqueeze(1) * zoom + right.unsqueeze(1) * x.reshape(1, -1, 1) + up.unsqueeze(1) * y.reshape(1, -1, 1)
    return eye, F.normalize(d, dim=-1)


def _lit(albedo: Tensor, facing: Tensor, openness: Tensor, row: Tensor, s: _Batch) -> Tensor:
    """Matt reflection under sun and sky: albedo [M, 3], facing and openness [M] in 0..1 -> light [M, 3]."""
    kind = s.setting[row]
    sun = SUNLIGHT.to(albedo)[kind] * (SUN_POWER.to(albedo)[kind] * facing).unsqueeze(-1)
    sky = (HORIZON.to(albedo)[kind] + ZENITH.to(albedo)[kind]) * openness.unsqueeze(-1)
    return albedo * (0.45 * sun + 0.375 * sky)


def _surroundings(o: Tensor, d: Tensor, row: Tensor, s: _Batch, shadow: bool = True) -> Tensor:
    """Light that reaches o from direction d (both [M, 3], o from the object's centre), past the object: [M, 3]."""
    colour = _sky(d, row, s)
    at = (d[:, 1] < -1e-3).nonzero().squeeze(-1)
    o, d, row = o[at], d[at], row[at]
    t = -(o[:, 1] + s.shape.foot) / d[:, 1]
    p = o + t.unsqueeze(-1) * d
    albedo, slope = _ground(p, row, s)
    n = F.normalize(torch.stack((-slope[:, 0], torch.ones_like(t), -slope[:, 1]), -1), dim=-1)
    facing, openness = (n * s.sun[row]).sum(-1).clamp_min(0), torch.ones_like(t)
    if shadow:
        inside = s.local(p, row)
        facing = facing * _sunlit(s.shape.distance, inside, s.local(s.sun[row], row))
        openness = 0.35 + 0.65 * _smooth(0.0, 0.7, s.shape.distance(inside))
    haze = 1 - torch.exp(-t / 28)
    colour[at] = _mix(_lit(albedo, facing, openness, row, s), HORIZON.to(d)[s.setting[row]], haze)
    return colour


def _surface(p: Tensor, d: Tensor, row: Tensor, s: _Batch) -> Tensor:
    """Light that leaves the object at p [M, 3] (its own frame) towards -d [M, 3] (world frame): [M, 3]."""
    n_in = _normal(s.shape.distance, p)
    albedo, gloss, metal = torch.empty_like(p), p.new_empty(len(p)), p.new_empty(len(p))
    for index, material in enumerate(_MATERIALS):
        at = (s.material[row] == index).nonzero().squeeze(-1)
        albedo[at], gloss[at], metal[at] = material(p[at], n_in[at], row[at], s)
    n, world = s.local(n_in, row, -1), s.local(p, row, -1)
    facing = (n * s.sun[row]).sum(-1).clamp_min(0)
    facing = facing * _sunlit(s.shape.distance, p + 0.02 * n_in, s.local(s.sun[row], row))
    height = world[:, 1] + s.shape.foot
    openness = (0.55 + 0.45 * n[:, 1]) * (0.5 + 0.5 * _smooth(0.0, 0.6, height))
    matt = _lit(albedo, facing, openness, row, s)

    away = d - 2 * (d * n).sum(-1, keepdim=True) * n
    mirror = _surroundings(world, away, row, s, shadow=False)
    glint = (away * s.sun[row]).sum(-1).clamp_min(0) ** 60 * (facing > 0)
    mirror = mirror + SUNLIGHT.to(p)[s.setting[row]] * (2.5 * glint).unsqueeze(-1)
    fresnel = 0.04 + 0.5 * (1 + (d * n).sum(-1)).clamp(0, 1) ** 5  # Schlick's form for a dielectric
    return _mix(matt + mirror * (gloss * fresnel).unsqueeze(-1), albedo * 0.75 * mirror + 0.4 * matt, metal)


def _stacked(scenes: list[Scene], device: torch.device) -> _Batch:
    labels = torch.tensor([s.kind.labels for s in scenes], device=device)
    return _Batch(
        _SHAPES[scenes[0].kind.shape],
        labels[:, 1],
        labels[:, 2],
        torch.stack([x.sun for x in scenes]).to(device),
        torch.tensor([x.yaw for x in scenes], device=device),
        torch.stack([x.u for x in scenes]).to(device),
    )


def _render_one_shape(scenes: list[Scene], size: int, device: torch.device) -> Tensor:
    """Linear light of scenes that share a shape: [B, size * size, 3]."""
    s = _stacked(scenes, device)
    shape = s.shape
    eye, d = _camera(scenes, size, device)
    row = torch.arange(len(scenes), device=device).repeat_interleave(size * size)
    d = d.reshape(-1, 3)
    o = (eye - eye.new_tensor([0.0, shape.foot, 0.0]))[row]
    colour = _surroundings(o, d, row, s)

    hit, start, end = _near_sphere(o, d)
    at = hit.nonzero().squeeze(-1)
    r, o_in, d_in = row[at], s.local(o[at], row[at]), s.local(d[at], row[at])
    t, gap = _march(shape.distance, o_in, d_in, start[at], end[at])
    zoom = torch.tensor([x.zoom for x in scenes], device=device)
    cover = (1 - gap * size * zoom[r] / 2).clamp(0, 1)  # an edge fades over the width of a pixel
    seen = (cover > 0).nonzero().squeeze(-1)
    at, r, p = at[seen], r[seen], (o_in + t.unsqueeze(-1) * d_in)[seen]
    colour[at] = _mix(colour[at], _surface(p, d[at], r, s), cover[seen])
    exposure = 1.35 * (0.85 + 0.35 * s.u[row, 14:15])
    return (1 - torch.exp(-exposure * colour)).reshape(len(scenes), size * size, 3)  # a film's shoulder


def _nearness_of_one_shape(scenes: list[Scene], size: int, device: torch.device) -> Tensor:
    """1 / distance from the camera of scenes that share a shape, 0 where there is sky: [B, size * size]."""
    s = _stacked(scenes, device)
    eye, d = _camera(scenes, size, device)
    row = torch.arange(len(scenes), device=device).repeat_interleave(size * size)
    d = d.reshape(-1, 3)
    o = (eye - eye.new_tensor([0.0, s.shape.foot, 0.0]))[row]
    nearness = (-d[:, 1] / (o[:, 1] + s.shape.foot)).clamp_min(0)  # of the ground
    hit, start, end = _near_sphere(o, d)
    at = hit.nonzero().squeeze(-1)
    t, gap = _march(s.shape.distance, s.local(o[at], row[at]), s.local(d[at], row[at]), start[at], end[at])
    seen = gap * size < 1  # within a pixel of the object
    nearness[at[seen]] = 1 / t[seen]
    return nearness.view(len(scenes), -1)


@torch.no_grad()
def nearness(kinds: list[SceneClass], seeds: list[int], size: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns the nearness of each pixel of `render`, 1 / distance and 0 for the sky: float [B, 1, size, size]."""
    values = _by_shape(kinds, seeds, torch.device(device), lambda scenes, on: _nearness_of_one_shape(scenes, size, on))
    return values.view(-1, 1, size, size)


def _by_shape(
    kinds: list[SceneClass], seeds: list[int], device: torch.device, draw: Callable[[list[Scene], torch.device], Tensor]
) -> Tensor:
    """Calls `draw` with the scenes of each shape, and returns the results in the order of the scenes.

    Raises:
        ValueError: the two lists differ in length.
    """
    if len(kinds) != len(seeds):
        raise ValueError(f"{len(kinds)} classes but {len(seeds)} seeds: every image needs one of each")
    scenes = [draw_scene(kind, seed) for kind, seed in zip(kinds, seeds, strict=True)]
    parts, places = [], []
    for shape in SHAPES:
        mine = [i for i, scene in enumerate(scenes) if scene.kind.shape == shape]
        if mine:
            parts.append(draw([scenes[i] for i in mine], device))
            places += mine
    return torch.cat(parts)[torch.tensor(places, device=device).argsort()]


@torch.no_grad()
def render(kinds: list[SceneClass], seeds: list[int], size: int = 256, device: torch.device | str = "cpu") -> Tensor:
    """Renders images: float [B, 3, size, size] in 0..1, sRGB.

    An image depends only on its class, its seed and the size, not on the batch.

    Args:
        kinds: the class of each image.
        seeds: the seed of each image.
        size: side in pixels.
        device: on which to render.

    Raises:
        ValueError: the two lists differ in length.
    """
    light = _by_shape(kinds, seeds, torch.device(device), lambda scenes, on: _render_one_shape(scenes, size, on))
    return light.clamp(0, 1).pow(1 / 2.2).reshape(-1, size, size, 3).permute(0, 3, 1, 2).contiguous()
