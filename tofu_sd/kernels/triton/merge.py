# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Averages of groups of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .rows import as_rows

LARGEST, PARTIAL = (tl.constexpr(int(each)) for each in (reference.Length.LARGEST, reference.Length.PARTIAL))


def merge(
    x: Tensor,
    group_idx: Tensor,
    K: int,
    lengths: Sequence[reference.Length],
    groups: reference.Groups | None = None,
) -> list[Tensor]:
    """Computes `reference.merge` in one launch: each program averages one group, for one or two lengths."""
    B, N, C = x.shape
    if groups is None:
        groups = reference.sorted_groups(group_idx, K)
    outputs = [torch.empty(B, K, C, dtype=x.dtype, device=x.device) for _ in lengths]
    x = as_rows(x)
    channels = triton.next_power_of_2(C)
    first, last = int(lengths[0]), int(lengths[-1])
    _merge[(K, B)](
        x, groups.order.contiguous(), groups.start.contiguous(),
        torch.empty(B, N, dtype=torch.int32, device=x.device), outputs[0], outputs[-1], x.stride(0), N, K, C,
        FIRST=first, LAST=last, TWO=len(lengths) > 1, CHANNELS=channels, ROWS=4, CHUNK=32,
        num_warps=max(1, min(8, channels // 512)),
    )  # fmt: skip
    return outputs


@triton.jit
def _merge(
    x_ptr, order_ptr, start_ptr, sorted_ptr, first_ptr, last_ptr, STRIDE, N, K, C, FIRST: tl.constexpr,
    LAST: tl.constexpr, TWO: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    k, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(start_ptr + sample * (K + 1) + k)
    members = tl.load(start_ptr + sample * (K + 1) + k + 1) - start
    x_ptr += sample * STRIDE
    sorted_ptr += sample * N + start
    _sort(order_ptr + sample * N + start, sorted_ptr, members, CHUNK)  # sums have the same order in every run
    c = tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    largest = 0.0
    for row in range(0, members, ROWS):
        i = row + tl.arange(0, ROWS)
        token = tl.load(sorted_ptr + i, mask=i < members, other=0).to(tl.int64)
        x = tl.load(x_ptr + token[:, None] * C + c[None, :], mask=(i < members)[:, None] & (c < C)[None, :], other=0.0)
        x = x.to(tl.float32)
        total += tl.sum(x, axis=0)
        if FIRST + LAST > 0:
            largest = tl.maximum(largest, tl.max(tl.sqrt(tl.sum(x * x, axis=1)), axis=0))
    mean = total / members.to(tl.float32)
    at = (sample * K + k) * C + c
    result = _with_length(mean, largest, members, FIRST)
    tl.store(first_ptr + at, result.to(first_ptr.dtype.element_ty), mask=c < C)
    if TWO:
        result = _with_length(mean, largest, members, LAST)
        tl.store(last_ptr + at, result.to(last_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _sort(from_ptr, to_ptr, members, CHUNK: tl.constexpr):
    """Copies the distinct integers of a group in ascending order, each to the place of its rank."""
    for first in range(0, members, CHUNK):
        i = first + tl.arange(0, CHUNK)
        token = tl.load(from_ptr + i, mask=i < members, other=0)
        rank = tl.zeros([CHUNK], tl.int32)
        for start in range(0, members, CHUNK):
            j = start + tl.arange(0, CHUNK)
            other = tl.load(from_ptr + j, mask=j < members, other=2147483647)
            rank += tl.sum((other[None, :] < token[:, None]).to(tl.int32), axis=1)
        tl.store(to_ptr + rank, token.to(tl.int32), mask=i < members)
    tl.debug_barrier()


@triton.jit
def _with_length(mean, largest, members, LENGTH: tl.constexpr):
    """Rescales a group's mean as LENGTH says, by its largest norm and its number of members."""
    scale = 1.0
    if LENGTH == LARGEST or LENGTH == PARTIAL:  # noqa: SIM109 - kernels have no tuples of constants
        own = tl.sqrt(tl.sum(mean * mean, axis=0))
        pointing = own > 1.1754944e-38 * tl.maximum(largest, 1.0)
        scale = largest / tl.where(pointing, own, 1.0)
        if LENGTH == PARTIAL:
            others = tl.maximum(members - 1, 1).to(tl.float32)
            scale = 1.0 + (scale - 1.0) / (others * others)
    return mean * scale
