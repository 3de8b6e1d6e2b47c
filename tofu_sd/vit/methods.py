"""Token reduction in classifiers: tokens are merged between attention and MLP, and stay merged to the last layer.

Tokens are compared by the attention's keys. The number of merged tokens is fixed for each layer (ToMe, ICLR 2023; ToFu,
WACV 2024, sections 3 and 4.1) or follows from a similarity threshold (ATM, arXiv 2505.15160).
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
from ..options import check_options, option

SCHEDULES = ("constant", "decreasing")
REDUCTIONS = ("prune", "mean", "mlerp")
_PROPORTIONAL = (
    "Proportional attention: log(n) is added to the logit of a key that stands for n tokens (ToMe section 3)."
)


@dataclass(frozen=True)
class TokenReduction:
    """How a classifier's tokens are merged. The default is ToFu's: 8 in each layer, pruned in the first six.

    Raises:
        ValueError: a value is out of range. Names the value and the limit.
    """

    r: int = option(
        8,
        "integer",
        low=0,
        help="Tokens merged in each layer, at most half of those that are left. 0 changes nothing.",
    )
    schedule: str = option(
        "constant",
        "choice",
        choices=lambda: SCHEDULES,
        help="'constant' merges r in every layer; 'decreasing' 2 r in the first, falling linearly to 0 in the last.",
    )
    early: Reduction | str = option(
        "prune", "function", choices=lambda: REDUCTIONS, help="Reduction of the layers before depth_split (ToFu Eq. 7)."
    )
    late: Reduction | str = option(
        "mlerp", "function", choices=lambda: REDUCTIONS, help="Reduction of the layers from depth_split on."
    )
    depth_split: int = option(6, "integer", low=0, help="d: the first layer with the late reduction.")
    proportional: bool = option(True, "switch", help=_PROPORTIONAL)

    def __post_init__(self) -> None:
        for name in ("early", "late"):
            reduction = get_reduction(getattr(self, name))
            if reduction not in (prune, mean, mlerp):
                raise ValueError(f"{name} is {reduction!r}; it must be prune, mean or mlerp, which use sizes")
            object.__setattr__(self, name, reduction)
        check_options(self)

    @classmethod
    def of(cls, r: int | TokenReduction = 8, /, **options: Any) -> TokenReduction:
        """Returns a TokenReduction from r, or another one with options changed. TypeError for an unknown option."""
        return replace(r, **options) if isinstance(r, cls) else cls(r, **options)  # type: ignore[arg-type]

    def num_merged(self, layers: int, tokens: int) -> list[int]:
        """Returns how many of the `tokens` patch tokens are merged in each layer."""
        requested = [self.r] * layers
        if self.schedule == "decreasing":
            requested = [round(2 * self.r * (1 - layer / max(1, layers - 1))) for layer in range(layers)]
        merged = []
        for r in requested:
            merged.append(min(r, tokens // 2))
            tokens -= merged[-1]
        return merged

    def reduction_at(self, layer: int) -> Reduction:
        """Returns the reduction of a layer (ToFu Eq. 7)."""
        return get_reduction(self.early if layer < self.depth_split else self.late)

    def map(self, layer: int, layers: int, initial: int, keys: Tensor, total: TokenMap | None) -> TokenMap | None:
        """Returns the map of a layer's patch tokens, or None where none is merged.

        Args:
            layer: index of the layer.
            layers: number of layers.
            initial: number of patch tokens before the first layer.
            keys: [B, N, d], keys of the patch tokens, averaged over the heads.
            total: the map of all layers before it.
        """
        r = self.num_merged(layers, initial)[layer]
        parts = alternating(keys.shape[1], keys.device)
        return bipartite_soft_matching(keys, parts, r) if r else None

    def drops_patches(self, layer: int, layers: int) -> bool:
        """Whether only the prefix tokens leave a layer."""
        return False


@dataclass(frozen=True)
class AdaptiveReduction:
    """Adaptive token merging (ATM): each layer averages what exceeds a similarity threshold.

    Two tokens merge if the cosine of their keys exceeds max(alpha - (exp(beta l) - 1), least) in layer l, from 0
    (Eq. 1). A batch merges the mean number of its images, rounded. The paper sweeps alpha from 0.945 to 1, beta from
    0.015 to 0.05 and least from 0.8 to 0.945 for each model and each number of FLOPs (appendix D). The defaults are
    those of its DeiT-S with 3.26 instead of 4.6 GFLOP. What suits a model depends on how similar its keys are.

    Raises:
        ValueError: a value is out of range. Names the value and the limit.
    """

    alpha: float = option(0.99, "number", low=-1, high=2, help="Threshold of the first layer.")
    beta: float = option(0.04, "number", low=0, high=1, help="How fast thresholds fall with the layer.")
    least: float = option(0.88, "number", low=-1, high=1, help="The lowest threshold of any layer.")
    split: float = option(
        0.75,
        "number",
        low=0,
        high=1,
        help="Share of the layers, from the first, in which every other token is a source; in later layers the smaller "
        "half by size are sources (section 3.3).",
    )
    proportional: bool = option(True, "switch", help=_PROPORTIONAL)
    class_only: bool = option(
        True, "switch", help="Drop patch tokens in the last layer (appendix A), for models that use the class token."
    )

    def __post_init__(self) -> None:
        check_options(self)

    def threshold(self, layer: int) -> float:
        """Returns the threshold of a layer, from 0 (Eq. 1)."""
        return layer_threshold(self.alpha, self.beta, self.least, layer)

    def reduction_at(self, layer: int) -> Reduction:
        """Returns the average: the reduction of every layer."""
        return mean

    def map(self, layer: int, layers: int, initial: int, keys: Tensor, total: TokenMap | None) -> TokenMap | None:
        """Returns the map of a layer's patch tokens (Algorithm 1). See `TokenReduction.map`."""
        N = keys.shape[1]
        if N < 2 or self.drops_patches(layer, layers):
            return None
        if layer < round(self.split * layers) or total is None:
            return self._match(layer, keys, alternating(N, keys.device))
        order = total.size.argsort(dim=1, stable=True)  # small ones first
        n = torch.arange(N, device=keys.device)
        map = self._match(layer, take(keys, order), Partition(n[: N // 2], n[N // 2 :]))
        return None if map is None else _reordered(map, order)

    def _match(self, layer: int, keys: Tensor, parts: Partition) -> TokenMap | None:
        """Merges the pairs of highest cosine: as many as exceed the layer's threshold, the mean over the batch."""
        pairs = most_similar(keys, parts)
        r = round(count_above_threshold(pairs.best, self.threshold(layer)).item())
        return pairs.merged(r) if r else None

    def drops_patches(self, layer: int, layers: int) -> bool:
        """Whether only the prefix tokens leave a layer."""
        return self.class_only and layer == layers - 1


def _reordered(map: TokenMap, order: Tensor) -> TokenMap:
    """Returns a map of tokens in the order [B, N] as a map of the tokens themselves; survivors keep their order."""
    kept = order.gather(1, map.kept_idx)
    raster = kept.argsort(dim=1)
    rank = raster.argsort(dim=1)
    group_idx = torch.empty_like(map.group_idx).scatter(1, order, rank.gather(1, map.group_idx))
    return TokenMap(kept.gather(1, raster), group_idx)


RECIPES: dict[str, TokenReduction | AdaptiveReduction] = {
    "tome": TokenReduction(early=mean, late=mean),  # ToMe, ICLR 2023
    "tofu": TokenReduction(early=prune, late=mlerp),  # ToFu, WACV 2024: "ToFu MLERP" of its tables 1 and 2
    "tofu-avg": TokenReduction(early=prune, late=mean),  # "ToFu AVG" of the same
    "prune": TokenReduction(early=prune, late=prune),
    "mlerp": TokenReduction(early=mlerp, late=mlerp),
    "atm": AdaptiveReduction(),  # ATM, arXiv 2505.15160
}


def merging_error(x1: Tensor, x2: Tensor, n1: Tensor, n2: Tensor) -> Tensor:
    """Error of merging tokens x1, x2 [..., C] of sizes n1, n2 [...] (ATM definition 2): [...].

    It is the sum of the cosine distances to the weighted average of the two directions, weighted by n1 and n2. It lies
    between n1 n2 / (n1 + n2) and twice that, times the cosine distance of the two (theorem 1), so that merging large
    groups costs more.
    """
    x1, x2 = (torch.nn.functional.normalize(x, dim=-1) for x in (x1, x2))
    merged = (n1.unsqueeze(-1) * x1 + n2.unsqueeze(-1) * x2) / (n1 + n2).unsqueeze(-1)

    def distance(x: Tensor) -> Tensor:
        return 1 - torch.nn.functional.cosine_similarity(x, merged, dim=-1)

    return n1 * distance(x1) + n2 * distance(x2)


def alternating(tokens: int, device: torch.device) -> Partition:
    """Makes every other token a source, starting with the second (ToMe section 3)."""
    n = torch.arange(tokens, device=device)
    return Partition(n[1::2], n[::2])
