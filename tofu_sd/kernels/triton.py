# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of the expensive steps, with one or two launches each.

`reference` defines what they compute; `can_run` says where they run. Sums are float32 and deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference


def nearest_dst(metric: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `reference.nearest_dst` without scores in memory: each program keeps the best destination so far.

    On an H200 the tiles below were the fastest of 48 at 4,096 and 16,384 tokens. Computing the lengths of all tokens in
    a launch of its own saved a quarter, except within windows, where few sources read each destination.
    """
    (B, N, C), (T, S), D = metric.shape, src.shape, dst.shape[1]
    metric, src, dst = metric.contiguous(), src.contiguous(), dst.contiguous()
    best = torch.empty(B, T, S, dtype=torch.float32, device=metric.device)
    target = torch.empty(B, T, S, dtype=torch.long, device=metric.device)
    wide = metric.dtype == torch.float32  # float32 products have fewer units, and tiles of twice the size
    rows, cols = (32, 64) if wide else (64, 128)
    measured = cols < D
    length = torch.empty(B, N if measured else 0, dtype=torch.float32, device=metric.device)
    if measured:
        _lengths[(triton.cdiv(B * N, 4),)](
            metric, length, B * N, C, ROWS=4, CHANNELS=triton.next_power_of_2(C), num_warps=4
        )  # fmt: skip
    _nearest[(B * T, triton.cdiv(S, rows))](
        metric, length, src, dst, best, target, N, C, T, S, D, MEASURED=measured,
        ROWS=rows, COLS=min(cols, max(16, triton.next_power_of_2(D))), CHANNELS=32 if wide else 64, num_warps=4,
    )  # fmt: skip
    return best, target


@triton.jit
def _lengths(x_ptr, length_ptr, M, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    x = tl.load(x_ptr + row[:, None] * C + c[None, :], mask=(row < M)[:, None] & (c < C)[None, :], other=0.0)
    x = x.to(tl.float32)
    tl.store(length_ptr + row, tl.sqrt(tl.sum(x * x, axis=1)), mask=row < M)


@triton.jit
def _nearest(
    x_ptr, length_ptr, src_ptr, dst_ptr, best_ptr, target_ptr, N, C, T, S, D, MEASURED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, window = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T
    x_ptr += sample * N * C
    length_ptr += sample * N
    dst_ptr += window * D
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    src = tl.load(src_ptr + window * S + row, mask=row < S, other=0)
    best = tl.full([ROWS, COLS], float("-inf"), tl.float32)
    order = tl.zeros([ROWS, COLS], tl.int32)  # index of the destination; the earlier one wins
    length = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, COLS):
        col = start + tl.arange(0, COLS)
        dst = tl.load(dst_ptr + col, mask=col < D, other=0)
        scores = tl.zeros([ROWS, COLS], tl.float32)
        toward = tl.zeros([COLS], tl.float32)
        length = tl.zeros([ROWS], tl.float32)
        for first in range(0, C, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            a = tl.load(x_ptr + src[:, None] * C + c[None, :], mask=c[None, :] < C, other=0.0)
            b = tl.load(x_ptr + dst[:, None] * C + c[None, :], mask=c[None, :] < C, other=0.0)
            scores += tl.dot(a, tl.trans(b), input_precision="ieee")
            if not MEASURED:
                length += tl.sum(a.to(tl.float32) * a.to(tl.float32), axis=1)
                toward += tl.sum(b.to(tl.float32) * b.to(tl.float32), axis=1)
        toward = tl.load(length_ptr + dst, mask=col < D, other=1.0) if MEASURED else tl.sqrt(toward)
        scores = scores / tl.maximum(toward, 1.1754944e-38)[None, :]
        scores = tl.where(scores == scores, scores, 0.0)  # NaN, which does not equal itself, is similar to none
        scores = tl.where(col[None, :] < D, scores, float("-inf"))
        better = scores > best
        best = tl.where(better, scores, best)
        order = tl.where(better, col[None, :], order)
    highest = tl.max(best, axis=1)
    first = tl.min(tl.where(best == highest[:, None], order, D - 1), axis=1)
    target = tl.load(dst_ptr + first)
    length = tl.load(length_ptr + src) if MEASURED else tl.sqrt(length)
    highest = highest / tl.maximum(length, 1.1754944e-38)
    finite = (length < float("inf")) & (tl.abs(highest) < float("inf"))  # a NaN is not less than anything
    out = tl.program_id(0).to(tl.int64) * S + row
    tl.store(best_ptr + out, tl.where(finite, highest, -1.0), mask=row < S)
    tl.store(target_ptr + out, target, mask=row < S)


def build_map(best: Tensor, target: Tensor, src: Tensor, dst: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Computes `reference.build_map` in one launch: a program for each sample, in a few passes over its sources."""
    if not hasattr(tl, "histogram"):  # before Triton 3
        return reference.build_map(best, target, src, dst, r)
    (B, S), D = best.shape, len(dst)
    kept_idx = torch.empty(B, S + D - r, dtype=torch.long, device=best.device)
    group_idx = torch.empty(B, S + D, dtype=torch.long, device=best.device)
    block = min(4096, max(128, triton.next_power_of_2(S + D)))
    _build_map[(B,)](
        best.contiguous(), target.contiguous(), src.contiguous(), dst.contiguous(), kept_idx, group_idx, r, S, D,
        BLOCK=block, num_warps=min(16, block // 32),
    )  # fmt: skip
    return kept_idx, group_idx


@triton.jit
def _sortable(best_ptr, j, S):
    """Maps cosines to numbers of [0, 2³²) in the same order, without negative zero; 0 after the end."""
    best = tl.load(best_ptr + j, mask=j < S, other=0.0)
    bits = tl.where(best == 0.0, 0.0, best).to(tl.uint32, bitcast=True)
    number = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(j < S, number.to(tl.int64), 0)


@triton.jit
def _build_map(best_ptr, target_ptr, src_ptr, dst_ptr, kept_ptr, group_ptr, r, S, D, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    best_ptr += sample * S
    target_ptr += sample * S
    kept_ptr += sample * (S + D - r)
    group_ptr += sample * (S + D)
    # the r-th largest cosine, by radix selection of eight bits at a time
    prefix = tl.full([], 0, tl.int64)
    room = r  # rank among the numbers with the same leading bits
    bins = tl.arange(0, 512)
    for digit in tl.static_range(4):
        count = tl.zeros([512], tl.int32)
        for start in range(0, S, BLOCK):
            j = start + tl.arange(0, BLOCK)
            number = _sortable(best_ptr, j, S)
            same_prefix = (j < S) & ((number >> (32 - 8 * digit)) == prefix)
            count += tl.histogram(tl.where(same_prefix, (number >> (24 - 8 * digit)) & 255, 511).to(tl.int32), 512)
        count = tl.where(bins < 256, count, 0)
        above = tl.sum(count, axis=0) - tl.cumsum(count, axis=0)  # [512] that exceed each bin
        at = tl.max(tl.where((above + count >= room) & (bins < 256), bins, 0), axis=0)
        room -= tl.sum(tl.where(bins == at, above, 0), axis=0)
        prefix = prefix * 256 + at
    # 1 in group_ptr for merged tokens
    level = 0
    for start in range(0, S, BLOCK):
        j = start + tl.arange(0, BLOCK)
        number = _sortable(best_ptr, j, S)
        equal = ((number == prefix) & (j < S)).to(tl.int32)
        leaves = (number > prefix) | ((equal > 0) & (level + tl.cumsum(equal, axis=0) <= room))
        level += tl.sum(equal, axis=0)
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
        joined = tl.load(group_ptr + tl.load(target_ptr + j, mask=leaves, other=0), mask=leaves, other=0)
        tl.store(group_ptr + token, joined, mask=leaves)


def merge(x: Tensor, group_idx: Tensor, K: int, length: reference.Length) -> Tensor:
    """Computes `reference.merge`: each program sums one group and, unless the length is its own, its largest norm."""
    B, N, C = x.shape
    # short integers are sorted in fewer passes; a stable sort keeps sums deterministic
    group, token = group_idx.to(torch.int16 if K < 2**15 else torch.int32).sort(dim=1, stable=True)
    out = torch.empty(B, K, C, dtype=x.dtype, device=x.device)
    channels = triton.next_power_of_2(C)
    _merge[(K, B)](
        x.contiguous(), group, token, out, N, K, C,
        LENGTH=int(length), CHANNELS=channels, ROWS=4,
        STRIDE=triton.next_power_of_2(triton.cdiv(N, 256)), num_warps=max(1, min(8, channels // 512)),
    )  # fmt: skip
    return out


@triton.jit
def _merge(
    x_ptr, group_ptr, token_ptr, out_ptr, N, K, C,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    k, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x_ptr += sample * N * C
    group_ptr += sample * N
    token_ptr += sample * N
    # start of the group: among every STRIDE-th of the sorted tokens, then among those between
    far = tl.arange(0, 256) * STRIDE
    before = tl.sum((tl.load(group_ptr + far, mask=far < N, other=K) < k).to(tl.int32), axis=0)
    near = tl.maximum(before - 1, 0) * STRIDE + tl.arange(0, STRIDE)
    at = tl.maximum(before - 1, 0) * STRIDE + tl.sum(
        (tl.load(group_ptr + near, mask=near < N, other=K) < k).to(tl.int32), axis=0
    )
    c = tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    largest, members, more = 0.0, 0, 1
    while more > 0:
        i = at + members + tl.arange(0, ROWS)
        mine = (tl.load(group_ptr + i, mask=i < N, other=K) == k) & (i < N)
        token = tl.load(token_ptr + i, mask=mine, other=0)
        x = tl.load(x_ptr + token[:, None] * C + c[None, :], mask=mine[:, None] & (c < C)[None, :], other=0.0)
        x = x.to(tl.float32)
        total += tl.sum(x, axis=0)
        if LENGTH > 0:
            largest = tl.maximum(largest, tl.max(tl.sqrt(tl.sum(x * x, axis=1)), axis=0))
        count = tl.sum(mine.to(tl.int32), axis=0)
        members += count
        more = tl.where(count == ROWS, 1, 0)
    mean = total / members.to(tl.float32)  # type: ignore[attr-defined]
    if LENGTH > 0:
        own = tl.sqrt(tl.sum(mean * mean, axis=0))
        pointing = own > 1.1754944e-38 * tl.maximum(largest, 1.0)
        scale = largest / tl.where(pointing, own, 1.0)
        if LENGTH == 2:  # reference.Length.PARTIAL
            scale = 1.0 + (scale - 1.0) / tl.maximum(members - 1, 1).to(tl.float32)
        mean = mean * scale
    tl.store(out_ptr + (sample * K + k) * C + c, mean.to(out_ptr.dtype.element_ty), mask=c < C)


def take(x: Tensor, at: Tensor) -> Tensor:
    """Computes `reference.take`: each program copies a few rows."""
    (B, N, C), M = x.shape, at.shape[1]
    out = torch.empty(B, M, C, dtype=x.dtype, device=x.device)
    rows = 4
    _take[(triton.cdiv(M, rows), B)](
        x.contiguous(), at.contiguous(), out, N, M, C, ROWS=rows, CHANNELS=triton.next_power_of_2(C), num_warps=4
    )
    return out


@triton.jit
def _take(x_ptr, at_ptr, out_ptr, N, M, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    inside = (m < M)[:, None] & (c < C)[None, :]
    at = tl.load(at_ptr + sample * M + m, mask=m < M, other=0)
    x = tl.load(x_ptr + (sample * N + at)[:, None] * C + c[None, :], mask=inside)
    tl.store(out_ptr + (sample * M + m)[:, None] * C + c[None, :], x, mask=inside)
