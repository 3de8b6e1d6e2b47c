"""Finds for every source token the most similar destination (ToMe's bipartite soft matching)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import build_map, nearest_dst
from ..utils import RegistrationError, did_you_mean, same_source
from .cells import match_in_cells
from .checked import CheckedMatcher, Matcher
from .partition import Partition, PartitionTensors, Windows
from .token_map import SoftMap, TokenMap


class Pairs(NamedTuple):
    """The most similar destination of each source.

    Args:
        best: [B, S], their cosine.
        target: [B, S] long, raster position of the destination.
        parts: sources and destinations.
    """

    best: Tensor
    target: Tensor
    parts: Partition

    def merged(self, r: int) -> TokenMap:
        """Returns the map that merges the r most similar sources (at most S) into their destinations."""
        return TokenMap(*build_map(self.best, self.target, *self.parts, r))


def most_similar(metric: Tensor, parts: Partition, windows: Windows | None = None) -> Pairs:
    """Finds the most similar destination of each source, by cosine, without gradient.

    Ties go to the earlier destination.

    Args:
        metric: [B, N, C], tokens.
        parts: sources and destinations.
        windows: compares within windows; None with the whole map.
    """
    best, target, at = _nearest(metric, parts, windows)
    return Pairs(best, target, parts) if at is None else Pairs(best[:, at], target[:, at], parts)


def _nearest(metric: Tensor, parts: Partition, windows: Windows | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the most similar destination of each source, before those of windows are put in order.

    Returns:
        (cosine [B, M], raster position of the destination [B, M], index of each source among the M; None: in order).
    """
    with torch.no_grad():
        if windows is None:
            best, target = nearest_dst(metric, parts.src.unsqueeze(0), parts.dst.unsqueeze(0))
        else:
            best, target = nearest_dst(metric, windows.src, windows.dst)
        return best.flatten(1), target.flatten(1), None if windows is None else windows.src_index


def count_above_threshold(best: Tensor, threshold: float) -> Tensor:
    """Returns how many cosines of best [B, S] exceed a threshold, the mean over the batch (ATM section 3.4): []."""
    return (best > threshold).sum() / len(best)


def bipartite_soft_matching(metric: Tensor, parts: Partition, r: int, windows: Windows | None = None) -> TokenMap:
    """Merges the r sources of highest similarity with their most similar destinations (ToMe section 3).

    Ties go to the earlier source and the earlier destination. The map has no gradient, as it is discrete.

    Args:
        metric: [B, N, C], tokens, compared by cosine.
        parts: sources and destinations.
        r: number of merged tokens, at most S.
        windows: compares within windows; None with the whole map.

    Returns:
        The map; survivors are in raster order.
    """
    best, target, at = _nearest(metric, parts, windows)
    return TokenMap(*build_map(best, target, *parts, r, at))


def soft_assignment(z: Tensor, centroids: Tensor, temperature: float, used: Tensor | None = None) -> Tensor:
    """Soft assignment a_ik of tokens to centroids (AdaptiVision Eq. 2).

    Args:
        z: [..., N, D], tokens.
        centroids: [..., K, D].
        temperature: in squared distances; as it goes to 0, each token goes to its nearest centroid.
        used: [..., K] bool, centroids that are used; None for all.

    Returns:
        [..., N, K]; rows sum to 1.
    """
    nearness = -torch.cdist(z, centroids).square() / temperature
    if used is not None:
        nearness = nearness.masked_fill(~used.unsqueeze(-2), -math.inf)
    return nearness.softmax(dim=-1)


def soft_merge_map(metric: Tensor, windows: Windows, temperature: float) -> SoftMap:
    """Assigns every token softly to the centroids of its window (AdaptiVision section 3.2). It has gradients.

    The centroids are the destinations, one token of each cell; the paper learns them with its model. A centroid's own
    token is at distance 0, so that no centroid is empty.

    Args:
        metric: [B, N, C], tokens.
        windows: of all tokens, destinations included.
        temperature: in units of the variance of a window's tokens, so that scaling the tokens does not change the map.
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
        scale = spread.clamp_min(torch.finfo(full.dtype).tiny).rsqrt()  # without NaN for equal tokens
        weights = soft_assignment((z - middle) * scale, (full[:, dst] - middle) * scale, temperature, used)
        return SoftMap(weights * real.unsqueeze(-1), src, src_index, dst.flatten()[dst_index], dst_index)


MATCHERS: dict[str, Matcher] = {}


def register_matcher(name: str) -> Callable[[Matcher], Matcher]:
    """Registers a matcher as `TokenFusionConfig(matching=name)`. A decorator.

    The matcher takes the tokens [B, N, C] of a block, the grid of its map and the configuration, and returns a TokenMap
    or a SoftMap. `len(grid.num_merged)` is the number of tokens to merge. It also runs in compiled blocks, so it must
    not read a tensor's values.

    Raises:
        RegistrationError: the name is no identifier, or another matcher has it.
    """
    if not name.isidentifier():
        raise RegistrationError(
            f"the matcher's name is {name!r}; it must be an identifier, as folders are named after it"
        )

    def register(matcher: Matcher) -> Matcher:
        if not same_source(MATCHERS.get(name, matcher), matcher):
            raise RegistrationError(f"a matcher named {name!r} is registered already: give yours another name")
        MATCHERS[name] = matcher
        return matcher

    return register


def get_matcher(name: str) -> Matcher:
    """Returns the matcher registered as `name`; what it returns is checked unless it is built in.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MATCHERS:
        hint = did_you_mean(name, MATCHERS)
        raise ValueError(f"unknown matching {name!r}{hint}; known: {', '.join(MATCHERS)}")
    matcher = MATCHERS[name]
    return matcher if name in BUILT_IN_MATCHERS else CheckedMatcher(name, matcher)


@register_matcher("bipartite")
def _bipartite(tokens: Tensor, grid: PartitionTensors, config: Any) -> TokenMap:
    return bipartite_soft_matching(tokens, grid.parts, len(grid.num_merged), grid.windows)


@register_matcher("soft")
def _soft(tokens: Tensor, grid: PartitionTensors, config: Any) -> SoftMap:
    assert grid.windows is not None  # the configuration requires a window
    return soft_merge_map(tokens, grid.windows, config.temperature)


@register_matcher("pairs")
def _pairs(tokens: Tensor, grid: PartitionTensors, config: Any) -> TokenMap:
    assert grid.cells is not None
    return match_in_cells(tokens, grid.cells, len(grid.num_merged), whole=False)


@register_matcher("cells")
def _cells(tokens: Tensor, grid: PartitionTensors, config: Any) -> TokenMap:
    assert grid.cells is not None
    return match_in_cells(tokens, grid.cells, len(grid.num_merged), whole=True)


BUILT_IN_MATCHERS = tuple(MATCHERS)
