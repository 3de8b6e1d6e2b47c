"""Checks of what matchers from outside of this package return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..kernels.operators import is_compiling
from ..utils import InvalidResultError
from .partition import PartitionTensors
from .reductions import BUILT_IN_REDUCTIONS, mean
from .token_map import SoftMap, TokenMap

Matcher = Callable[[Tensor, PartitionTensors, Any], "TokenMap | SoftMap"]

_CHECKED: set[tuple[Matcher, int, int]] = set()
"""Matchers whose indices were in range, with N and K."""


@dataclass(frozen=True)
class CheckedMatcher:
    """A matcher that raises where its map has another type, shape or dtype, or indices out of range.

    Reading indices synchronizes a device. So they are read once for each number of tokens, and never in compiled code.

    Args:
        name: of the matcher, for messages.
        matcher: the function.
    """

    name: str
    matcher: Matcher

    def __call__(self, tokens: Tensor, grid: PartitionTensors, config: Any) -> TokenMap | SoftMap:
        """Returns the matcher's map of the tokens [B, N, C]. InvalidResultError for an invalid one."""
        map = self.matcher(tokens, grid, config)
        N, K = tokens.shape[1], tokens.shape[1] - len(grid.num_merged)
        if isinstance(map, TokenMap):
            shapes: dict[str, tuple[int, ...]] = {"kept_idx": (len(tokens), K), "group_idx": (len(tokens), N)}
        elif isinstance(map, SoftMap):
            self._check_soft_map(map, len(tokens), config)
            shapes = {"tokens": tuple(map.weights.shape[1:3]), "src_index": (N,), "kept_idx": (K,), "dst_index": (K,)}
        else:
            self._refuse(f"a {type(map).__name__}", "a TokenMap or a SoftMap of tofu_sd.core.token_map")
        for field, shape in shapes.items():
            self._check_tensor(field, getattr(map, field), shape, tokens.device)
        if not is_compiling() and (self.matcher, N, K) not in _CHECKED:
            self._check_values(map, N, K)
            _CHECKED.add((self.matcher, N, K))
        return map

    def _refuse(self, returned: str, required: str) -> NoReturn:
        raise InvalidResultError(f"matcher {self.name} returned {returned}; it must be {required}")

    def _check_tensor(self, field: str, value: Any, shape: tuple[int, ...], device: torch.device) -> None:
        """Checks shape, dtype and device of one field of a map."""
        if not isinstance(value, Tensor):
            self._refuse(f"{field} of type {type(value).__name__}", f"a tensor {list(shape)}")
        if value.shape != shape:
            self._refuse(f"{field} {list(value.shape)}", f"{list(shape)}")
        if value.dtype != torch.long:
            self._refuse(f"{field} of {value.dtype}", "torch.int64")
        if value.device != device:
            self._refuse(f"{field} on {value.device}", f"on {device}, as the tokens are")

    def _check_soft_map(self, map: SoftMap, B: int, config: Any) -> None:
        """Checks the weights of a SoftMap, and that the reductions of the configuration can use it."""
        for field in ("early", "late", "kv_early", "kv_late"):
            if (reduction := getattr(config, field, None)) in BUILT_IN_REDUCTIONS and reduction is not mean:
                name = getattr(config, field).__name__
                self._refuse(f"a SoftMap, and {field} is {name!r}", f"a TokenMap, or {field} must be 'mean'")
        if not isinstance(map.weights, Tensor) or map.weights.ndim != 4 or len(map.weights) != B:
            shown = list(map.weights.shape) if isinstance(map.weights, Tensor) else type(map.weights).__name__
            self._refuse(f"weights {shown}", f"[{B}, T, M, D]")

    def _check_values(self, map: TokenMap | SoftMap, N: int, K: int) -> None:
        """Checks that indices are in range, and that each survivor is in its own group. It reads the values."""
        if isinstance(map, SoftMap):
            _, T, M, D = map.weights.shape
            limits = {"tokens": N, "src_index": T * M, "kept_idx": N, "dst_index": T * D}
        else:
            limits = {"kept_idx": N, "group_idx": K}
        for field, limit in limits.items():
            low, high = (int(value) for value in getattr(map, field).aminmax())
            if low < 0 or high >= limit:
                self._refuse(f"{field} from {low} to {high}", f"from 0 to {limit - 1}")
        if isinstance(map, SoftMap):
            total = map.weights.flatten(1, 2)[:, map.src_index].sum(dim=-1)  # [B, N]
            if not torch.allclose(total, torch.ones_like(total), atol=1e-2):
                self._refuse(f"weights with row sums from {total.min():g} to {total.max():g}", "1 in each row")
            return
        own = map.group_idx.gather(1, map.kept_idx)  # [B, K]
        wrong = (own != torch.arange(K, device=own.device)).nonzero()
        if len(wrong):
            b, k = wrong[0].tolist()
            token, group = int(map.kept_idx[b, k]), int(own[b, k])
            survivor = f"group {group} for token {token}, which is kept_idx[{b}, {k}]"
            self._refuse(survivor, f"{k}: a survivor is in its own group, group_idx[kept_idx[k]] == k")
