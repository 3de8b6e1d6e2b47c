"""The definition of each kernel, in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

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
    """Finds the most similar destination of each source within its window, by cosine.

    Ties go to the earlier destination. Tokens that are not finite are similar to none. The scores [B, T, S, D] are
    computed in chunks of about SCRATCH bytes.

    Args:
        metric: [B, N, C], tokens.
        src: [T, S], raster positions of the sources in T windows.
        dst: [T, D], raster positions of the destinations.
        dot: the product of [B, T, R, C] with the transpose of [B, T, D, C].

    Returns:
        (largest cosine [B, T, S], at least float32; raster position of the destination [B, T, S], long).
    """
    with torch.autocast(metric.device.type, enabled=False):
        (B, _, C), (T, S), D = metric.shape, src.shape, dst.shape[1]
        # half precision cannot separate cosines near 1; all ties would go to the top of the image
        dtype = torch.promote_types(metric.dtype, torch.float32)
        toward = _window(metric, dst, dtype)  # [B, T, D, C]
        toward = (toward / _norm(toward)).nan_to_num_(nan=0)  # a NaN destination is similar to none
        best = metric.new_empty((B, T, S), dtype=dtype)
        target = metric.new_empty((B, T, S), dtype=torch.long)
        rows = max(1, SCRATCH // (B * T * (C + D) * dtype.itemsize))
        for start in range(0, S, rows):
            chunk = slice(start, start + rows)
            x = _window(metric, src[:, chunk], dtype)
            score, nearest = dot(x, toward).max(dim=-1)  # over [B, T, rows, D]
            best[..., chunk] = score / _norm(x).squeeze(-1)
            target[..., chunk] = dst.expand(B, -1, -1).gather(-1, nearest)
        return best.nan_to_num_(nan=-1, posinf=-1, neginf=-1), target


def build_map(
    best: Tensor, target: Tensor, src: Tensor, dst: Tensor, r: int, at: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Builds the map that merges the r sources of largest `best` into their `target`.

    Args:
        best: [B, M], cosines.
        target: [B, M], raster positions of destinations.
        src: [S], raster positions of the sources, in raster order.
        dst: [D], raster positions of the destinations.
        r: number of merged tokens.
        at: [S], where `best` and `target` have each source; None where they have the S sources in order.

    Returns:
        (kept_idx [B, K], in raster order; group_idx [B, N]).
    """
    if at is not None:
        best, target = best[:, at], target[:, at]
    B, N = len(best), len(src) + len(dst)
    leaves = _largest(best, r)
    stays = leaves.new_ones(B, N).index_copy(1, src, ~leaves)
    place = stays.cumsum(dim=1) - 1  # [B, N], index among the survivors
    group_idx = place.index_copy(1, src, place[:, src].where(~leaves, place.gather(1, target)))
    raster = torch.arange(N, device=best.device).expand(B, -1)
    src_index = place.where(stays, N - r)  # all merged tokens share one slot after the survivors
    kept_idx = place.new_empty(B, N - r + 1).scatter(1, src_index, raster)[:, : N - r]
    return kept_idx.contiguous(), group_idx  # contiguous, as the operator's shapes declare


def _largest(best: Tensor, r: int) -> Tensor:
    """Marks the r largest values of each row of best [B, S], the earlier of equal ones first: bool [B, S].

    It does not sort: it takes what exceeds the r-th largest value, then the first of those equal to it.
    """
    if r == 0:
        return torch.zeros_like(best, dtype=torch.bool)
    smallest = best.topk(r, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, level = best > smallest, best == smallest
    room = r - above.sum(dim=1, keepdim=True)
    return above | (level & (level.cumsum(dim=1) <= room))


PAIRINGS = ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))
"""The three ways to pair four tokens: the first with the second, the third with the fourth."""


def pair_up(x: Tensor, fours: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs four tokens at a time, in that of the three ways that has the largest sum of cosines.

    Args:
        x: [B, N, C], tokens. One that is not finite is similar to none.
        fours: [M, 4], their positions.

    Returns:
        (cosine of each pair [B, 2 M], at least float32; positions of its tokens [B, 2 M, 2]).
    """
    unit = x[:, fours].to(torch.promote_types(x.dtype, torch.float32))
    parts = (unit / _norm(unit)).unbind(2)
    cosines = [torch.stack([(parts[i] * parts[j]).sum(-1) for i, j in ((a, b), (c, d))], -1) for a, b, c, d in PAIRINGS]
    cosine = torch.stack(cosines, dim=2).nan_to_num(nan=-1, posinf=-1, neginf=-1)  # [B, M, 3, 2]
    best = cosine.sum(dim=-1).argmax(dim=-1)  # [B, M]
    chosen = cosine.gather(2, best[..., None, None].expand(-1, -1, 1, 2))
    pairing = torch.tensor(PAIRINGS, device=fours.device)[best]
    return chosen.flatten(1), fours.expand(len(x), -1, -1).gather(2, pairing).view(len(x), -1, 2)


def map_of_groups(similarity: Tensor, members: Tensor, n: int, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Builds the map in which the first token of each of the n most similar groups stands for its group.

    Args:
        similarity: [B, U], of the groups. Of equal ones the earlier is taken.
        members: [B, U, g], positions of the tokens of each group.
        n: number of groups that are merged.
        rest: [R], positions of the tokens in no group.

    Returns:
        (kept_idx [B, K], group_idx [B, N]). Survivors: those of the n groups, the tokens of all others, the rest.
    """
    (B, U, g), R = members.shape, len(rest)
    K = U * g + R - n * (g - 1)
    merged = _largest(similarity, n)
    earlier = merged.cumsum(dim=1) - merged.long()  # [B, U], merged groups before each
    left = torch.arange(U, device=members.device) - earlier
    nth = torch.arange(g, device=members.device)
    survivor = torch.where(merged, earlier, n + g * left).unsqueeze(-1) + nth * ~merged.unsqueeze(-1)  # [B, U, g]
    last = torch.arange(K - R, K, device=members.device).expand(B, -1)
    group_idx = members.new_empty(B, U * g + R).scatter(1, members.flatten(1), survivor.flatten(1))
    group_idx.index_copy_(1, rest, last)
    survives = ~merged.unsqueeze(-1) | (nth == 0)
    slot = survivor.where(survives, K).flatten(1)  # all merged tokens share one slot after the survivors
    kept_idx = members.new_empty(B, K + 1).scatter(1, slot, members.flatten(1))
    return kept_idx.scatter(1, last, rest.expand(B, -1))[:, :K].contiguous(), group_idx


def take(x: Tensor, at: Tensor) -> Tensor:
    """Takes the tokens of x [B, N, C] at [B, M]: [B, M, C]. An embedding copies whole rows, faster than gather."""
    return F.embedding(_across(at, x.shape[1]), x.flatten(0, 1))


class Length(IntEnum):
    """The length of a group's average: its own, the largest norm in the group, or a part of the way to that."""

    OWN = 0
    LARGEST = 1
    PARTIAL = 2


class Groups(NamedTuple):
    """The tokens of each group, for kernels; torch's own operators do not need them.

    Args:
        order: [B, N] integers, the tokens group by group. Within a group they may have any order.
        start: [B, K + 1] integers, where each group starts in `order`, and the end.
        log_size: [B, K] float32, log of the number of tokens.
    """

    order: Tensor
    start: Tensor
    log_size: Tensor


def sorted_groups(group_idx: Tensor, K: int) -> Groups:
    """Returns the tokens of K groups: group_idx [B, N], group of each token."""
    order = group_idx.to(torch.int16 if K < 2**15 else torch.int32).argsort(dim=1, stable=True)  # short ones are faster
    one = torch.ones((), dtype=torch.int32, device=group_idx.device).expand_as(group_idx)
    count = one.new_zeros(len(group_idx), K + 1).scatter_add(1, group_idx + 1, one)
    return Groups(order, count.cumsum(dim=1, dtype=torch.int32), count[:, 1:].log())


def merge(
    x: Tensor, group_idx: Tensor, K: int, lengths: Sequence[Length], groups: Groups | None = None
) -> list[Tensor]:
    """Averages each group of tokens, once for each length: [B, K, C] each.

    Args:
        x: [B, N, C], tokens.
        group_idx: [B, N], group of each token, 0..K-1.
        K: number of groups.
        lengths: one or two. LARGEST rescales each average to the largest norm in its group (ToFu Eq. 10); zero stays
            zero. PARTIAL goes 1 / (n - 1)^2 of the way there in a group of n tokens.
        groups: the same groups, for kernels.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)  # the sum of a large group can overflow in half precision
    full = x.to(dtype)
    tokens, ends = bags(group_idx, K)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    if x.device.type == "mps":  # older torch has no embedding_bag there; index_add is deterministic
        total = full.new_zeros(len(x) * K, x.shape[-1]).index_add(
            0, _across(group_idx, K).flatten(), full.flatten(0, 1)
        )
        average = (total / (ends - starts).unsqueeze(-1)).view(len(x), K, -1)
    else:
        average = F.embedding_bag(tokens, full.flatten(0, 1), starts, mode="mean").view(len(x), K, -1)
    if all(length == Length.OWN for length in lengths):
        return [average.to(x.dtype) for _ in lengths]
    norm = torch.linalg.vector_norm(full, dim=-1)  # [B, N]
    largest = norm.new_zeros(len(x), K).scatter_reduce(1, group_idx, norm, "amax")  # norms are >= 0
    own = torch.linalg.vector_norm(average, dim=-1)
    pointing = own > torch.finfo(dtype).tiny * largest.clamp_min(1)  # otherwise the quotient and its gradient overflow
    scale = largest / own.where(pointing, own.new_ones(()))
    others = (ends - starts).view(len(x), K) - 1
    scales = {Length.LARGEST: scale, Length.PARTIAL: 1 + (scale - 1) / others.clamp_min(1) ** 2}
    rescaled = [average * scales[each].unsqueeze(-1) if each in scales else average for each in lengths]
    return [tokens.to(x.dtype) for tokens in rescaled]


def bags(group_idx: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Returns all tokens of the flattened x, group by group [B·N], and the end of each group [B·K].

    Sums in this order are deterministic; scatter_add on CUDA is not.
    """
    group = _across(group_idx, K).flatten()
    tokens = group.argsort(stable=True)
    return tokens, torch.searchsorted(
        group[tokens], torch.arange(len(group_idx) * K, device=group_idx.device), right=True
    )


def _across(at: Tensor, N: int) -> Tensor:
    """Converts positions [B, M] in samples of N tokens to positions in the flattened batch."""
    return at + N * torch.arange(len(at), device=at.device).unsqueeze(1)


def _window(x: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
    """Takes the tokens of x [B, N, C] at raster positions [T, M]: [B, T, M, C]."""
    return x.index_select(1, at.flatten()).view(-1, *at.shape, x.shape[-1]).to(dtype)


def _norm(x: Tensor) -> Tensor:
    """Returns the norms of tokens [..., C] as [..., 1], never zero, so that a zero token gives no NaN."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
