"""Finds for every source token the most similar destination (ToMe's bipartite soft matching)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import build_map, nearest_dst
from ..utils import did_you_mean, same_source
from .partition import Partition, PartitionTensors, Windows
from .token_map import SoftMap, TokenMap


class Pairs(NamedTuple):
    """Each source with the destination it is most similar to: their cosine best [B, S], its position target [B, S]."""

    best: Tensor
    target: Tensor
    parts: Partition

    def merged(self, r: int) -> TokenMap:
        """Returns the map that merges the r most similar sources (at most S) into their destinations."""
        return TokenMap(*build_map(self.best, self.target, *self.parts, r))


def most_similar(metric: Tensor, parts: Partition, windows: Windows | None = None) -> Pairs:
    """The pairs of tokens metric [B, N, C], compared by cosine. Without gradient.

    windows: where to look for destinations, None for the whole map. Ties go to the earlier destination.
    """
    src, dst = parts
    with torch.no_grad():
        if windows is None:
            best, target = (
                found.flatten(1) for found in nearest_dst(metric, src.unsqueeze(0), dst.unsqueeze(0))
            )  # [B, S]
        else:
            best, target = (
                found.flatten(1)[:, windows.src_index] for found in nearest_dst(metric, windows.src, windows.dst)
            )
        return Pairs(best, target, parts)


def count_above_threshold(best: Tensor, threshold: float) -> Tensor:
    """How many of the cosines best [B, S] exceed a threshold, the mean over the batch (ATM section 3.4): []."""
    return (best > threshold).sum() / len(best)


def bipartite_soft_matching(metric: Tensor, parts: Partition, r: int, windows: Windows | None = None) -> TokenMap:
    """The r sources most similar to any destination join the destination they are most similar to.

    metric: [B, N, C], compared by cosine. r: at most S. windows: where to look for destinations, None for the whole
    map. Ties go to the earlier source, the earlier destination. Survivors stand in raster order. The map carries no
    gradient (which token goes where is not differentiable).
    """
    return most_similar(metric, parts, windows).merged(r)


def soft_assignment(z: Tensor, centroids: Tensor, temperature: float, used: Tensor | None = None) -> Tensor:
    """a_ik (AdaptiVision Eq. 2) of tokens z [..., N, D] to centroids [..., K, D]: [..., N, K], rows sum to 1.

    used [..., K]: centroids that take part; all if None. As the temperature goes to 0 each token goes to its nearest.
    """
    nearness = -torch.cdist(z, centroids).square() / temperature
    if used is not None:
        nearness = nearness.masked_fill(~used.unsqueeze(-2), -math.inf)
    return nearness.softmax(dim=-1)


def soft_merge_map(metric: Tensor, windows: Windows, temperature: float) -> SoftMap:
    """Every token of metric [B, N, C] is shared out among the centroids of its window, the nearer the more.

    The centroids are the destinations, a token of each cell: the paper learns them with its model, and here is none to
    train; a token has itself at distance 0, so that no centroid is ever empty. windows: of all tokens, destinations
    included. temperature: in the variance of a window's tokens, their mean squared distance from their average, so that
    the map does not change with the scale of the tokens. Carries gradients.
    """
    src, dst, src_index, dst_index = windows
    with torch.autocast(metric.device.type, enabled=False):
        full = metric.to(torch.promote_types(metric.dtype, torch.float32))
        real = torch.zeros(src.numel(), dtype=torch.bool, device=src.device).index_fill(0, src_index, True).view_as(src)
        used = torch.zeros(dst.numel(), dtype=torch.bool, device=dst.device).index_fill(0, dst_index, True).view_as(dst)
        share = (real / real.sum(dim=1, keepdim=True)).to(full.dtype).unsqueeze(-1)  # [T, M, 1], of an average
        z = full[:, src]  # [B, T, M, C]
        middle = (z * share).sum(dim=2, keepdim=True)
        spread = ((z - middle).square() * share).sum(dim=(2, 3), keepdim=True)  # [B, T, 1, 1]
        scale = spread.clamp_min(torch.finfo(full.dtype).tiny).rsqrt()  # equal tokens are at distance 0, not NaN
        weights = soft_assignment((z - middle) * scale, (full[:, dst] - middle) * scale, temperature, used)
        return SoftMap(weights * real.unsqueeze(-1), src, src_index, dst.flatten()[dst_index], dst_index)


Matcher = Callable[[Tensor, PartitionTensors, Any], "TokenMap | SoftMap"]
MATCHERS: dict[str, Matcher] = {}


def register_matcher(name: str) -> Callable[[Matcher], Matcher]:
    """Makes a way to match tokens available as `TokenFusionConfig(matching=name)`. A decorator.

    The matcher takes the tokens [B, N, C] of a block, the grid of its map and the configuration, and gives a TokenMap
    or a SoftMap. `len(grid.num_merged)` is how many tokens to merge. It runs in compiled blocks too, so it must not
    read a tensor's values.

    Raises:
        ValueError: the name is no identifier, or another matcher has it.
    """
    if not name.isidentifier():
        raise ValueError(f"the matcher's name is {name!r}; it must be an identifier, as folders are named after it")

    def register(matcher: Matcher) -> Matcher:
        if not same_source(MATCHERS.get(name, matcher), matcher):
            raise ValueError(f"a matcher named {name!r} is registered already: give yours another name")
        MATCHERS[name] = matcher
        return matcher

    return register


def get_matcher(name: str) -> Matcher:
    """The matcher registered as `name`. ValueError for an unknown one."""
    if name not in MATCHERS:
        hint = did_you_mean(name, MATCHERS)
        raise ValueError(f"unknown matching {name!r}{hint}; known: {', '.join(MATCHERS)}")
    return MATCHERS[name]


@register_matcher("bipartite")
def _bipartite(tokens: Tensor, grid: PartitionTensors, config: Any) -> TokenMap:
    return bipartite_soft_matching(tokens, grid.parts, len(grid.num_merged), grid.windows)


@register_matcher("soft")
def _soft(tokens: Tensor, grid: PartitionTensors, config: Any) -> SoftMap:
    assert grid.windows is not None  # the configuration requires a window
    return soft_merge_map(tokens, grid.windows, config.temperature)
