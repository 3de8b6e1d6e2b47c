"""Functional linearity of layers (ToFu, Eq. 8), and the depth split that follows from it."""

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
from ..core.token_map import TokenMap
from .host import ArgumentNames, BlockInfo
from .patch import patch_of

POINTS = 11  # N of Eq. 8
PAIRS = 256  # of each sample, at most
LAYERS = ("attn", "mlp")


def functional_linearity(f: Callable[[Tensor], Tensor], x1: Tensor, x2: Tensor, points: int = POINTS) -> Tensor:
    """Functional linearity FL(f, x1, x2) of a layer between pairs of tokens (ToFu, Eq. 8).

    It is the distance from f(x1) to f(x2) divided by the length of the path that f takes along the line from x1 to x2.

    Args:
        f: takes tokens [..., points, C] to [..., points, C'], each independently.
        x1, x2: [..., C], the ends of each pair.
        points: how many points of the line are evaluated, both ends included.

    Returns:
        [...], in 0..1; 1 where f is linear between the two, or where the path has no length.
    """
    if points < 2:
        raise ValueError(f"points is {points}; a line has two ends, so it must be at least 2")
    t = torch.linspace(0, 1, points, device=x1.device, dtype=x1.dtype).unsqueeze(-1)
    # written so that equal tokens give equal points
    path = f(x1.unsqueeze(-2) + t * (x2 - x1).unsqueeze(-2)).float()
    direct = (path[..., -1, :] - path[..., 0, :]).norm(dim=-1)
    along = path.diff(dim=-2).norm(dim=-1).sum(dim=-1)
    return torch.where(along > 0, direct / along.clamp_min(torch.finfo(along.dtype).tiny), torch.ones_like(along))


@dataclass(frozen=True)
class Linearity:
    """The mean functional linearity of a layer over the matched pairs of one call of the model.

    Args:
        block, depth: name and depth of the block.
        layer: 'attn' or 'mlp'.
        call: index of the model's call, from 0.
        timestep: of the schedule; None in a classifier.
        value: the mean, in 0..1.
        pairs: how many pairs.
    """

    block: str
    depth: int
    layer: str
    call: int
    timestep: float | None
    value: float
    pairs: int


@contextmanager
def probing(
    model: nn.Module,
    blocks: Sequence[BlockInfo],
    arguments: ArgumentNames,
    config: TokenFusionConfig | None = None,
    pairs: int = PAIRS,
) -> Iterator[list[Linearity]]:
    """Measures the attention and feed-forward of each block in every call of a UNet.

    Attention is measured as a function of a query among the keys and values of the whole map. Half precision is too
    coarse for lines between similar tokens, so layers run in float32.

    Args:
        model: a UNet without a patch.
        blocks: its transformer blocks.
        arguments: where its modules take their arguments.
        config: how tokens are matched.
        pairs: of each sample at most, evenly spread over those that would be merged.

    Yields:
        A list to which each measurement is appended.

    Raises:
        ValueError: the model has a patch.
    """
    results: list[Linearity] = []
    if patch_of(model) is not None:
        raise ValueError(f"{type(model).__name__} is patched; linearity is measured without a patch: call remove_patch")
    start = _StartHook(arguments)
    handles = [model.register_forward_pre_hook(start, with_kwargs=True)]
    for block in blocks:
        probe = _Probe(block, config or TokenFusionConfig(), pairs, start, results)
        handles.append(block.spatial_module.register_forward_pre_hook(probe.store_size, with_kwargs=True))
        handles.append(block.layers["norm"].register_forward_pre_hook(probe.match))
        handles += [
            block.layers[layer].register_forward_pre_hook(probe.measuring(layer), with_kwargs=True)
            for layer in LAYERS
            if layer in block.layers
        ]
    try:
        yield results
    finally:
        for handle in handles:
            handle.remove()


class _StartHook:
    """Forward pre-hook of the model: counts calls and stores the timestep."""

    def __init__(self, arguments: ArgumentNames) -> None:
        self.arguments = arguments
        self.call = -1
        self.timestep = float("nan")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call += 1
        self.timestep = float(torch.as_tensor(self.arguments.timestep.get(args, kwargs)).flatten()[0])


class _Probe:
    """The matched pairs of one block in one call, and the functional linearity of its layers between them."""

    def __init__(
        self, block: BlockInfo, config: TokenFusionConfig, pairs: int, start: _StartHook, results: list[Linearity]
    ):
        self.block, self.config, self.pairs, self.start, self.results = block, config, pairs, start, results
        self.size = (0, 0)
        self.ends: tuple[Tensor, Tensor] | None = None
        self.busy = False

    def store_size(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h, w = self.start.arguments.tokens.get(args, kwargs).shape[-2:]
        self.size = int(h), int(w)

    @torch.no_grad()
    def match(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        (h, w), num_merged = self.size, self.config.num_merged(*self.size)
        self.ends = None
        if num_merged:
            parts = partition(h, w, self.config.sx, self.config.sy, args[0].device)
            merged, survivors = merged_pairs(bipartite_soft_matching(args[0], parts, num_merged))
            some = torch.linspace(0, num_merged - 1, min(self.pairs, num_merged), device=merged.device).long()
            self.ends = merged[:, some], survivors[:, some]

    def measuring(self, layer: str) -> Callable[..., None]:
        """Returns the forward pre-hook that measures a layer."""

        @torch.no_grad()
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = self.start.arguments
            x = arguments.tokens.get(args, kwargs)
            if self.ends is None or self.busy or x.ndim != 3:
                return
            x = x.float()
            x1, x2 = (x.gather(1, token.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for token in self.ends)
            weights = {name: weight.float() for name, weight in module.named_parameters()}
            keys = {arguments.keys: x} if layer == "attn" else {}

            def run(points: Tensor) -> Tensor:
                tokens = points.flatten(1, 2)  # [B, pairs * points, C]
                out: Tensor = functional_call(module, weights, (tokens,), keys)
                return out.view(*points.shape[:3], -1)

            self.busy = True  # the layer's hooks are called again
            try:
                values = functional_linearity(run, x1, x2)
            finally:
                self.busy = False
            self._append(layer, values)

        return measure

    def _append(self, layer: str, values: Tensor) -> None:
        call, timestep = self.start.call, self.start.timestep
        mean_value, pairs = values.mean().item(), values.numel()
        self.results.append(Linearity(self.block.name, self.block.depth, layer, call, timestep, mean_value, pairs))


def merged_pairs(map: TokenMap) -> tuple[Tensor, Tensor]:
    """Returns the positions of the tokens that a map merges, and of the survivor of each: two of [B, N - K]."""
    survivor = map.kept_idx.gather(1, map.group_idx)  # [B, N]
    moved = survivor != torch.arange(survivor.shape[1], device=survivor.device)
    merged = moved.nonzero()[:, 1].view(len(survivor), -1)
    return merged, survivor.gather(1, merged)


def by_depth(results: Sequence[Linearity], layers: Sequence[str]) -> dict[int, float]:
    """Returns the mean functional linearity of these layers over all calls, for each depth."""
    depths = sorted({one.depth for one in results})
    values = {depth: [one.value for one in results if one.depth == depth and one.layer in layers] for depth in depths}
    return {depth: mean(value) for depth, value in values.items() if value}


def best_split(linearity: Mapping[int, float]) -> int:
    """Returns the depth split d: blocks before it should prune, blocks from it on should average.

    Let D be the distance between the two outputs of a pair. Pruning makes one of them wrong by D: error D². The average
    lies half-way along a path of length D / FL, and is wrong by half of it for each: error D² / (2 FL²). So averaging
    is better above FL = 1/√2, and d minimizes the sum of the errors over all blocks. Ties go to the lowest d.

    Args:
        linearity: the functional linearity of each merged block, by its depth.
    """
    depths = sorted(linearity)

    def error(d: int) -> float:
        return sum(1.0 if depth < d else 0.5 / max(linearity[depth], 1e-6) ** 2 for depth in depths)

    return min([0, *(depth + 1 for depth in depths)], key=error)
