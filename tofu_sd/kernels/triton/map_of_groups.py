# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The map of the most similar of given groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .build_map import _among_largest, _rth_largest


def map_of_groups(similarity: Tensor, members: Tensor, n: int, rest: Tensor) -> tuple[Tensor, ...]:
    """Computes `reference.map_of_groups` and its Groups in one launch, a program for each sample.

    Returns:
        (kept_idx, group_idx, order, start, log_size).
    """
    if not hasattr(tl, "histogram"):  # before Triton 3
        return reference.map_of_groups(similarity, members, n, rest)
    (B, U, g), R, device = members.shape, len(rest), members.device
    N, K = U * g + R, U * g + R - n * (g - 1)
    kept_idx, group_idx = (torch.empty(B, size, dtype=torch.long, device=device) for size in (K, N))
    order, start = (torch.empty(B, size, dtype=torch.int32, device=device) for size in (N, K + 1))
    log_size = torch.empty(B, K, dtype=torch.float32, device=device)
    block = min(4096, max(128, triton.next_power_of_2(U)))
    _map_of_groups[(B,)](
        similarity.float().contiguous(), members.contiguous(), rest.contiguous(), kept_idx, group_idx, order, start,
        log_size, n, U, R, G=g, BLOCK=block, num_warps=min(16, block // 32),
    )  # fmt: skip
    return kept_idx, group_idx, order, start, log_size


@triton.jit
def _map_of_groups(
    best_ptr, members_ptr, rest_ptr, kept_ptr, group_ptr, order_ptr, start_ptr, log_ptr, n, U, R, G: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    N, K = U * G + R, U * G + R - n * (G - 1)
    best_ptr += sample * U
    members_ptr += sample * U * G
    kept_ptr += sample * K
    group_ptr += sample * N
    order_ptr += sample * N
    start_ptr += sample * (K + 1)
    log_ptr += sample * K
    prefix, room = _rth_largest(best_ptr, best_ptr, n, U, False, BLOCK)
    level = 0
    earlier = 0  # merged groups
    for first in range(0, U, BLOCK):
        u = first + tl.arange(0, BLOCK)
        merged, level = _among_largest(best_ptr, best_ptr, u, U, prefix, room, level, False)
        count = merged.to(tl.int32)
        before = earlier + tl.cumsum(count, axis=0) - count
        earlier += tl.sum(count, axis=0)
        survivor = tl.where(merged, before, n + G * (u - before))
        place = tl.where(merged, G * before, G * n + G * (u - before))
        for nth in tl.static_range(G):
            token = tl.load(members_ptr + u * G + nth, mask=u < U, other=0)
            k = tl.where(merged, survivor, survivor + nth)
            tl.store(group_ptr + token, k.to(tl.int64), mask=u < U)
            tl.store(order_ptr + place + nth, token.to(tl.int32), mask=u < U)
            survives = (u < U) & ((nth == 0) | (merged == 0))
            tl.store(kept_ptr + k, token, mask=survives)
            tl.store(start_ptr + k, place + nth, mask=survives)
            tl.store(log_ptr + k, tl.where(merged, tl.log(float(G)), 0.0), mask=survives)
    for first in range(0, R + 1, BLOCK):  # and the end of the last group
        i = first + tl.arange(0, BLOCK)
        token = tl.load(rest_ptr + i, mask=i < R, other=0)
        tl.store(group_ptr + token, (K - R + i).to(tl.int64), mask=i < R)
        tl.store(order_ptr + U * G + i, token.to(tl.int32), mask=i < R)
        tl.store(kept_ptr + K - R + i, token, mask=i < R)
        tl.store(log_ptr + K - R + i, tl.zeros([BLOCK], tl.float32), mask=i < R)
        tl.store(start_ptr + K - R + i, U * G + i, mask=i <= R)
