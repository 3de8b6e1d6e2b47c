"""Ways to fuse: x [B, N, C] and a map give [B, K, C]. ToFu (WACV 2024), Eq. 5-10 and Algorithm 1.

Each reduction keeps dtype and device, carries gradients, and draws the same bits every time it is run. Averages are
float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import merge, take
from ..kernels.operators import operator
from ..utils import did_you_mean, same_source
from .token_map import SoftMap, TokenMap

Reduction = Callable[[Tensor, Any], Tensor]  # of a TokenMap; `mean` of a SoftMap too


def prune(x: Tensor, map: TokenMap) -> Tensor:
    """The survivors as they are (Alg. 1, line 9): [B, K, C]."""
    return take(x, map.kept_idx)


def unmerge(y: Tensor, map: TokenMap | SoftMap) -> Tensor:
    """Every token takes what its survivor has: y [B, K, C] -> [B, N, C].

    prune(unmerge(y, map), map) == y, bit for bit. Of a SoftMap, y_i = sum_k a_ik y_k.
    """
    if isinstance(map, SoftMap):
        (B, T, _, D), C = map.weights.shape, y.shape[-1]
        with torch.autocast(y.device.type, enabled=False):
            full = y.to(map.weights.dtype)
            seated = full.new_zeros(B, T * D, C).index_copy(1, map.dst_index, full).view(B, T, D, C)
            return (map.weights @ seated).flatten(1, 2)[:, map.place].to(y.dtype)
    return take(y, map.group_idx)


def mean(x: Tensor, map: TokenMap | SoftMap) -> Tensor:
    """The average of each group, its survivor included (Eq. 6 and 9): [B, K, C].

    Of a SoftMap, sum_i a_ik x_i (AdaptiVision Eq. 3) divided by sum_i a_ik: the paper's sums would be as many times
    larger than tokens as they hold tokens, which a model that is not trained on them does not know.
    """
    if isinstance(map, SoftMap):
        with torch.autocast(x.device.type, enabled=False):
            sums = map.weights.mT @ x[:, map.tokens].to(map.weights.dtype)  # [B, T, D, C]
            return (sums.flatten(1, 2)[:, map.dst_index] / map.size.unsqueeze(-1)).to(x.dtype)
    return merge(x, map.group_idx, map.kept_idx.shape[1], largest_norm=False)


def mlerp(x: Tensor, map: TokenMap) -> Tensor:
    """The direction of each group's mean at the largest norm in the group, survivor included (Eq. 10): [B, K, C].

    A group whose mean is zero has no direction and stays zero.
    """
    return merge(x, map.group_idx, map.kept_idx.shape[1], largest_norm=True)


REDUCTIONS: dict[str, Reduction] = {"prune": prune, "mean": mean, "mlerp": mlerp}


def register_reduction(reduction: Reduction) -> Reduction:
    """Makes a reduction available by its function's name: `TokenFusionConfig(early="mine")`. A decorator.

    Args:
        reduction: takes tokens [B, N, C] and a TokenMap to [B, K, C].

    Raises:
        ValueError: the function has no name, or another reduction has it.
    """
    name = get_reduction(reduction).__name__
    if not same_source(REDUCTIONS.get(name, reduction), reduction):
        raise ValueError(f"a reduction named {name!r} is registered already: give yours another name")
    REDUCTIONS[name] = reduction
    return reduction


def get_reduction(name: str | Reduction) -> Reduction:
    """The reduction called `name`; a function is returned unchanged.

    Raises:
        ValueError: an unknown name, or a function without a name, which rows and folders are named after.
    """
    if callable(name):
        if not getattr(name, "__name__", "").isidentifier():
            raise ValueError(f"the reduction {name!r} has no name of its own: write it as a function, with def")
        return name
    if name not in REDUCTIONS:
        hint = did_you_mean(str(name), REDUCTIONS)
        raise ValueError(f"unknown reduction {name!r}{hint}; known: {', '.join(REDUCTIONS)}")
    return REDUCTIONS[name]


_NUMBERED: dict[Reduction, int] = {reduction: i for i, reduction in enumerate(REDUCTIONS.values(), 2)}


def reduction_id(reduction: Reduction) -> int:
    """The number by which `reduce_by_id` knows a reduction, from 2 on: compilers take 0 and 1 for constants.

    To be asked outside of compiled code, which puts off what it changes until its graph has run.
    """
    return _NUMBERED.setdefault(reduction, len(_NUMBERED) + 2)


def _reduced_shapes(x: Tensor, kept_idx: Tensor, group_idx: Tensor, number: int) -> Tensor:
    return x.new_empty(*kept_idx.shape, x.shape[-1])


@operator("tofu_sd::reduce", "(Tensor x, Tensor kept, Tensor home, SymInt number) -> Tensor", _reduced_shapes)
def reduce_by_id(x: Tensor, kept_idx: Tensor, group_idx: Tensor, number: int) -> Tensor:
    """The reduction of that number, as an operator that is the same for all of them: one graph of a compiled block.

    Without gradient.
    """
    return list(_NUMBERED)[number - 2](x, TokenMap(kept_idx, group_idx)).contiguous()
