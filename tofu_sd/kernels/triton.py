# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The same as Triton kernels: nothing is stored that is read once, and each step is one launch.

`reference` defines what they compute; `can_fuse` says where they run. Sums are float32, in an order that repeats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import bags


def nearest(metric: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.nearest` without scores in memory: each program keeps the best destination of its sources so far."""
    (B, N, C), (T, S), D = metric.shape, src.shape, dst.shape[1]
    metric, src, dst = metric.contiguous(), src.contiguous(), dst.contiguous()
    best = torch.empty(B, T, S, dtype=torch.float32, device=metric.device)
    target = torch.empty(B, T, S, dtype=torch.long, device=metric.device)
    wide = metric.dtype == torch.float32  # whose products run on fewer units, and whose tiles are twice as large
    rows, cols = (32, 64) if wide else (64, 128)
    _nearest[(B * T, triton.cdiv(S, rows))](
        metric, src, dst, best, target, N, C, T, S, D,
        ROWS=rows, COLS=min(cols, max(16, triton.next_power_of_2(D))), CHANNELS=32 if wide else 64, num_warps=4,
    )  # fmt: skip
    return best, target


@triton.jit
def _nearest(
    x_ptr, src_ptr, dst_ptr, best_ptr, target_ptr, N, C, T, S, D,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, window = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T
    x_ptr += sample * N * C
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    src = tl.load(src_ptr + window * S + row, mask=row < S, other=0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    target = tl.zeros([ROWS], tl.int64) + tl.load(dst_ptr + window * D)
    length = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, COLS):
        col = start + tl.arange(0, COLS)
        dst = tl.load(dst_ptr + window * D + col, mask=col < D, other=0)
        scores = tl.zeros([ROWS, COLS], tl.float32)
        toward = tl.zeros([COLS], tl.float32)
        length = tl.zeros([ROWS], tl.float32)
        for first in range(0, C, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            a = tl.load(x_ptr + src[:, None] * C + c[None, :], mask=c[None, :] < C, other=0.0)
            b = tl.load(x_ptr + dst[:, None] * C + c[None, :], mask=c[None, :] < C, other=0.0)
            scores += tl.dot(a, tl.trans(b), input_precision="ieee")
            length += tl.sum(a.to(tl.float32) * a.to(tl.float32), axis=1)
            toward += tl.sum(b.to(tl.float32) * b.to(tl.float32), axis=1)
        scores = scores / tl.maximum(tl.sqrt(toward), 1.1754944e-38)[None, :]
        scores = tl.where(
            scores == scores, scores, 0.0
        )  # what is no number, and does not equal itself, is like nothing
        scores = tl.where(col[None, :] < D, scores, float("-inf"))
        here, at = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = here > best
        found = tl.load(dst_ptr + window * D + start + at, mask=better, other=0)
        target = tl.where(better, found, target)
        best = tl.where(better, here, best)
    best = best / tl.maximum(tl.sqrt(length), 1.1754944e-38)
    finite = (length < float("inf")) & (tl.abs(best) < float("inf"))  # a NaN is not less than anything
    out = tl.program_id(0).to(tl.int64) * S + row
    tl.store(best_ptr + out, tl.where(finite, best, -1.0), mask=row < S)
    tl.store(target_ptr + out, target, mask=row < S)


def assemble(best: Tensor, target: Tensor, src: Tensor, dst: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """`reference.assemble` in one launch: a program for each sample counts through its sources."""
    (B, S), D = best.shape, len(dst)
    kept = torch.empty(B, S + D - r, dtype=torch.long, device=best.device)
    home = torch.empty(B, S + D, dtype=torch.long, device=best.device)
    least = best.topk(r, dim=1, sorted=False).values.amin(dim=1) if r else best.new_full((B,), float("inf"))
    before = torch.searchsorted(src, dst)  # how many sources come before each destination
    gone = torch.empty(B, S + 1, dtype=torch.int32, device=best.device)
    _assemble[(B,)](
        best.contiguous(), target.contiguous(), least, src.contiguous(), dst.contiguous(), before, gone, kept, home,
        r, S, D, BLOCK=1024, num_warps=8,
    )  # fmt: skip
    return kept, home


@triton.jit
def _assemble(
    best_ptr, target_ptr, least_ptr, src_ptr, dst_ptr, before_ptr, gone_ptr, kept_ptr, home_ptr, r, S, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    best_ptr += sample * S
    target_ptr += sample * S
    gone_ptr += sample * (S + 1)
    kept_ptr += sample * (S + D - r)
    home_ptr += sample * (S + D)
    least = tl.load(least_ptr + sample)
    above = 0
    for start in range(0, S, BLOCK):
        j = start + tl.arange(0, BLOCK)
        best = tl.load(best_ptr + j, mask=j < S, other=float("-inf"))
        above += tl.sum((best > least).to(tl.int32), axis=0)
    room = r - above
    # gone[j]: how many of the first j sources leave
    gone, level = 0, 0
    tl.store(gone_ptr, 0)
    for start in range(0, S, BLOCK):
        j = start + tl.arange(0, BLOCK)
        best = tl.load(best_ptr + j, mask=j < S, other=float("-inf"))
        equal = ((best == least) & (j < S)).to(tl.int32)
        leaves = ((best > least) | ((equal > 0) & (level + tl.cumsum(equal, axis=0) <= room))).to(tl.int32)
        tl.store(gone_ptr + j + 1, gone + tl.cumsum(leaves, axis=0), mask=j < S)
        level += tl.sum(equal, axis=0)
        gone += tl.sum(leaves, axis=0)
    tl.debug_barrier()
    for start in range(0, D, BLOCK):
        i = start + tl.arange(0, BLOCK)
        token = tl.load(dst_ptr + i, mask=i < D, other=0)
        left = tl.load(gone_ptr + tl.load(before_ptr + i, mask=i < D, other=0), mask=i < D, other=0)
        tl.store(home_ptr + token, token - left, mask=i < D)
        tl.store(kept_ptr + token - left, token, mask=i < D)
    tl.debug_barrier()
    for start in range(0, S, BLOCK):
        j = start + tl.arange(0, BLOCK)
        token = tl.load(src_ptr + j, mask=j < S, other=0)
        left = tl.load(gone_ptr + j, mask=j < S, other=0)
        stays = tl.load(gone_ptr + j + 1, mask=j < S, other=0) == left
        joined = tl.load(home_ptr + tl.load(target_ptr + j, mask=j < S, other=0), mask=j < S, other=0)
        tl.store(home_ptr + token, tl.where(stays, token - left, joined), mask=j < S)
        tl.store(kept_ptr + token - left, token, mask=(j < S) & stays)


def merge(x: Tensor, home: Tensor, K: int, largest_norm: bool) -> Tensor:
    """`reference.merge`: each program adds up one group and, for MLERP, keeps its largest norm on the way."""
    B, _, C = x.shape
    tokens, ends = bags(home, K)
    out = torch.empty(B, K, C, dtype=x.dtype, device=x.device)
    _merge[(len(ends),)](
        x.contiguous(), tokens, ends, out, C, LARGEST_NORM=largest_norm, CHANNELS=triton.next_power_of_2(C), num_warps=4
    )
    return out


@triton.jit
def _merge(x_ptr, tokens_ptr, ends_ptr, out_ptr, C, LARGEST_NORM: tl.constexpr, CHANNELS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(ends_ptr + group)
    c = tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    largest = 0.0
    for i in range(start, end):
        token = tl.load(tokens_ptr + i)
        x = tl.load(x_ptr + token * C + c, mask=c < C, other=0.0).to(tl.float32)
        total += x
        largest = tl.maximum(largest, tl.sqrt(tl.sum(x * x, axis=0)))
    mean = total / (end - start).to(tl.float32)
    if LARGEST_NORM:
        own = tl.sqrt(tl.sum(mean * mean, axis=0))
        pointing = own > 1.1754944e-38 * tl.maximum(largest, 1.0)
        mean = mean * (largest / tl.where(pointing, own, 1.0))
    tl.store(out_ptr + group * C + c, mean.to(out_ptr.dtype.element_ty), mask=c < C)


def take(x: Tensor, at: Tensor) -> Tensor:
    """`reference.take`: each program copies a few rows."""
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
