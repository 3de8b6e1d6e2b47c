# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The best pairing of four tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import as_rows


def pair_up(x: Tensor, fours: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `reference.pair_up`: each program pairs the tokens of a few fours."""
    (B, _, C), M = x.shape, len(fours)
    cosine = torch.empty(B, 2 * M, dtype=torch.float32, device=x.device)
    pairs = torch.empty(B, 2 * M, 2, dtype=torch.long, device=x.device)
    x, rows = as_rows(x), 8
    if M:
        _pair_up[(triton.cdiv(M, rows), B)](
            x, fours.contiguous(), cosine, pairs, x.stride(0), C, M, ROWS=rows, CHANNELS=64, num_warps=4
        )
    return cosine, pairs


@triton.jit
def _pair_up(x_ptr, fours_ptr, cosine_ptr, pairs_ptr, STRIDE, C, M, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < M
    x_ptr += sample * STRIDE
    t0 = tl.load(fours_ptr + 4 * row, mask=inside, other=0)
    t1 = tl.load(fours_ptr + 4 * row + 1, mask=inside, other=0)
    t2 = tl.load(fours_ptr + 4 * row + 2, mask=inside, other=0)
    t3 = tl.load(fours_ptr + 4 * row + 3, mask=inside, other=0)
    square0, square1, square2, square3 = _zeros(ROWS), _zeros(ROWS), _zeros(ROWS), _zeros(ROWS)
    dot01, dot02, dot03 = _zeros(ROWS), _zeros(ROWS), _zeros(ROWS)
    dot12, dot13, dot23 = _zeros(ROWS), _zeros(ROWS), _zeros(ROWS)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        x0, x1 = _rows(x_ptr, t0, c, C), _rows(x_ptr, t1, c, C)
        x2, x3 = _rows(x_ptr, t2, c, C), _rows(x_ptr, t3, c, C)
        square0 += tl.sum(x0 * x0, axis=1)
        square1 += tl.sum(x1 * x1, axis=1)
        square2 += tl.sum(x2 * x2, axis=1)
        square3 += tl.sum(x3 * x3, axis=1)
        dot01 += tl.sum(x0 * x1, axis=1)
        dot02 += tl.sum(x0 * x2, axis=1)
        dot03 += tl.sum(x0 * x3, axis=1)
        dot12 += tl.sum(x1 * x2, axis=1)
        dot13 += tl.sum(x1 * x3, axis=1)
        dot23 += tl.sum(x2 * x3, axis=1)
    near, far = _cosine(dot01, square0, square1), _cosine(dot23, square2, square3)
    second, third, fourth = t1, t2, t3
    other_near, other_far = _cosine(dot02, square0, square2), _cosine(dot13, square1, square3)
    better = other_near + other_far > near + far
    second, third = tl.where(better, t2, second), tl.where(better, t1, third)
    near, far = tl.where(better, other_near, near), tl.where(better, other_far, far)
    other_near, other_far = _cosine(dot03, square0, square3), _cosine(dot12, square1, square2)
    better = other_near + other_far > near + far
    second, third, fourth = tl.where(better, t3, second), tl.where(better, t1, third), tl.where(better, t2, fourth)
    near, far = tl.where(better, other_near, near), tl.where(better, other_far, far)
    at = sample * 2 * M + 2 * row
    tl.store(cosine_ptr + at, near, mask=inside)
    tl.store(cosine_ptr + at + 1, far, mask=inside)
    tl.store(pairs_ptr + 2 * at, t0, mask=inside)
    tl.store(pairs_ptr + 2 * at + 1, second, mask=inside)
    tl.store(pairs_ptr + 2 * at + 2, third, mask=inside)
    tl.store(pairs_ptr + 2 * at + 3, fourth, mask=inside)


@triton.jit
def _zeros(ROWS: tl.constexpr):
    return tl.zeros([ROWS], tl.float32)


@triton.jit
def _rows(x_ptr, token, c, C):
    return tl.load(x_ptr + token[:, None] * C + c[None, :], mask=c[None, :] < C, other=0.0).to(tl.float32)


@triton.jit
def _cosine(dot, square, other):
    """Of tokens with these squared lengths; -1 where one is not finite."""
    cosine = dot / tl.maximum(tl.sqrt(square), 1.1754944e-38) / tl.maximum(tl.sqrt(other), 1.1754944e-38)
    return tl.where(tl.abs(cosine) < float("inf"), cosine, -1.0)
