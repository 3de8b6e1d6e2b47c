# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Copies of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import as_rows


def take(x: Tensor, at: Tensor) -> Tensor:
    """Computes `reference.take`: each program copies a few rows."""
    (B, _, C), M = x.shape, at.shape[1]
    out = torch.empty(B, M, C, dtype=x.dtype, device=x.device)
    x, rows = as_rows(x), 4
    _take[(triton.cdiv(M, rows), B)](
        x, at.contiguous(), out, x.stride(0), M, C, ROWS=rows, CHANNELS=triton.next_power_of_2(C), num_warps=4
    )
    return out


@triton.jit
def _take(x_ptr, at_ptr, out_ptr, STRIDE, M, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    inside = (m < M)[:, None] & (c < C)[None, :]
    at = tl.load(at_ptr + sample * M + m, mask=m < M, other=0)
    x = tl.load(x_ptr + sample * STRIDE + at[:, None] * C + c[None, :], mask=inside)
    tl.store(out_ptr + (sample * M + m)[:, None] * C + c[None, :], x, mask=inside)
