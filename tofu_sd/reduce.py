"""Ways to fuse: x [B, N, C] and a TokenMap give [B, K, C]. ToFu (WACV 2024), Eq. 5-10 and Algorithm 1.

Each reduction keeps dtype and device, carries gradients, and draws the same bits every time it is run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .tokens import TokenMap

Reduction = Callable[[Tensor, TokenMap], Tensor]


def _rows(index: Tensor, x: Tensor) -> Tensor:
    """An index [B, M] spread over the channels of x [B, N, C], as gather wants it."""
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])


def prune(x: Tensor, map: TokenMap) -> Tensor:
    """The survivors as they are (Alg. 1, line 9): [B, K, C]."""
    return x.gather(1, _rows(map.kept, x))


def unmerge(y: Tensor, map: TokenMap) -> Tensor:
    """Every token takes what its survivor has: y [B, K, C] -> [B, N, C].

    prune(unmerge(y, map), map) == y, bit for bit.
    """
    return y.gather(1, _rows(map.home, y))


def mean(x: Tensor, map: TokenMap) -> Tensor:
    """The average of each group, its survivor included (Eq. 6 and 9): [B, K, C]."""
    return _group_mean(x, map).to(x.dtype)


def mlerp(x: Tensor, map: TokenMap) -> Tensor:
    """The direction of each group's mean at the largest norm in the group, survivor included (Eq. 10): [B, K, C].

    A group whose mean is zero has no direction and stays zero.
    """
    average = _group_mean(x, map)
    norm = torch.linalg.vector_norm(x.to(average.dtype), dim=-1)  # [B, N]
    largest = norm.new_zeros(map.kept.shape).scatter_reduce(1, map.home, norm, "amax")  # [B, K], norms are >= 0
    own = torch.linalg.vector_norm(average, dim=-1)
    pointing = own > torch.finfo(own.dtype).tiny * largest.clamp_min(1)  # else the quotient and its gradient overflow
    scale = largest / own.where(pointing, own.new_ones(()))
    return (average * scale.unsqueeze(-1)).to(x.dtype)


def _group_mean(x: Tensor, map: TokenMap) -> Tensor:
    """Group averages in float32 at least: a group can be a whole sky, whose sum half precision would not hold."""
    (B, K), C = map.kept.shape, x.shape[-1]
    row = (map.home + K * torch.arange(B, device=x.device).unsqueeze(1)).flatten()
    x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
    total = x.new_zeros(B * K, C)
    # CUDA's scatter_add and index_add order their additions by chance; index_put sorts first, so its sums repeat
    # (not in code that inductor generates, which adds atomically unless torch is told to be deterministic)
    total = total.index_put((row,), x, accumulate=True) if x.device.type == "cuda" else total.index_add(0, row, x)
    return total.view(B, K, C) / map.size.unsqueeze(-1)


REDUCTIONS: dict[str, Reduction] = {"prune": prune, "mean": mean, "mlerp": mlerp}
