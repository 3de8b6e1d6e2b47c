"""Intervals and distances between sets, in float64, by their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RESAMPLES = 5000
AT_ONCE = 2**20  # groups drawn at a time: all draws at once would take gigabytes for many classes
FEWEST_GROUPS = 5  # under which an interval says next to nothing: a percentile bootstrap is little more than the range
BLOCKS = 50  # of a jackknife: as many Fréchet distances are computed for one interval
NORMAL_95 = 1.959964


def bootstrap(values: Tensor, groups: Sequence[str]) -> tuple[float, float] | None:
    """95 % percentile interval of the mean of `values` [N], resampling whole groups (the pictures of one class).

    Always the same draws, so that the same pictures give the same interval. None of fewer than 5 groups, which say too
    little of what else there might be.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    if len(names) < FEWEST_GROUPS:
        return None
    index = torch.tensor([names[name] for name in groups])
    sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, values.double())
    counts = torch.bincount(index, minlength=len(names)).double()
    generator = torch.Generator().manual_seed(0)
    means, most = [], max(1, AT_ONCE // len(names))
    for start in range(0, RESAMPLES, most):
        draw = torch.randint(len(names), (min(most, RESAMPLES - start), len(names)), generator=generator)
        means.append(sums[draw].sum(1) / counts[draw].sum(1))
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def effective_size(values: Tensor, groups: Sequence[str]) -> float:
    """As how many independent pictures these of 0 or 1 count for their mean (Korn and Graubard 1998).

    From the number of groups, if pictures of one group are alike, to that of pictures, if they differ as any do. Where
    all pictures are alike, which says nothing of that, it is the number of groups.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    k, n, mean = len(names), len(values), values.double().mean()
    off = torch.zeros(k, dtype=torch.float64)  # sums of a group's distances from the mean
    off.index_add_(0, torch.tensor([names[name] for name in groups]), values.double() - mean)
    variance = k / max(1, k - 1) * off.square().sum() / n**2
    if variance == 0:
        return n if 0 < mean < 1 else k
    return float((mean * (1 - mean) / variance).clamp(k, n))


def frechet(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of the normal distributions fitted to features x [N, D] and y [M, D].

    |mean x - mean y|² + tr(Sx + Sy - 2 (Sx Sy)^½), with the last trace as the nuclear norm of A Bᵀ, where AᵀA = Sx and
    BᵀB = Sy: no square root of a singular matrix, so that it holds for N < D and is 0 on equal sets.
    """
    x, y = x.double(), y.double()
    a = (x - x.mean(0)) / math.sqrt(len(x) - 1)  # [N, D]
    b = (y - y.mean(0)) / math.sqrt(len(y) - 1)  # [M, D]
    shift = (x.mean(0) - y.mean(0)).square().sum()
    distance = shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float(distance))  # rounding can leave equal sets at -1e-14


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of features x, y [N, D] of pairs, under the kernel (x·y / D + 1)³.

    KID (Bińkowski et al. 2018) in its U-statistic: without the terms of a sample with itself, and of a pair's two with
    each other. With the latter in, as for independent sets, equal sets would be at a distance below zero.
    """
    x, y = x.double(), y.double()
    n, width = x.shape
    total = 0.0
    for start in range(0, n, 512):  # the matrices [N, N] are never whole
        a, b = x[start : start + 512], y[start : start + 512]
        terms = _cubic(a, x, width) + _cubic(b, y, width) - _cubic(a, y, width) - _cubic(b, x, width)
        total += float(terms.sum() - terms.diagonal(start).sum())
    return total / (n * (n - 1))


def _cubic(a: Tensor, b: Tensor, width: int) -> Tensor:
    return (a @ b.T / width + 1) ** 3


def jackknife(
    statistic: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, groups: Sequence[str]
) -> tuple[float, float] | None:
    """95 % interval of statistic(x, y) by leaving out blocks of whole groups from x and y alike (they are pairs).

    Normal approximation. None of fewer than 5 groups.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    blocks = min(BLOCKS, len(names))
    if blocks < FEWEST_GROUPS:
        return None
    block = torch.tensor([names[name] % blocks for name in groups])
    left = torch.tensor([statistic(x[block != i], y[block != i]) for i in range(blocks)], dtype=torch.float64)
    error = math.sqrt((blocks - 1) / blocks * (left - left.mean()).square().sum().item())
    value = statistic(x, y)
    return value - NORMAL_95 * error, value + NORMAL_95 * error


def wilson(right: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    p, centre = right / n, right / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), min(1.0, (centre + half) / (1 + z * z / n))
