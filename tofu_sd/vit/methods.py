"""Token reduction in classifiers: tokens are fused between attention and MLP, and stay fused to the end.

The attention's keys tell what to fuse. How much is a number of tokens for each layer (ToMe, ICLR 2023; ToFu, WACV 2024,
sections 3 and 4.1), or what is alike enough (ATM, arXiv 2505.15160).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import layer_threshold
from ..core.matching import bipartite_soft_matching, count_above_threshold, most_similar
from ..core.partition import Partition
from ..core.reductions import Reduction, get_reduction, mean, mlerp, prune
from ..core.token_map import TokenMap
from ..kernels import take

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
            reduction = get_reduction(getattr(self, name))
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

    def num_merged(self, layers: int, tokens: int) -> list[int]:
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
        return get_reduction(self.early if layer < self.depth_split else self.late)

    def map(self, layer: int, layers: int, begun: int, keys: Tensor, total: TokenMap | None) -> TokenMap | None:
        """Which of the patch tokens with these keys [B, N, d] are fused in a layer, of `begun` at first; None if none.

        total: the map of all layers before it.
        """
        r = self.num_merged(layers, begun)[layer]
        parts = alternating(keys.shape[1], keys.device)
        return bipartite_soft_matching(keys, parts, r) if r else None

    def ends(self, layer: int, layers: int) -> bool:
        """Whether only the class token goes on from a layer."""
        return False


@dataclass(frozen=True)
class AdaptiveReduction:
    """Adaptive token merging (ATM): in each layer what is alike enough is averaged, however many tokens it is.

    alpha, beta, least: two tokens are merged if the cosine of their keys exceeds max(alpha - (exp(beta l) - 1), least)
    in the layer l from 0 (Eq. 1); a batch merges the mean number of all its pictures, rounded. The paper sweeps alpha
    from 0.945 to 1, beta from 0.015 to 0.05 and least from 0.8 to 0.945 for each model and each amount of operations
    (appendix D); the defaults are those of its DeiT-S of 3.26 instead of 4.6 GFLOP. What suits a model depends on how
    alike its keys are.
    split: the share of the layers, from the first, whose tokens take turns as sources and destinations; after it the
    smaller half by size are sources (section 3.3).
    proportional: as of `TokenReduction`. class_only: patch tokens end in the last layer (appendix A), for models that
    classify by the class token.

    Raises ValueError naming the value and the limit.
    """

    alpha: float = 0.99
    beta: float = 0.04
    least: float = 0.88
    split: float = 0.75
    proportional: bool = True
    class_only: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (("alpha", -1, 2), ("beta", 0, 1), ("least", -1, 1), ("split", 0, 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; it must be a number from {low} to {high}")
        for name in ("proportional", "class_only"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")

    def threshold(self, layer: int) -> float:
        """Eq. 1, of a layer from 0."""
        return layer_threshold(self.alpha, self.beta, self.least, layer)

    def reduction(self, layer: int) -> Reduction:
        return mean

    def map(self, layer: int, layers: int, begun: int, keys: Tensor, total: TokenMap | None) -> TokenMap | None:
        """As of `TokenReduction` (Algorithm 1)."""
        N = keys.shape[1]
        if N < 2 or self.ends(layer, layers):
            return None
        if layer < round(self.split * layers) or total is None:
            return self._alike(layer, keys, alternating(N, keys.device))
        order = total.size.argsort(dim=1, stable=True)  # the small ones first
        n = torch.arange(N, device=keys.device)
        map = self._alike(layer, take(keys, order), Partition(n[: N // 2], n[N // 2 :]))
        if map is None:
            return None
        kept = order.gather(1, map.kept_idx)
        raster = kept.argsort(dim=1)  # survivors stand as their tokens did
        place = raster.argsort(dim=1)
        home = torch.empty_like(map.group_idx).scatter(1, order, place.gather(1, map.group_idx))
        return TokenMap(kept.gather(1, raster), home)

    def _alike(self, layer: int, keys: Tensor, parts: Partition) -> TokenMap | None:
        """The pairs of the highest cosines, as many as exceed the layer's threshold in a picture of the batch."""
        pairs = most_similar(keys, parts)
        r = round(count_above_threshold(pairs.best, self.threshold(layer)).item())
        return pairs.fused(r) if r else None

    def ends(self, layer: int, layers: int) -> bool:
        return self.class_only and layer == layers - 1


RECIPES: dict[str, TokenReduction | AdaptiveReduction] = {
    "tome": TokenReduction(early=mean, late=mean),  # ToMe, ICLR 2023
    "tofu": TokenReduction(early=prune, late=mlerp),  # ToFu, WACV 2024: "ToFu MLERP" of its tables 1 and 2
    "tofu-avg": TokenReduction(early=prune, late=mean),  # "ToFu AVG" of the same
    "prune": TokenReduction(early=prune, late=prune),
    "mlerp": TokenReduction(early=mlerp, late=mlerp),
    "atm": AdaptiveReduction(),  # ATM, arXiv 2505.15160
}


def merging_error(x1: Tensor, x2: Tensor, n1: Tensor, n2: Tensor) -> Tensor:
    """What is lost by merging tokens x1, x2 [..., C] of sizes n1, n2 [...] (ATM definition 2): [...].

    n1 and n2 times the cosine distances to the weighted average of the two directions: between n1 n2 / (n1 + n2) and
    twice that, times the cosine distance of the two (theorem 1), so that merging large ones costs more.
    """
    x1, x2 = (torch.nn.functional.normalize(x, dim=-1) for x in (x1, x2))
    merged = (n1.unsqueeze(-1) * x1 + n2.unsqueeze(-1) * x2) / (n1 + n2).unsqueeze(-1)

    def distance(x: Tensor) -> Tensor:
        return 1 - torch.nn.functional.cosine_similarity(x, merged, dim=-1)

    return n1 * distance(x1) + n2 * distance(x2)


def alternating(tokens: int, device: torch.device) -> Partition:
    """Every other token is a source, beginning with the second (ToMe section 3)."""
    n = torch.arange(tokens, device=device)
    return Partition(n[1::2], n[::2])
