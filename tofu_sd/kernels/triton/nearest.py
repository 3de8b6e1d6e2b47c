# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The most similar destination of each source."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import as_rows

LAUNCH_BOUND = 2**13  # tokens of one image with guidance at 512 px


def nearest_dst(metric: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `reference.nearest_dst` without scores in memory: each program keeps the best destination so far.

    On an H200 the tiles below were the fastest of 48 at 4,096 and 16,384 tokens. Computing the lengths of all tokens in
    a launch of its own saved a quarter, except within windows, where few sources read each destination. Few tokens
    leave the device waiting for launches, so they have one less.
    """
    (B, N, C), (T, S), D = metric.shape, src.shape, dst.shape[1]
    metric, src, dst = as_rows(metric), src.contiguous(), dst.contiguous()
    best = torch.empty(B, T, S, dtype=torch.float32, device=metric.device)
    target = torch.empty(B, T, S, dtype=torch.long, device=metric.device)
    wide = metric.dtype == torch.float32  # float32 products have fewer units, and tiles of twice the size
    rows, cols = (32, 64) if wide else (64, 128)
    measured = cols < D and B * N > LAUNCH_BOUND
    length = torch.empty(B, N if measured else 0, dtype=torch.float32, device=metric.device)
    if measured:
        _lengths[(triton.cdiv(B * N, 4),)](
            metric, length, metric.stride(0), B, N, C, ROWS=4, CHANNELS=triton.next_power_of_2(C), num_warps=4
        )  # fmt: skip
    _nearest[(B * T, triton.cdiv(S, rows))](
        metric, length, src, dst, best, target, metric.stride(0), N, C, T, S, D, MEASURED=measured,
        ROWS=rows, COLS=min(cols, max(16, triton.next_power_of_2(D))), CHANNELS=32 if wide else 64, num_warps=4,
    )  # fmt: skip
    return best, target


@triton.jit
def _lengths(x_ptr, length_ptr, STRIDE, B, N, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    at = (row // N) * STRIDE + (row % N) * C
    x = tl.load(x_ptr + at[:, None] + c[None, :], mask=(row < B * N)[:, None] & (c < C)[None, :], other=0.0)
    x = x.to(tl.float32)
    tl.store(length_ptr + row, tl.sqrt(tl.sum(x * x, axis=1)), mask=row < B * N)


@triton.jit
def _nearest(
    x_ptr, length_ptr, src_ptr, dst_ptr, best_ptr, target_ptr, STRIDE, N, C, T, S, D,
    MEASURED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, window = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T
    x_ptr += sample * STRIDE
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
