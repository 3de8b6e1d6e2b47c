"""Functional linearity of layers (ToFu Eq. 8), and the depth split that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..config import TokenFusionConfig
from ..core.matching import bipartite_soft_matching
from ..core.partition import partition
from .block_info import BlockInfo
from .hooks import get_argument
from .patch import patch_of

POINTS = 11  # N of Eq. 8
PAIRS = 256  # of each sample, at most
ROLES = ("attn", "mlp")


def functional_linearity(f: Callable[[Tensor], Tensor], x1: Tensor, x2: Tensor, points: int = POINTS) -> Tensor:
    """FL(f, x1, x2) of each pair of tokens x1, x2 [..., C]: [...], in 0..1; 1 where f is linear between the two.

    f: takes tokens [..., C] each for itself, with one more axis of `points` before the last, to [..., C']. The way from
    f(x1) to f(x2) along the line from x1 to x2 is measured in points - 1 pieces. 1 too where the way has no length.
    """
    if points < 2:
        raise ValueError(f"points is {points}; a way needs its two ends, so at least 2")
    t = torch.linspace(0, 1, points, device=x1.device, dtype=x1.dtype).unsqueeze(-1)
    # in this form equal tokens stay where they are
    ways = f(x1.unsqueeze(-2) + t * (x2 - x1).unsqueeze(-2)).float()
    direct = (ways[..., -1, :] - ways[..., 0, :]).norm(dim=-1)
    along = ways.diff(dim=-2).norm(dim=-1).sum(dim=-1)
    return torch.where(along > 0, direct / along.clamp_min(torch.finfo(along.dtype).tiny), torch.ones_like(along))


@dataclass(frozen=True)
class Linearity:
    """The mean FL of a layer over the matched pairs of one call of the model.

    block: its name. depth: its place among all blocks. role: 'attn' or 'mlp'. call: of the model, from 0. timestep: of
    the schedule; None in a classifier. pairs: how many.
    """

    block: str
    depth: int
    role: str
    call: int
    timestep: float | None
    value: float
    pairs: int


@contextmanager
def probing(
    unet: nn.Module, blocks: Sequence[BlockInfo], fusion: TokenFusionConfig | None = None, pairs: int = PAIRS
) -> Iterator[list[Linearity]]:
    """Inside, every call of the UNet measures the attention and feed-forward of its transformer blocks.

    unet: ValueError for one with a patch. sites: its blocks. fusion: how tokens are matched. pairs: of
    each sample, spread evenly over those that would be fused. Attention is taken as a function of a query, among the
    keys and values of the whole map: what a token's own key adds to that is one of hundreds. Half precision is too
    coarse for ways between like tokens, so layers are run in float32 for it.
    """
    fusion = fusion or TokenFusionConfig()
    found: list[Linearity] = []
    if patch_of(unet) is not None:
        raise ValueError(f"{type(unet).__name__} is patched: linearity is the model's own, remove_patch comes first")
    begin = _Begin()
    handles = [unet.register_forward_pre_hook(begin, with_kwargs=True)]
    for block in blocks:
        probe = _Probe(block, fusion, pairs, begin, found)
        handles.append(block.spatial_module.register_forward_pre_hook(probe.see_size, with_kwargs=True))
        handles.append(block.layers["norm"].register_forward_pre_hook(probe.match))
        handles += [
            block.layers[role].register_forward_pre_hook(probe.measurer(role), with_kwargs=True)
            for role in ROLES
            if role in block.layers
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Begin:
    """Pre-hook of the model: which call it is, and of which timestep."""

    def __init__(self) -> None:
        self.call = -1
        self.timestep = float("nan")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call += 1
        timestep = get_argument(args, kwargs, 1, "timestep", "timesteps")
        self.timestep = float(torch.as_tensor(timestep).flatten()[0])


class _Probe:
    """The pairs of one block in one call, and the FL of its layers between them."""

    def __init__(self, block: BlockInfo, fusion: TokenFusionConfig, pairs: int, begin: _Begin, found: list[Linearity]):
        self.block, self.fusion, self.pairs, self.begin, self.found = block, fusion, pairs, begin, found
        self.size = (0, 0)
        self.ends: tuple[Tensor, Tensor] | None = None
        self.busy = False

    def see_size(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h, w = get_argument(args, kwargs, 0, "hidden_states", "x").shape[-2:]
        self.size = int(h), int(w)

    @torch.no_grad()
    def match(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        (h, w), leaving = self.size, self.fusion.num_merged(*self.size)
        self.ends = None
        if leaving:
            parts = partition(h, w, self.fusion.sx, self.fusion.sy, args[0].device)
            map = bipartite_soft_matching(args[0], parts, leaving)
            home = map.kept_idx.gather(1, map.group_idx)  # of each token, the token that stands for it
            gone = home != torch.arange(h * w, device=home.device)
            token = gone.nonzero()[:, 1].view(len(home), leaving)
            some = torch.linspace(0, leaving - 1, min(self.pairs, leaving), device=home.device).long()
            token = token[:, some]
            self.ends = token, home.gather(1, token)

    def measurer(self, role: str) -> Callable[..., None]:
        @torch.no_grad()
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = get_argument(args, kwargs, 0, "hidden_states", "x")
            if self.ends is None or self.busy or x.ndim != 3:
                return
            x = x.float()
            x1, x2 = (x.gather(1, token.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for token in self.ends)
            weights = {name: weight.float() for name, weight in module.named_parameters()}

            def layer(ways: Tensor) -> Tensor:
                tokens = ways.flatten(1, 2)  # [B, pairs * points, C]
                told = {"encoder_hidden_states": x} if role == "attn" else {}
                out: Tensor = functional_call(module, weights, (tokens,), told)
                return out.view(*ways.shape[:3], -1)

            self.busy = True  # the layer's hooks are called again
            try:
                value = functional_linearity(layer, x1, x2)
            finally:
                self.busy = False
            self.found.append(
                Linearity(self.block.name, self.block.depth, role, self.begin.call, self.begin.timestep,
                          value.mean().item(), value.numel())
            )  # fmt: skip

        return measure


def by_depth(found: Sequence[Linearity], roles: Sequence[str]) -> dict[int, float]:
    """The mean FL of each block's layers, over all calls."""
    depths = sorted({one.depth for one in found})
    values = {depth: [one.value for one in found if one.depth == depth and one.role in roles] for depth in depths}
    return {depth: mean(value) for depth, value in values.items() if value}


def best_split(linearity: Mapping[int, float]) -> int:
    """d: the depth from which on blocks average, by the FL of each block that is fused, given by its depth.

    Of a pair whose outputs lie D apart, pruning makes one wrong by D. The average comes out wrong by half its way to
    each, if it lies half-way, and ways are D / FL long: squared and summed, D² against D² / (2 FL²). So averaging is
    the better one above an FL of 1/√2, and d the depth that makes the sum over all blocks least, the lowest if many do.
    """
    depths = sorted(linearity)

    def error(d: int) -> float:
        return sum(1.0 if depth < d else 0.5 / max(linearity[depth], 1e-6) ** 2 for depth in depths)

    return min([0, *(depth + 1 for depth in depths)], key=error)
