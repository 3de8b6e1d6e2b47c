"""What the layers of one classifier share in a forward: which tokens have been merged so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.reductions import Reduction, mean, mlerp, prune
from ..core.token_map import TokenMap
from .methods import AdaptiveReduction, TokenReduction


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

    def __init__(self, told: TokenReduction | AdaptiveReduction, layers: int, prefix: int):
        self.told = told
        self.layers = layers
        self.prefix = prefix
        self.begun = 0  # patch tokens of a picture
        self.keys: Tensor | None = None  # [B, N, d] of the layer that runs, averaged over the heads
        self.total: TokenMap | None = None  # of the patch tokens the model began with
        self.last = -1  # the layer that ran last
        self.watcher: Callable[[int, TokenMap], None] | None = None  # is shown the total map behind what fuses

    def begin(self, layer: int, x: Tensor) -> None:
        """A layer is about to run on the tokens x [B, N, C]. RuntimeError where it is not the next one."""
        if layer == 0:
            self.total = None
            self.begun = x.shape[1] - self.prefix
        elif layer != self.last + 1:  # the maps of the layers before it are gone, or are another call's
            raise RuntimeError(
                f"layer {layer} of a patched model ran after layer {self.last}: its layers run in turn, and gradient "
                "checkpoints run them again; set_grad_checkpointing(False), or remove_patch"
            )
        self.last = layer

    def bias(self, x: Tensor) -> Tensor | None:
        """log(n_i) for the keys of the tokens x, as attention's mask [B, 1, 1, N]; None where nothing is weighted."""
        if self.total is None or not self.told.proportional:
            return None
        size = torch.cat([self.total.size.new_ones(len(x), self.prefix), self.total.size], dim=1)
        return size.log().to(x.dtype)[:, None, None]

    def reduce(self, layer: int, x: Tensor) -> Tensor:
        """The tokens x [B, N, C] after a layer's attention, fewer."""
        keys, self.keys = self.keys, None
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        if self.told.ends(layer, self.layers):
            return prefix
        if keys is None:
            return x
        map = self.told.map(layer, self.layers, self.begun, keys[:, self.prefix :], self.total)
        if map is None:
            return x
        size = patches.new_ones(patches.shape[:2]) if self.total is None else self.total.size
        fused = reduce_sized(self.told.reduction(layer), patches, map, size)
        self.total = map if self.total is None else self.total.compose(map)
        if self.watcher is not None:
            self.watcher(layer, self.total)
        return torch.cat([prefix, fused], dim=1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "keys": None, "total": None, "last": -1, "watcher": None}
