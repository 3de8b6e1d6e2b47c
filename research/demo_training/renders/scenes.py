"""Renders lit scenes with names, on which the embedded model is trained.

A scene is one object (6 shapes × 4 materials) in one of 4 settings, 96 classes in all: "golden torus in the desert".
`render` renders any number of them with torch: signed-distance shapes by sphere tracing, one sun with soft shadows, sky
light, and textures with the spectrum of natural images (amplitude ~ 1/f, Field 1987). Everything else (camera, sun,
colours, wear, clouds, hills) follows from the seed.

Distances are in units of the object's bounding radius; y points up; colours are linear light until the last line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tofu_sd.demo.scene_classes import SHAPES, SceneClass

from .scene_materials import HORIZON, MATERIAL_OF, SUN_POWER, SUNLIGHT, ZENITH, SceneBatch, ground, mix, sky, smooth
from .scene_shapes import SHAPE_OF, Distance


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

    turn = SHAPE_OF[kind.shape].turn
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
    lit[at] = smooth(0.0, 1.0, seen)
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


def _lit(albedo: Tensor, facing: Tensor, openness: Tensor, row: Tensor, s: SceneBatch) -> Tensor:
    """Matt reflection under sun and sky: albedo [M, 3], facing and openness [M] in 0..1 -> light [M, 3]."""
    kind = s.setting[row]
    sun = SUNLIGHT.to(albedo)[kind] * (SUN_POWER.to(albedo)[kind] * facing).unsqueeze(-1)
    sky = (HORIZON.to(albedo)[kind] + ZENITH.to(albedo)[kind]) * openness.unsqueeze(-1)
    return albedo * (0.45 * sun + 0.375 * sky)


def _surroundings(o: Tensor, d: Tensor, row: Tensor, s: SceneBatch, shadow: bool = True) -> Tensor:
    """Light that reaches o from direction d (both [M, 3], o from the object's centre), past the object: [M, 3]."""
    colour = sky(d, row, s)
    at = (d[:, 1] < -1e-3).nonzero().squeeze(-1)
    o, d, row = o[at], d[at], row[at]
    t = -(o[:, 1] + s.shape.foot) / d[:, 1]
    p = o + t.unsqueeze(-1) * d
    albedo, slope = ground(p, row, s)
    n = F.normalize(torch.stack((-slope[:, 0], torch.ones_like(t), -slope[:, 1]), -1), dim=-1)
    facing, openness = (n * s.sun[row]).sum(-1).clamp_min(0), torch.ones_like(t)
    if shadow:
        inside = s.local(p, row)
        facing = facing * _sunlit(s.shape.distance, inside, s.local(s.sun[row], row))
        openness = 0.35 + 0.65 * smooth(0.0, 0.7, s.shape.distance(inside))
    haze = 1 - torch.exp(-t / 28)
    colour[at] = mix(_lit(albedo, facing, openness, row, s), HORIZON.to(d)[s.setting[row]], haze)
    return colour


def _surface(p: Tensor, d: Tensor, row: Tensor, s: SceneBatch) -> Tensor:
    """Light that leaves the object at p [M, 3] (its own frame) towards -d [M, 3] (world frame): [M, 3]."""
    n_in = _normal(s.shape.distance, p)
    albedo, gloss, metal = torch.empty_like(p), p.new_empty(len(p)), p.new_empty(len(p))
    for index, material in enumerate(MATERIAL_OF):
        at = (s.material[row] == index).nonzero().squeeze(-1)
        albedo[at], gloss[at], metal[at] = material(p[at], n_in[at], row[at], s)
    n, world = s.local(n_in, row, -1), s.local(p, row, -1)
    facing = (n * s.sun[row]).sum(-1).clamp_min(0)
    facing = facing * _sunlit(s.shape.distance, p + 0.02 * n_in, s.local(s.sun[row], row))
    height = world[:, 1] + s.shape.foot
    openness = (0.55 + 0.45 * n[:, 1]) * (0.5 + 0.5 * smooth(0.0, 0.6, height))
    matt = _lit(albedo, facing, openness, row, s)

    away = d - 2 * (d * n).sum(-1, keepdim=True) * n
    mirror = _surroundings(world, away, row, s, shadow=False)
    glint = (away * s.sun[row]).sum(-1).clamp_min(0) ** 60 * (facing > 0)
    mirror = mirror + SUNLIGHT.to(p)[s.setting[row]] * (2.5 * glint).unsqueeze(-1)
    fresnel = 0.04 + 0.5 * (1 + (d * n).sum(-1)).clamp(0, 1) ** 5  # Schlick's form for a dielectric
    return mix(matt + mirror * (gloss * fresnel).unsqueeze(-1), albedo * 0.75 * mirror + 0.4 * matt, metal)


def _stacked(scenes: list[Scene], device: torch.device) -> SceneBatch:
    labels = torch.tensor([s.kind.labels for s in scenes], device=device)
    return SceneBatch(
        SHAPE_OF[scenes[0].kind.shape],
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
    colour[at] = mix(colour[at], _surface(p, d[at], r, s), cover[seen])
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
