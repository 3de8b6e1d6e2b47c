"""What the operators compute, in torch: the definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SCRATCH = 2**24
"""Bytes of scores held at a time."""


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.mT


def nearest_dst(
    metric: Tensor, src: Tensor, dst: Tensor, dot: Callable[[Tensor, Tensor], Tensor] = _matmul
) -> tuple[Tensor, Tensor]:
    """For each source its largest cosine to a destination of its window, and that destination's raster position.

    metric: [B, N, C]. src: [T, S] and dst: [T, D], raster positions in T windows. Returns [B, T, S] in float32 at
    least, and [B, T, S] long. Ties go to the earlier destination. Numbers that are not finite count as unlike all.
    dot: the product of [B, T, R, C] with the transpose of [B, T, D, C].

    The scores [B, T, S, D] are never whole: beside its results this takes the destinations' directions [B, T, D, C]
    and about SCRATCH bytes.
    """
    with torch.autocast(metric.device.type, enabled=False):
        (B, _, C), (T, S), D = metric.shape, src.shape, dst.shape[1]
        # cosines near 1 are closer together than half precision can tell; its ties would all fall at the picture's top
        dtype = torch.promote_types(metric.dtype, torch.float32)
        toward = _window(metric, dst, dtype)  # [B, T, D, C]
        toward = (toward / _norm(toward)).nan_to_num_(nan=0)  # a destination that is no number is like nothing
        best = metric.new_empty((B, T, S), dtype=dtype)
        target = metric.new_empty((B, T, S), dtype=torch.long)
        rows = max(1, SCRATCH // (B * T * (C + D) * dtype.itemsize))
        for start in range(0, S, rows):
            chunk = slice(start, start + rows)
            x = _window(metric, src[:, chunk], dtype)
            score, nearest_dst = dot(x, toward).max(dim=-1)  # over [B, T, rows, D]
            best[..., chunk] = score / _norm(x).squeeze(-1)
            target[..., chunk] = dst.expand(B, -1, -1).gather(-1, nearest_dst)
        return best.nan_to_num_(nan=-1, posinf=-1, neginf=-1), target


def build_map(best: Tensor, target: Tensor, src: Tensor, dst: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The map (kept [B, K], home [B, N]) by which the r sources of largest `best` [B, S] join their `target` [B, S].

    src [S], in raster order, and dst [D] are raster positions, and target is among dst. Survivors are in raster order.
    """
    B, N = len(best), len(src) + len(dst)
    leaves = _largest(best, r)
    stays = leaves.new_ones(B, N).index_copy(1, src, ~leaves)
    place = stays.cumsum(dim=1) - 1  # [B, N] among the survivors, of every token that stays
    group_idx = place.index_copy(1, src, place[:, src].where(~leaves, place.gather(1, target)))
    raster = torch.arange(N, device=best.device).expand(B, -1)
    src_index = place.where(stays, N - r)  # all that leave fall into one slot behind the survivors
    kept_idx = place.new_empty(B, N - r + 1).scatter(1, src_index, raster)[:, : N - r]
    return kept_idx.contiguous(), group_idx  # as a compiler is told that it lies


def _largest(best: Tensor, r: int) -> Tensor:
    """Where the r largest values of each row of best [B, S] stand, the earlier of equal ones first: bool [B, S].

    Without sorting: what exceeds the r-th largest value, and as many of those equal to it as there is room for.
    """
    if r == 0:
        return torch.zeros_like(best, dtype=torch.bool)
    least = best.topk(r, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, level = best > least, best == least
    room = r - above.sum(dim=1, keepdim=True)
    return above | (level & (level.cumsum(dim=1) <= room))


def take(x: Tensor, at: Tensor) -> Tensor:
    """The tokens of x [B, N, C] at [B, M]: [B, M, C]. An embedding copies whole rows, where gather picks numbers."""
    return F.embedding(_across(at, x.shape[1]), x.flatten(0, 1))


def merge(x: Tensor, group_idx: Tensor, K: int, largest_norm: bool) -> Tensor:
    """The average of each group of x [B, N, C] under home [B, N] -> 0..K-1: [B, K, C].

    largest_norm: brought to the largest norm in its group (ToFu Eq. 10); an average of zero has no direction and stays.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)  # a group can be a whole sky, whose sum half would not hold
    full = x.to(dtype)
    tokens, ends = bags(group_idx, K)
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    if x.device.type == "mps":  # which lacks bags in older torch, and adds in an order that repeats
        total = full.new_zeros(len(x) * K, x.shape[-1]).index_add(
            0, _across(group_idx, K).flatten(), full.flatten(0, 1)
        )
        average = (total / (ends - begins).unsqueeze(-1)).view(len(x), K, -1)
    else:
        average = F.embedding_bag(tokens, full.flatten(0, 1), begins, mode="mean").view(len(x), K, -1)
    if not largest_norm:
        return average.to(x.dtype)
    norm = torch.linalg.vector_norm(full, dim=-1)  # [B, N]
    largest = norm.new_zeros(len(x), K).scatter_reduce(1, group_idx, norm, "amax")  # norms are >= 0
    own = torch.linalg.vector_norm(average, dim=-1)
    pointing = own > torch.finfo(dtype).tiny * largest.clamp_min(1)  # else the quotient and its gradient overflow
    scale = largest / own.where(pointing, own.new_ones(()))
    return (average * scale.unsqueeze(-1)).to(x.dtype)


def bags(group_idx: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """All tokens group by group, as rows of x [B, N, C] laid end to end [B·N], and where each group ends [B·K].

    Added up in this order, a group's sum repeats; scatter_add on CUDA adds in any.
    """
    group = _across(group_idx, K).flatten()
    tokens = group.argsort(stable=True)
    return tokens, torch.searchsorted(
        group[tokens], torch.arange(len(group_idx) * K, device=group_idx.device), right=True
    )


def _across(at: Tensor, N: int) -> Tensor:
    """Positions [B, M] in samples of N tokens as positions in all samples laid end to end."""
    return at + N * torch.arange(len(at), device=at.device).unsqueeze(1)


def _window(x: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
    """The tokens of x [B, N, C] at raster positions [T, M]: [B, T, M, C]."""
    return x.index_select(1, at.flatten()).view(-1, *at.shape, x.shape[-1]).to(dtype)


def _norm(x: Tensor) -> Tensor:
    """Norms of tokens [..., C] as [..., 1], never zero: a zero token is like nothing, not NaN."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
