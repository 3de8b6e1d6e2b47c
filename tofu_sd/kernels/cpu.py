"""Matching on CPUs with oneDNN's matrix product, as MKL's is slow on CPUs that are not Intel's.

It computes `reference.nearest_dst`. One core of an AMD EPYC reached 225 GFLOP/s with oneDNN and 95 with MKL.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import reference


def nearest_dst(metric: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `reference.nearest_dst`, one sample at a time."""
    results = [reference.nearest_dst(x, src, dst, _dot) for x in metric.unsqueeze(1)]
    best, target = (torch.cat(parts) for parts in zip(*results, strict=True))
    return best, target


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Returns x @ y.mT of one pair of matrices [1, 1, R, C] and [1, 1, D, C]; of several with torch's own product."""
    if x.shape[1] > 1:
        return x @ y.mT
    return torch.ops.mkldnn._linear_pointwise(x[0, 0], y[0, 0], None, "none", [], "")[None, None]


@cache
def available() -> bool:
    """Whether this build of torch has oneDNN's product, an internal of its compiler; tried once."""
    x = torch.eye(2)
    try:
        return bool(torch.equal(_dot(x[None, None], x[None, None])[0, 0], x))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
