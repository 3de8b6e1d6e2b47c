# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The map of the most similar sources, and the tokens of each of its groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference


def build_map(
    best: Tensor, target: Tensor, src: Tensor, dst: Tensor, r: int, at: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Computes `reference.build_map` and its Groups in one launch: each program makes passes over one sample's tokens.

    Returns:
        (kept_idx, group_idx, order, start, log_size).
    """
    if not hasattr(tl, "histogram"):  # before Triton 3
        return reference.build_map(best, target, src, dst, r, at)
    (B, M), S, D = best.shape, len(src), len(dst)
    kept_idx = torch.empty(B, S + D - r, dtype=torch.long, device=best.device)
    group_idx = torch.empty(B, S + D, dtype=torch.long, device=best.device)
    order, start, place = (
        torch.empty(B, size, dtype=torch.int32, device=best.device) for size in (S + D, S + D - r + 1, S + D - r)
    )
    log_size = torch.empty(B, S + D - r, dtype=torch.float32, device=best.device)
    block = min(4096, max(128, triton.next_power_of_2(S + D)))
    _build_map[(B,)](
        best.contiguous(), target.contiguous(), src.contiguous(), dst.contiguous(),
        src if at is None else at.contiguous(), kept_idx, group_idx, order, start, place, log_size, r, M, S, D,
        LISTED=at is not None, BLOCK=block, num_warps=min(16, block // 32),
    )  # fmt: skip
    return kept_idx, group_idx, order, start, log_size


@triton.jit
def _place(at_ptr, j, S, LISTED: tl.constexpr):
    """Where sources j are among the cosines."""
    return tl.load(at_ptr + j, mask=j < S, other=0) if LISTED else j


@triton.jit
def _sortable(best_ptr, at_ptr, j, S, LISTED: tl.constexpr):
    """Maps cosines to numbers of [0, 2³²) in the same order, without negative zero; 0 after the end."""
    best = tl.load(best_ptr + _place(at_ptr, j, S, LISTED), mask=j < S, other=0.0)
    bits = tl.where(best == 0.0, 0.0, best).to(tl.uint32, bitcast=True)
    number = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(j < S, number.to(tl.int64), 0)


@triton.jit
def _rth_largest(best_ptr, at_ptr, r, S, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the r-th largest of S cosines as a sortable number, and its rank among those equal to it.

    By radix selection of eight bits at a time.
    """
    prefix = tl.full([], 0, tl.int64)
    room = r  # rank among the numbers with the same leading bits
    bins = tl.arange(0, 512)
    for digit in tl.static_range(4):
        count = tl.zeros([512], tl.int32)
        for start in range(0, S, BLOCK):
            j = start + tl.arange(0, BLOCK)
            number = _sortable(best_ptr, at_ptr, j, S, LISTED)
            same_prefix = (j < S) & ((number >> (32 - 8 * digit)) == prefix)
            count += tl.histogram(tl.where(same_prefix, (number >> (24 - 8 * digit)) & 255, 511).to(tl.int32), 512)
        count = tl.where(bins < 256, count, 0)
        above = tl.sum(count, axis=0) - tl.cumsum(count, axis=0)  # [512] that exceed each bin
        at = tl.max(tl.where((above + count >= room) & (bins < 256), bins, 0), axis=0)
        room -= tl.sum(tl.where(bins == at, above, 0), axis=0)
        prefix = prefix * 256 + at
    return prefix, room


@triton.jit
def _among_largest(best_ptr, at_ptr, j, S, prefix, room, level, LISTED: tl.constexpr):
    """Marks which of the cosines j are among the r largest, given what `_rth_largest` returns.

    level: how many before these equal the r-th largest. Returned with the mark, for the next.
    """
    number = _sortable(best_ptr, at_ptr, j, S, LISTED)
    equal = ((number == prefix) & (j < S)).to(tl.int32)
    largest = (number > prefix) | ((equal > 0) & (level + tl.cumsum(equal, axis=0) <= room))
    return largest, level + tl.sum(equal, axis=0)


@triton.jit
def _build_map(
    best_ptr, target_ptr, src_ptr, dst_ptr, at_ptr, kept_ptr, group_ptr, order_ptr, start_ptr, place_ptr, log_ptr,
    r, M, S, D, LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    best_ptr += sample * M
    target_ptr += sample * M
    kept_ptr += sample * (S + D - r)
    group_ptr += sample * (S + D)
    prefix, room = _rth_largest(best_ptr, at_ptr, r, S, LISTED, BLOCK)
    # 1 in group_ptr for merged tokens
    level = 0
    for start in range(0, S, BLOCK):
        j = start + tl.arange(0, BLOCK)
        leaves, level = _among_largest(best_ptr, at_ptr, j, S, prefix, room, level, LISTED)
        token = tl.load(src_ptr + j, mask=j < S, other=0)
        tl.store(group_ptr + token, leaves.to(tl.int64), mask=j < S)
    for start in range(0, D, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(group_ptr + tl.load(dst_ptr + i, mask=i < D, other=0), tl.zeros([BLOCK], tl.int64), mask=i < D)
    tl.debug_barrier()
    # index among the survivors; -1 for merged tokens
    gone = 0
    for start in range(0, S + D, BLOCK):
        n = start + tl.arange(0, BLOCK)
        leaves = tl.load(group_ptr + n, mask=n < S + D, other=0).to(tl.int32)
        place = n - gone - tl.cumsum(leaves, axis=0)
        tl.store(group_ptr + n, tl.where(leaves > 0, -1, place).to(tl.int64), mask=n < S + D)
        tl.store(kept_ptr + place, n.to(tl.int64), mask=(n < S + D) & (leaves == 0) & (place < S + D - r))
        gone += tl.sum(leaves, axis=0)
    tl.debug_barrier()
    for start in range(0, S, BLOCK):
        j = start + tl.arange(0, BLOCK)
        token = tl.load(src_ptr + j, mask=j < S, other=0)
        leaves = (tl.load(group_ptr + token, mask=j < S, other=0) < 0) & (j < S)
        target = tl.load(target_ptr + _place(at_ptr, j, S, LISTED), mask=leaves, other=0)
        joined = tl.load(group_ptr + target, mask=leaves, other=0)
        tl.store(group_ptr + token, joined, mask=leaves)
    N, K = S + D, S + D - r
    _list_groups(
        group_ptr, order_ptr + sample * N, start_ptr + sample * (K + 1), place_ptr + sample * K, log_ptr + sample * K,
        N, K, BLOCK,
    )  # fmt: skip


@triton.jit
def _list_groups(group_ptr, order_ptr, start_ptr, place_ptr, log_ptr, N, K, BLOCK: tl.constexpr):
    """Writes the Groups of one sample. Tokens of a group come in any order, as they take their places at once."""
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        tl.store(place_ptr + k, tl.zeros([BLOCK], tl.int32), mask=k < K)
    tl.debug_barrier()
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        group = tl.load(group_ptr + n, mask=n < N, other=0)
        tl.atomic_add(place_ptr + group, 1, mask=n < N, sem="relaxed", scope="cta")
    tl.debug_barrier()
    before = 0
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        size = tl.load(place_ptr + k, mask=k < K, other=0)
        start = before + tl.cumsum(size, axis=0) - size
        tl.store(start_ptr + k, start, mask=k < K)
        tl.store(place_ptr + k, start, mask=k < K)
        tl.store(log_ptr + k, tl.log(tl.maximum(size, 1).to(tl.float32)), mask=k < K)
        before += tl.sum(size, axis=0)
    tl.store(start_ptr + K, before)
    tl.debug_barrier()
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        group = tl.load(group_ptr + n, mask=n < N, other=0)
        at = tl.atomic_add(place_ptr + group, 1, mask=n < N, sem="relaxed", scope="cta")
        tl.store(order_ptr + at, n, mask=n < N)
