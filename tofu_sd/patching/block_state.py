"""What one patched block does with its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import TokenFusionConfig
from ..core.matching import count_above_threshold, get_matcher, most_similar
from ..core.partition import PartitionTensors
from ..core.proportional import key_bias
from ..core.reductions import Reduction, fuse, reduction_id, unmerge
from ..core.token_map import SoftMap, TokenMap
from ..kernels.operators import is_compiling
from .block_info import BlockInfo
from .image_parts import ImagePart
from .per_thread import PerThread
from .shared_map import SharedMap


@dataclass
class ForwardState:
    """What one forward leaves in a block for its layers.

    as_length: [number of the reduction], from which compiled code reads it. best: [B, S], cosines of the call. alike:
    how many exceeded the threshold in the step before.
    """

    grid: PartitionTensors | None = None
    map: TokenMap | SoftMap | None = None
    reduction_id_tensor: Tensor | None = None
    best: Tensor | None = None
    num_similar: float = 0.0


@dataclass
class Counts:
    """What a block has done since it was patched, outside of compiled code. merged: calls that ran on fewer tokens."""

    calls: int = 0
    maps: int = 0
    merged: int = 0


class BlockState:
    """What the swapped-in modules of one site share: fixed choices, and what each forward leaves for its layers."""

    def __init__(
        self,
        fusion: TokenFusionConfig,
        reduction: Reduction,
        shared_map: SharedMap | None = None,
        threshold: float | None = None,
    ):
        self.reduction = reduction
        self.number = reduction_id(reduction)
        self.shared_map = shared_map
        self.proportional = fusion.proportional
        self.kv_only = fusion.kv_only
        self.normed = fusion.match_on == "normed"
        self.share_across_cfg = fusion.share_across_cfg
        self.layers = fusion.layers
        self.config = fusion
        self.matcher = get_matcher(fusion.matching)
        self.threshold = threshold
        self.adaptive = threshold is not None  # what a block asks: it shall not depend on the number
        self.counts = Counts()
        self.watchers: list[Callable[[TokenMap], None]] = []  # are shown every map, but by compiled code
        self._current = PerThread(ForwardState)

    @property
    def current(self) -> ForwardState:
        """What this thread's forward has left here."""
        return self._current.get()

    def begin(self, grid: PartitionTensors | None, reduction_id_tensor: Tensor | None) -> None:
        """Takes the layout of a forward that comes to this block."""
        for current in self._current.both():
            current.grid, current.map, current.reduction_id_tensor = grid, None, reduction_id_tensor
        if not is_compiling():
            self.counts.calls += 1

    def update_map(self, x: Tensor) -> None:
        """Finds the map of the tokens x [B, N, C] of the block, where the layout fits them."""
        current = self.current
        current.map = None
        grid = current.grid
        if grid is None or x.shape[1] != len(grid.parts.src) + len(grid.parts.dst):
            return
        slot = None if self.shared_map is None else self.shared_map.slots.get()
        if slot is not None and slot.map is not None and slot.map.before == x.shape[:2]:
            current.map = slot.map
        else:
            current.map = self._match(x, grid)
            if not is_compiling():
                self.counts.maps += current.map is not None
            if slot is not None:
                slot.map, slot.made = current.map, True
        if self.watchers and current.map is not None and not is_compiling():
            for watcher in list(self.watchers):
                watcher(current.map.argmax_map())

    def _match(self, x: Tensor, grid: PartitionTensors) -> TokenMap | SoftMap | None:
        if not self.share_across_cfg:
            return self._map(x, grid)
        half = self._map(x[x.shape[0] // 2 :], grid)
        return None if half is None else half.repeat_for_cfg()

    def _map(self, x: Tensor, grid: PartitionTensors) -> TokenMap | SoftMap | None:
        """The map of the tokens x [B, N, C]; None where a threshold lets none leave."""
        if not self.adaptive:
            return self.matcher(x, grid, self.config)
        pairs = most_similar(x, grid.parts, grid.windows)
        self.current.best = pairs.best
        return pairs.fused(len(grid.num_merged)) if len(grid.num_merged) else None

    def take(self, layer: str, x: Tensor) -> TokenMap | SoftMap | None:
        """The map to fuse x with in the layer `layer`, if any. The last layer to take it lets go of it."""
        current = self.current
        map = current.map
        if layer == self.layers[-1]:
            current.map = None
        if layer not in self.layers or map is None or map.before != x.shape[:2]:
            return None
        if not is_compiling():
            self.counts.merged += layer == self.layers[0]
        return map

    def reduce(self, x: Tensor, map: TokenMap | SoftMap) -> Tensor:
        """The site's reduction of x [B, N, C]: [B, K, C]."""
        gradient = x.requires_grad and torch.is_grad_enabled()
        if isinstance(map, TokenMap) and is_compiling() and not gradient:
            reduction_id_tensor = self.current.reduction_id_tensor
            if reduction_id_tensor is not None:
                return fuse(x, map.kept_idx, map.group_idx, len(reduction_id_tensor))
        return self.reduction(x, map)

    def key_bias(self, x: Tensor, map: TokenMap | SoftMap, sdpa: bool) -> Tensor | None:
        """log(n_i) for each key as an additive mask [B, 1, K], or None where attention is not weighted."""
        return key_bias(map.size, x.dtype, sdpa) if self.proportional else None

    def run_merged(self, layer: str, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Runs a token-wise layer on merged tokens: unmerge(forward(reduce(x)))."""
        map = self.take(layer, x)
        return forward(x) if map is None else unmerge(forward(self.reduce(x, map)), map)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "counts": Counts(), "watchers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.number = reduction_id(self.reduction)  # in this process


def recall_counts(blocks: Sequence[BlockState], part: ImagePart | None, first: bool) -> None:
    """Hands each site the count of tokens above its threshold in the step before; none is known at a `first` step.

    A block that did not run in that step (a cache passed it over) keeps its count. All counts are read at once, so that
    a device is waited for once a step.
    """
    counts: dict[int, float] = {}
    if part is not None and not first:
        waiting = [(i, part.best[i], blocks[i].threshold or 0) for i in sorted(part.best)]
        if waiting:
            device = waiting[0][1].device
            found = torch.stack(
                [count_above_threshold(best, threshold).to(device) for _, best, threshold in waiting]
            ).tolist()
            part.counts.update(zip((i for i, *_ in waiting), found, strict=True))
            part.best.clear()
        counts = part.counts
    for i, block in enumerate(blocks):
        for current in block._current.both():
            current.best, current.num_similar = None, counts.get(i, 0.0)


def keep_best(blocks: Sequence[BlockState], part: ImagePart) -> None:
    """Leaves the cosines of this forward to the image part, for the count of its next step."""
    for i, block in enumerate(blocks):
        for current in block._current.both():
            if current.best is not None:
                part.best[i] = current.best
            current.best = None


def fusions(blocks: Sequence[BlockInfo], fusion: TokenFusionConfig) -> list[tuple[BlockInfo, BlockState]]:
    """Those of a model's sites that are fused under `fusion`, each with what it does."""
    down_path = sum(block.path == "down" for block in blocks)
    shared_maps = dict[Any, SharedMap]()

    def shared_map(block: BlockInfo) -> SharedMap | None:
        if not fusion.share_across_blocks and fusion.match_interval == 1:
            return None
        key = block.level if fusion.share_across_blocks else block.name
        return shared_maps.setdefault(key, SharedMap(key))

    def state(block: BlockInfo) -> BlockState:
        reduction = fusion.reduction(block.depth, down_path)
        return BlockState(fusion, reduction, shared_map(block), fusion.threshold_at(block.depth))

    return [(block, state(block)) for block in blocks if block.level < fusion.levels]
