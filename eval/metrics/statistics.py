"""Intervals and distances between sets, in float64, by their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

RESAMPLES = 5000
AT_ONCE = 2**20  # groups resampled at a time: all at once would take gigabytes for many classes
MIN_GROUPS = 5  # with fewer, a percentile bootstrap is little more than the range
BLOCKS = 50  # of a jackknife: as many Fréchet distances are computed for one interval
NORMAL_95 = 1.959964


def bootstrap(values: Tensor, groups: Sequence[str]) -> tuple[float, float] | None:
    """95 % percentile interval of the mean of `values` [N], resampling whole groups (the images of one class).

    The resampling is fixed, so that the same images give the same interval. None for fewer than 5 groups.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    if len(names) < MIN_GROUPS:
        return None
    index = torch.tensor([names[name] for name in groups])
    sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, values.double())
    counts = torch.bincount(index, minlength=len(names)).double()
    generator = torch.Generator().manual_seed(0)
    means, at_once = [], max(1, AT_ONCE // len(names))
    for start in range(0, RESAMPLES, at_once):
        sample = torch.randint(len(names), (min(at_once, RESAMPLES - start), len(names)), generator=generator)
        means.append(sums[sample].sum(1) / counts[sample].sum(1))
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired_difference(
    own: Mapping[str, float], other: Mapping[str, float], groups: Mapping[str, str]
) -> tuple[float, tuple[float, float] | None, int]:
    """Returns the mean of own minus other over the same images, its 95 % interval, and how many images count.

    Images with a difference that is not finite do not count: equal images have an infinite PSNR.

    Args:
        own: a figure of each image, by id.
        other: the same of another method; it has all these images.
        groups: of each image, such as its prompt.
    """
    gaps = {image: value - other[image] for image, value in own.items()}
    finite = [image for image, gap in gaps.items() if math.isfinite(gap)]
    values = torch.tensor([gaps[image] for image in finite], dtype=torch.float64)
    return values.mean().item(), bootstrap(values, [groups[image] for image in finite]), len(finite)


def effective_size(values: Tensor, groups: Sequence[str]) -> float:
    """Effective sample size of values of 0 or 1 in groups, for their mean (Korn and Graubard 1998).

    Between the number of groups, if the values of a group agree, and the number of values, if they are independent.
    Where all values are equal, so that the correlation is unknown, it is the number of groups.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    k, n, mean = len(names), len(values), values.double().mean()
    off = torch.zeros(k, dtype=torch.float64)  # sums of a group's deviations from the mean
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

    KID (Bińkowski et al. 2018) as a U-statistic: without the terms of a sample with itself, and of the two members of a
    pair. With the latter, as for independent sets, equal sets would have a distance below zero.
    """
    x, y = x.double(), y.double()
    n, width = x.shape
    total = 0.0
    for start in range(0, n, 512):  # in blocks, without a matrix [N, N]
        a, b = x[start : start + 512], y[start : start + 512]
        terms = _cubic(a, x, width) + _cubic(b, y, width) - _cubic(a, y, width) - _cubic(b, x, width)
        total += float(terms.sum() - terms.diagonal(start).sum())
    return total / (n * (n - 1))


def _cubic(a: Tensor, b: Tensor, width: int) -> Tensor:
    return (a @ b.T / width + 1) ** 3


def jackknife(
    statistic: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, groups: Sequence[str]
) -> tuple[float, float] | None:
    """95 % interval of statistic(x, y) by leaving out blocks of whole groups from both x and y, which are pairs.

    Normal approximation. None for fewer than 5 groups.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    blocks = min(BLOCKS, len(names))
    if blocks < MIN_GROUPS:
        return None
    block = torch.tensor([names[name] % blocks for name in groups])
    left = torch.tensor([statistic(x[block != i], y[block != i]) for i in range(blocks)], dtype=torch.float64)
    error = math.sqrt((blocks - 1) / blocks * (left - left.mean()).square().sum().item())
    value = statistic(x, y)
    return value - NORMAL_95 * error, value + NORMAL_95 * error


def wilson(right: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    p, centre = right / n, right / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), min(1.0, (centre + half) / (1 + z * z / n))
