"""Finds for every source token the most similar destination (ToMe's bipartite soft matching)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import assemble, nearest
from .partition import Partition, Windows
from .token_map import SoftMap, TokenMap


class Pairs(NamedTuple):
    """Each source with the destination it is most similar to: their cosine best [B, S], its position target [B, S]."""

    best: Tensor
    target: Tensor
    parts: Partition

    def fused(self, r: int) -> TokenMap:
        """The map by which the r most similar sources, at most S, join their destinations."""
        return TokenMap(*assemble(self.best, self.target, *self.parts, r))


def most_similar(metric: Tensor, parts: Partition, windows: Windows | None = None) -> Pairs:
    """The pairs of tokens metric [B, N, C], compared by cosine. Without gradient.

    windows: where to look for destinations, None for the whole map. Ties go to the earlier destination.
    """
    src, dst = parts
    with torch.no_grad():
        if windows is None:
            best, target = (found.flatten(1) for found in nearest(metric, src.unsqueeze(0), dst.unsqueeze(0)))  # [B, S]
        else:
            best, target = (found.flatten(1)[:, windows.slot] for found in nearest(metric, windows.src, windows.dst))
        return Pairs(best, target, parts)


def alike(best: Tensor, threshold: float) -> Tensor:
    """How many of the cosines best [B, S] exceed a threshold, the mean over the batch (ATM section 3.4): []."""
    return (best > threshold).sum() / len(best)


def bipartite_soft_matching(metric: Tensor, parts: Partition, r: int, windows: Windows | None = None) -> TokenMap:
    """The r sources most similar to any destination join the destination they are most similar to.

    metric: [B, N, C], compared by cosine. r: at most S. windows: where to look for destinations, None for the whole
    map. Ties go to the earlier source, the earlier destination. Survivors stand in raster order. The map carries no
    gradient (which token goes where is not differentiable).
    """
    return most_similar(metric, parts, windows).fused(r)


def soft_assignment(z: Tensor, centroids: Tensor, temperature: float, used: Tensor | None = None) -> Tensor:
    """a_ik (AdaptiVision Eq. 2) of tokens z [..., N, D] to centroids [..., K, D]: [..., N, K], rows sum to 1.

    used [..., K]: centroids that take part; all if None. As the temperature goes to 0 each token goes to its nearest.
    """
    nearness = -torch.cdist(z, centroids).square() / temperature
    if used is not None:
        nearness = nearness.masked_fill(~used.unsqueeze(-2), -math.inf)
    return nearness.softmax(dim=-1)


def condense(metric: Tensor, windows: Windows, temperature: float) -> SoftMap:
    """Every token of metric [B, N, C] is shared out among the centroids of its window, the nearer the more.

    The centroids are the destinations, a token of each cell: the paper learns them with its model, and here is none to
    train; a token has itself at distance 0, so that no centroid is ever empty. windows: of all tokens, destinations
    included. temperature: in the variance of a window's tokens, their mean squared distance from their average, so that
    the map does not change with the scale of the tokens. Carries gradients.
    """
    src, dst, slot, seat = windows
    with torch.autocast(metric.device.type, enabled=False):
        full = metric.to(torch.promote_types(metric.dtype, torch.float32))
        real = torch.zeros(src.numel(), dtype=torch.bool, device=src.device).index_fill(0, slot, True).view_as(src)
        used = torch.zeros(dst.numel(), dtype=torch.bool, device=dst.device).index_fill(0, seat, True).view_as(dst)
        share = (real / real.sum(dim=1, keepdim=True)).to(full.dtype).unsqueeze(-1)  # [T, M, 1], of an average
        z = full[:, src]  # [B, T, M, C]
        middle = (z * share).sum(dim=2, keepdim=True)
        spread = ((z - middle).square() * share).sum(dim=(2, 3), keepdim=True)  # [B, T, 1, 1]
        scale = spread.clamp_min(torch.finfo(full.dtype).tiny).rsqrt()  # equal tokens are at distance 0, not NaN
        weights = soft_assignment((z - middle) * scale, (full[:, dst] - middle) * scale, temperature, used)
        return SoftMap(weights * real.unsqueeze(-1), src, slot, dst.flatten()[seat], seat)
