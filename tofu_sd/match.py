"""Who goes where: source and destination tokens on a grid, and the bipartite soft matching between them.

ToMe (ICLR 2023) section 3, ToMe-SD (CVPRW 2023) section 4, ToFu Algorithm 1, lines 4-7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tokens import TokenMap


class Partition(NamedTuple):
    """Raster positions of the source tokens [S] and of the destination tokens [D], each in raster order."""

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


def _hash(value: Tensor) -> Tensor:
    """A well-mixed 32-bit number of each integer, held in int64: two rounds of xor-shift and multiply."""
    value = value & 0xFFFFFFFF
    for _ in range(2):
        value = (((value >> 16) ^ value) * 0x45D9F3B) & 0xFFFFFFFF  # the product stays below 2**59
    return (value >> 16) ^ value


def bipartite_soft_matching(metric: Tensor, parts: Partition, r: int) -> TokenMap:
    """The r sources most similar to any destination join the destination they are most similar to.

    metric: [B, N, C], compared by cosine. r: at most S. Ties go to the earlier source, the earlier
    destination. The map carries no gradient (which token goes where is not differentiable).
    """
    src, dst = parts
    with torch.no_grad():
        B, N, _ = metric.shape
        # cosines near 1 are closer together than half precision can tell; its ties would all fall at the picture's top
        metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
        norm = torch.linalg.vector_norm(metric, dim=-1, keepdim=True)
        unit = metric / norm.clamp_min(torch.finfo(metric.dtype).tiny)  # a zero token is like nothing, not NaN
        scores = unit[:, src] @ unit[:, dst].mT  # [B, S, D] cosine
        best, partner = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        tokens = torch.cat((src[order], dst.expand(B, -1)), dim=1)  # [B, N]: r leaving, the staying, the destinations
        joined = len(src) + partner.gather(1, order[:, :r])  # [B, r] the leaving ones' places among `tokens`
        own = torch.arange(r, N, device=metric.device).expand(B, -1)  # [B, K] all others keep theirs
        home = torch.empty_like(tokens).scatter(1, tokens, torch.cat((joined, own), dim=1) - r)
    return TokenMap(tokens[:, r:], home)
