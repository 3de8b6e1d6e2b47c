"""Token reduction in classifiers: tokens are fused between attention and MLP, and stay fused to the end.

ToFu (WACV 2024) sections 3 and 4.1, which follows ToMe (ICLR 2023). The attention's keys tell what to fuse, a number of
tokens for each layer how much, where Stable Diffusion's `TokenFusion` has a share of a map that it unfolds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .match import Partition, bipartite_soft_matching
from .policy import reduction_named
from .reduce import Reduction, mean, mlerp, prune
from .tokens import TokenMap

SCHEDULES = ("constant", "decreasing")


@dataclass(frozen=True)
class TokenReduction:
    """How a classifier's tokens are fused. The default is the paper's: 8 of each layer, pruned in the first six.

    r: tokens that leave in each layer, or as many as its sources are (half of what is there). 0 changes nothing.
    schedule: "constant"; "decreasing" takes 2 r in the first layer and falls in a line to none in the last.
    early, late: reductions of the layers before and from `depth_split` on (ToFu Eq. 7): `prune`, `mean`, `mlerp`.
    proportional: give a fused token the attention of all it stands for, log(n_i) on its key (ToMe section 3).

    Raises ValueError naming the value and the limit.
    """

    r: int = 8
    schedule: str = "constant"
    early: Reduction | str = prune
    late: Reduction | str = mlerp
    depth_split: int = 6
    proportional: bool = True

    def __post_init__(self) -> None:
        for name in ("early", "late"):
            reduction = reduction_named(getattr(self, name))
            if reduction not in (prune, mean, mlerp):
                raise ValueError(f"{name} is {reduction!r}; it must be prune, mean or mlerp, which know of sizes")
            object.__setattr__(self, name, reduction)
        for name in ("r", "depth_split"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 0")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; it must be {' or '.join(SCHEDULES)}")
        if not isinstance(self.proportional, bool):
            raise ValueError(f"proportional is {self.proportional!r}; it must be True or False")

    @classmethod
    def of(cls, r: int | TokenReduction = 8, /, **options: Any) -> TokenReduction:
        """A TokenReduction from r, or from another one, with any options changed. TypeError for an unknown option."""
        return replace(r, **options) if isinstance(r, cls) else cls(r, **options)  # type: ignore[arg-type]

    def leaving(self, layers: int, tokens: int) -> list[int]:
        """How many of `tokens` patch tokens leave in each of so many layers."""
        wanted = [self.r] * layers
        if self.schedule == "decreasing":
            wanted = [round(2 * self.r * (1 - layer / max(1, layers - 1))) for layer in range(layers)]
        left = []
        for r in wanted:
            left.append(min(r, tokens // 2))
            tokens -= left[-1]
        return left

    def reduction(self, layer: int) -> Reduction:
        """Eq. 7."""
        return reduction_named(self.early if layer < self.depth_split else self.late)


def alternating(tokens: int, device: torch.device) -> Partition:
    """Every other token is a source, beginning with the second (ToMe section 3)."""
    n = torch.arange(tokens, device=device)
    return Partition(n[1::2], n[::2])


def reduce_sized(reduction: Reduction, x: Tensor, map: TokenMap, size: Tensor) -> Tensor:
    """A reduction of x [B, N, C] whose tokens stand for `size` [B, N] tokens each: averages count them all.

    MLERP takes the direction of that average and the largest norm of the tokens (Eq. 10).
    """
    if reduction is prune:
        return prune(x, map)
    weight = size.unsqueeze(-1).to(x.dtype)
    average = mean(x * weight, map) / mean(weight, map)
    if reduction is mean:
        return average
    largest = mlerp(x, map).norm(dim=-1, keepdim=True)
    return torch.nn.functional.normalize(average, dim=-1) * largest


class Reducer:
    """What the layers of one model share in a forward: which tokens have been fused so far.

    prefix: how many tokens stand before those of the patches (class, distillation, registers) and are left alone.
    """

    def __init__(self, reduction: TokenReduction, layers: int, prefix: int):
        self.told = reduction
        self.layers = layers
        self.prefix = prefix
        self.leaving: list[int] = []
        self.keys: Tensor | None = None  # [B, N, d] of the layer that runs, averaged over the heads
        self.total: TokenMap | None = None  # of the patch tokens the model began with
        self.watcher: Callable[[int, TokenMap], None] | None = None  # is shown the total map after each layer

    def begin(self, layer: int, x: Tensor) -> None:
        """A layer is about to run on the tokens x [B, N, C]."""
        if layer == 0:
            self.total = None
            self.leaving = self.told.leaving(self.layers, x.shape[1] - self.prefix)

    def bias(self, x: Tensor) -> Tensor | None:
        """log(n_i) for the keys of the tokens x, as attention's mask [B, 1, 1, N]; None where nothing is weighted."""
        if self.total is None or not self.told.proportional:
            return None
        size = torch.cat([self.total.size.new_ones(len(x), self.prefix), self.total.size], dim=1)
        return size.log().to(x.dtype)[:, None, None]

    def reduce(self, layer: int, x: Tensor) -> Tensor:
        """The tokens x [B, N, C] after a layer's attention, fewer."""
        keys, self.keys = self.keys, None
        if not self.leaving[layer] or keys is None:
            return x
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        parts = alternating(patches.shape[1], x.device)
        map = bipartite_soft_matching(keys[:, self.prefix :], parts, self.leaving[layer])
        size = patches.new_ones(patches.shape[:2]) if self.total is None else self.total.size
        fused = reduce_sized(self.told.reduction(layer), patches, map, size)
        self.total = map if self.total is None else self.total.then(map)
        if self.watcher is not None:
            self.watcher(layer, self.total)
        return torch.cat([prefix, fused], dim=1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "keys": None, "total": None, "watcher": None}
