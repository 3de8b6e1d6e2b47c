"""Reductions: tokens x [B, N, C] and a map -> [B, K, C]. ToFu (WACV 2024), Eq. 5-10 and Algorithm 1.

Each reduction keeps dtype and device, has gradients and is deterministic. Averages are computed at least in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import Length, merge, take
from ..kernels.operators import is_compiling, operator
from ..utils import InvalidResultError, RegistrationError, did_you_mean, same_source
from .token_map import SoftMap, TokenMap

Reduction = Callable[[Tensor, Any], Tensor]  # of a TokenMap; `mean` of a SoftMap too


def prune(x: Tensor, map: TokenMap) -> Tensor:
    """Keeps the survivors unchanged (Alg. 1, line 9): [B, K, C]."""
    return take(x, map.kept_idx)


def unmerge(y: Tensor, map: TokenMap | SoftMap) -> Tensor:
    """Copies each survivor to the tokens that it stands for: y [B, K, C] -> [B, N, C].

    prune(unmerge(y, map), map) == y, bit for bit. For a SoftMap, y_i = sum_k a_ik y_k.
    """
    if isinstance(map, SoftMap):
        (B, T, _, D), C = map.weights.shape, y.shape[-1]
        with torch.autocast(y.device.type, enabled=False):
            full = y.to(map.weights.dtype)
            by_window = full.new_zeros(B, T * D, C).index_copy(1, map.dst_index, full).view(B, T, D, C)
            return (map.weights @ by_window).flatten(1, 2)[:, map.src_index].to(y.dtype)
    return take(y, map.group_idx)


def mean(x: Tensor, map: TokenMap | SoftMap) -> Tensor:
    """Averages each group, survivor included (Eq. 6 and 9): [B, K, C].

    For a SoftMap, sum_i a_ik x_i (AdaptiVision Eq. 3) divided by sum_i a_ik. The paper's sums grow with the group, and
    only a model that is trained on them can use them.
    """
    if isinstance(map, SoftMap):
        with torch.autocast(x.device.type, enabled=False):
            sums = map.weights.mT @ x[:, map.tokens].to(map.weights.dtype)  # [B, T, D, C]
            return (sums.flatten(1, 2)[:, map.dst_index] / map.size.unsqueeze(-1)).to(x.dtype)
    return _averages(x, map, Length.OWN)[0]


def mlerp(x: Tensor, map: TokenMap) -> Tensor:
    """Rescales each group's mean to the largest norm in the group, survivor included (Eq. 10): [B, K, C].

    A group whose mean is zero has no direction and stays zero.
    """
    return _averages(x, map, Length.LARGEST)[0]


def partial_mlerp(x: Tensor, map: TokenMap) -> Tensor:
    """Goes 1 / (n - 1)^2 of the way from a group's mean to MLERP, in a group of n tokens: [B, K, C].

    For keys and values, with proportional attention. The mean fits queries that attend to a group from outside. For the
    group's own queries it is too short, as each attends most to its own token, which is one of n. So a pair becomes
    MLERP, and a large group stays almost the mean. The power is empirical: by PSNR 1 / (n - 1) was behind it on one
    embedded model, the mean on the other.
    """
    return _averages(x, map, Length.PARTIAL)[0]


def _averages(x: Tensor, map: TokenMap, *lengths: Length) -> list[Tensor]:
    return merge(x, map.group_idx, map.kept_idx.shape[1], lengths, map.groups)


REDUCTIONS: dict[str, Reduction] = {"prune": prune, "mean": mean, "mlerp": mlerp, "partial_mlerp": partial_mlerp}
BUILT_IN_REDUCTIONS = tuple(REDUCTIONS.values())
_LENGTHS: dict[Reduction, Length] = {mean: Length.OWN, mlerp: Length.LARGEST, partial_mlerp: Length.PARTIAL}


def register_reduction(reduction: Reduction) -> Reduction:
    """Registers a reduction under its function's name: `TokenFusionConfig(early="mine")`. A decorator.

    Args:
        reduction: takes tokens [B, N, C] and a TokenMap to [B, K, C].

    Raises:
        RegistrationError: the function has no name, or another reduction has it.
    """
    name = get_reduction(reduction).__name__
    if not same_source(REDUCTIONS.get(name, reduction), reduction):
        raise RegistrationError(f"a reduction named {name!r} is registered already: give yours another name")
    REDUCTIONS[name] = reduction
    return reduction


def get_reduction(name: str | Reduction) -> Reduction:
    """Returns the reduction called `name`; a function is returned unchanged.

    Raises:
        ValueError: an unknown name, or a function without a name, which rows and folders are named after.
    """
    if callable(name):
        if not getattr(name, "__name__", "").isidentifier():
            raise RegistrationError(f"the reduction {name!r} has no name of its own: write it as a function, with def")
        return name
    if name not in REDUCTIONS:
        hint = did_you_mean(str(name), REDUCTIONS)
        raise ValueError(f"unknown reduction {name!r}{hint}; known: {', '.join(REDUCTIONS)}")
    return REDUCTIONS[name]


def apply_reduction(reduction: Reduction, x: Tensor, map: TokenMap | SoftMap) -> Tensor:
    """Returns reduction(x, map): x [B, N, C] -> [B, K, C]. What a reduction that is not built in returns is checked.

    Raises:
        InvalidResultError: it returned another type, shape, dtype or device.
    """
    reduced = reduction(x, map)
    if reduction in BUILT_IN_REDUCTIONS or is_compiling():
        return reduced
    name, shape = reduction.__name__, [*map.after, x.shape[-1]]
    if not isinstance(reduced, Tensor):
        raise InvalidResultError(f"reduction {name} returned a {type(reduced).__name__}; it must be a tensor {shape}")
    if list(reduced.shape) != shape:
        raise InvalidResultError(f"reduction {name} returned {list(reduced.shape)}; it must be {shape}")
    if (reduced.dtype, reduced.device) != (x.dtype, x.device):
        returned, required = (f"{tensor.dtype} on {tensor.device}" for tensor in (reduced, x))
        raise InvalidResultError(f"reduction {name} returned {returned}; it must be {required}, as the tokens are")
    return reduced


def apply_both(first: Reduction, second: Reduction, x: Tensor, map: TokenMap | SoftMap) -> tuple[Tensor, Tensor]:
    """Returns first(x, map) and second(x, map); two averages are computed at once."""
    if isinstance(map, TokenMap) and first in _LENGTHS and second in _LENGTHS:
        reduced, other = _averages(x, map, _LENGTHS[first], _LENGTHS[second])
        return reduced, other
    return apply_reduction(first, x, map), apply_reduction(second, x, map)


_NUMBERED: dict[Reduction, int] = {reduction: i for i, reduction in enumerate(REDUCTIONS.values(), 2)}


def reduction_id(reduction: Reduction) -> int:
    """Returns the id of a reduction for `reduce_by_id`, from 2 on, as compilers treat 0 and 1 as constants.

    It must be called outside of compiled code, which delays changes of this registry until its graph has run.
    """
    return _NUMBERED.setdefault(reduction, len(_NUMBERED) + 2)


def _reduced_shapes(x: Tensor, map: list[Tensor], ids: list[int]) -> list[Tensor]:
    return [x.new_empty(*map[0].shape, x.shape[-1]) for _ in ids]


@operator("tofu_sd::reduce", "(Tensor x, Tensor[] map, SymInt[] ids) -> Tensor[]", _reduced_shapes)
def reduce_by_id(x: Tensor, map: list[Tensor], ids: list[int]) -> list[Tensor]:
    """Applies the reductions with these ids, one or two. One operator for all keeps one graph of a compiled block.

    It has no gradient. `map` is TokenMap.tensors.
    """
    token_map, functions = TokenMap.of_tensors(*map), [list(_NUMBERED)[id - 2] for id in ids]
    if len(functions) == 1:
        return [apply_reduction(functions[0], x, token_map).contiguous()]
    first, second = apply_both(functions[0], functions[1], x, token_map)
    # results of an operator must not share memory
    return [first.contiguous(), second.clone() if second is first else second.contiguous()]
