"""State of a classifier's forward that its layers share: which tokens have been merged so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.reductions import Reduction, mean, mlerp, prune
from ..core.token_map import TokenMap
from .methods import AdaptiveReduction, TokenReduction


def reduce_sized(reduction: Reduction, x: Tensor, map: TokenMap, size: Tensor) -> Tensor:
    """Reduces tokens x [B, N, C] that stand for `size` [B, N] tokens each; averages are weighted by size.

    MLERP takes the direction of that average and the largest norm of the tokens (ToFu Eq. 10).
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
    """State of a forward that the layers of one model share.

    Args:
        method: how tokens are merged.
        layers: number of layers.
        prefix: number of tokens before the patch tokens (class, distillation, registers); these are never merged.
    """

    def __init__(self, method: TokenReduction | AdaptiveReduction, layers: int, prefix: int):
        self.method = method
        self.layers = layers
        self.prefix = prefix
        self.initial = 0  # patch tokens before the first layer
        self.keys: Tensor | None = None  # [B, N, d] of the layer that runs, averaged over the heads
        self.total: TokenMap | None = None  # map of all layers so far, of the initial patch tokens
        self.last = -1  # the layer that ran last
        self.on_map: Callable[[int, TokenMap], None] | None = None  # called with each layer that merges and `total`

    def start_layer(self, layer: int, x: Tensor) -> None:
        """Starts a layer on the tokens x [B, N, C]. RuntimeError where it is not the next one."""
        if layer == 0:
            self.total = None
            self.initial = x.shape[1] - self.prefix
        elif layer != self.last + 1:  # the maps of earlier layers are missing, or belong to another call
            raise RuntimeError(
                f"layer {layer} of a patched model ran after layer {self.last}: its layers must run in order, and "
                "gradient checkpoints run them again; set_grad_checkpointing(False), or remove_patch"
            )
        self.last = layer

    def bias(self, x: Tensor) -> Tensor | None:
        """Returns log(n_i) of each key as an attention mask [B, 1, 1, N]; None without proportional attention."""
        if self.total is None or not self.method.proportional:
            return None
        size = torch.cat([self.total.size.new_ones(len(x), self.prefix), self.total.size], dim=1)
        return size.log().to(x.dtype)[:, None, None]

    def reduce(self, layer: int, x: Tensor) -> Tensor:
        """Reduces the tokens x [B, N, C] after a layer's attention: [B, K, C]."""
        keys, self.keys = self.keys, None
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        if self.method.drops_patches(layer, self.layers):
            return prefix
        if keys is None:
            return x
        map = self.method.map(layer, self.layers, self.initial, keys[:, self.prefix :], self.total)
        if map is None:
            return x
        size = patches.new_ones(patches.shape[:2]) if self.total is None else self.total.size
        merged = reduce_sized(self.method.reduction_at(layer), patches, map, size)
        self.total = map if self.total is None else self.total.compose(map)
        if self.on_map is not None:
            self.on_map(layer, self.total)
        return torch.cat([prefix, merged], dim=1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "keys": None, "total": None, "last": -1, "on_map": None}
