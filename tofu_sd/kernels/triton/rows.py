"""How the kernels read tokens."""

from __future__ import annotations

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """Returns tokens x [B, N, C] of which each sample is one piece of memory; copied only where they are not so.

    The image's part of a sequence is such a piece, with the text between those of two samples.
    """
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
