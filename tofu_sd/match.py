"""Who goes where: source and destination tokens on a grid, and the bipartite soft matching between them.

ToMe (ICLR 2023) section 3, ToMe-SD (CVPRW 2023) section 4, ToFu Algorithm 1, lines 4-7. How many are alike: ATM section
3.4. Shared out among all near centroids: AdaptiVision section 3.2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import assemble, nearest
from .tokens import SoftMap, TokenMap


class Partition(NamedTuple):
    """Raster positions of the source tokens [S], in raster order, and of the destination tokens [D], cell by cell."""

    src: Tensor
    dst: Tensor


def partition(h: int, w: int, sx: int, sy: int, device: torch.device, draw: Tensor | None = None) -> Partition:
    """One destination in every sx × sy cell of an h × w map; all other tokens are sources (Alg. 1, line 4).

    Cells are laid from the top left; rows and columns left over at the far edges hold sources alone. A side shorter
    than its cell makes one cell of what there is, so that there is always a destination.

    draw: None takes each cell's top-left token; an integer tensor (any shape, one value) draws each cell's destination
    anew from that value, by arithmetic alone, so that it costs no synchronisation and compiles.
    """
    rows, cols = max(1, h // sy), max(1, w // sx)
    y = (torch.arange(rows, device=device) * sy).unsqueeze(1)
    x = (torch.arange(cols, device=device) * sx).unsqueeze(0)
    if draw is not None:
        cell = torch.arange(rows * cols, device=device).view(rows, cols)
        chance = _hash(cell + 0x9E3779B9 * (draw.flatten()[0].to(device).long() & 0xFFFFFFFF))
        y = y + chance % min(sy, h)
        x = x + (chance >> 16) % min(sx, w)
    dst = (y * w + x).flatten()
    taken = torch.zeros(h * w, dtype=torch.int32, device=device).index_fill(0, dst, 1)
    return Partition(taken.argsort(stable=True)[: h * w - rows * cols], dst)


class Windows(NamedTuple):
    """The same tokens laid out by windows of the map, each with its own destinations.

    src [T, S'] and dst [T, D']: raster positions, rows filled up with their first. slot [S]: where each source of the
    partition stands in `src`, laid flat; seat [D]: where each destination stands in `dst`.
    """

    src: Tensor
    dst: Tensor
    slot: Tensor
    seat: Tensor


def windows(parts: Partition, h: int, w: int, sx: int, sy: int, side: int) -> Windows:
    """Squares of side × side cells from the top left; smaller at the far edges, whose leftover sources they take.

    The sources may be all tokens, destinations included.
    """
    rows, cols = max(1, h // sy), max(1, w // sx)
    down, across = -(-rows // side), -(-cols // side)
    n = torch.arange(h * w, device=parts.src.device)
    y, x = ((n // w) // sy).clamp_max(rows - 1) // side, ((n % w) // sx).clamp_max(cols - 1) // side
    window = y * across + x  # [N]
    # (tokens, cells) along a side of a window in the middle, where there is one, and of the last
    heights = [(side * sy, side)] * (down > 1) + [(h - (down - 1) * side * sy, rows - (down - 1) * side)]
    widths = [(side * sx, side)] * (across > 1) + [(w - (across - 1) * side * sx, cols - (across - 1) * side)]
    apart = len(parts.src) < h * w
    most = max(tall * wide - a * b * apart for tall, a in heights for wide, b in widths)
    src, slot = _by_window(parts.src, window, down * across, most)
    dst, seat = _by_window(parts.dst, window, down * across, min(side, rows) * min(side, cols))
    return Windows(src, dst, slot, seat)


def _by_window(tokens: Tensor, window: Tensor, T: int, most: int) -> tuple[Tensor, Tensor]:
    """The tokens [M] in rows [T, most] by their window, and where each of them stands there, laid flat: [M]."""
    order = window[tokens].argsort(stable=True)
    own = window[tokens][order]
    first = torch.searchsorted(own, torch.arange(T, device=tokens.device))  # [T] where each window begins
    slot = own * most + torch.arange(len(order), device=tokens.device) - first[own]
    rows = tokens.new_full((T * most,), -1).index_copy(0, slot, tokens[order]).view(T, most)
    return rows.where(rows >= 0, rows[:, :1]), torch.empty_like(slot).index_copy(0, order, slot)


def _hash(value: Tensor) -> Tensor:
    """A well-mixed 32-bit number of each integer, held in int64: two rounds of xor-shift and multiply."""
    value = value & 0xFFFFFFFF
    for _ in range(2):
        value = (((value >> 16) ^ value) * 0x45D9F3B) & 0xFFFFFFFF  # the product stays below 2**59
    return (value >> 16) ^ value


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
