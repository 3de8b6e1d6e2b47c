"""What one patched block does with its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..config import BlockReductions, TokenFusionConfig
from ..core.matching import count_above_threshold, get_matcher, most_similar
from ..core.partition import PartitionTensors
from ..core.proportional import key_bias
from ..core.reductions import Reduction, apply_both, apply_reduction, reduce_by_id, reduction_id, unmerge
from ..core.token_map import SizeClasses, SoftMap, TokenMap, has_equal_groups
from ..kernels.operators import is_compiling
from .host import EARLY_PATHS, BlockInfo
from .image_parts import ImagePart
from .shared_map import SharedMap
from .threads import PerThread

MergedForward = Callable[[Tensor, "Tensor | None", "TokenMap | SoftMap"], Tensor]


@dataclass
class ForwardState:
    """What one forward stores in a block for its layers.

    Args:
        grid: sources and destinations; None where nothing is merged.
        map: the map of the block's tokens.
        id_tensor: [id of the reduction]; compiled code reads the id from its length.
        kv_id_tensor: the same of the reduction of keys and values; None where it is that of the tokens.
        best: [B, S], largest cosine of each source in this call.
        num_similar: how many cosines exceeded the threshold in the step before.
        others: [M], its length is the number of image tokens that follow the map in the sequence; None for none.
        keys: [B, K, C], what keys and values are projected from while attention runs; None where it is its input.
    """

    grid: PartitionTensors | None = None
    map: TokenMap | SoftMap | None = None
    id_tensor: Tensor | None = None
    kv_id_tensor: Tensor | None = None
    best: Tensor | None = None
    num_similar: float = 0.0
    others: Tensor | None = None
    keys: Tensor | None = None


@dataclass
class Counts:
    """Calls, maps and merged calls of a block since it was patched. Compiled code does not count."""

    calls: int = 0
    maps: int = 0
    merged: int = 0


class BlockState:
    """What the swapped layers of one block share: its settings, and what each forward stores for its layers.

    Args:
        config: how tokens are merged.
        reductions: of this block's tokens, and of its keys and values.
        shared_map: the map that it shares with other blocks or steps.
        threshold: its cosine threshold; None merges a fixed number of tokens.
        layers: which of its layers run on merged tokens, in their order; by default those of the configuration.
    """

    def __init__(
        self,
        config: TokenFusionConfig,
        reductions: BlockReductions,
        shared_map: SharedMap | None = None,
        threshold: float | None = None,
        layers: tuple[str, ...] | None = None,
    ):
        self.reductions = reductions
        self.reduction_ids = _ids(reductions)
        self.separate_kv = config.separate_kv
        self.shared_map = shared_map
        self.proportional = config.proportional
        self.kv_only = config.kv_only
        self.normed = config.match_on == "normed"
        self.share_across_cfg = config.share_across_cfg
        self.layers = layers or config.layers
        self.config = config
        self.matcher = get_matcher(config.matching)
        self.threshold = threshold
        self.adaptive = threshold is not None  # compiled blocks read this, and so do not depend on the number
        self.counts = Counts()
        self.map_callbacks: list[Callable[[TokenMap], None]] = []  # called with each map, except in compiled code
        self._current = PerThread(ForwardState)

    @property
    def current(self) -> ForwardState:
        """The state of this thread's forward."""
        return self._current.get()

    def start_forward(
        self,
        grid: PartitionTensors | None,
        id_tensor: Tensor | None = None,
        kv_id_tensor: Tensor | None = None,
        others: Tensor | None = None,
    ) -> None:
        """Stores the sources and destinations of a forward that is about to run this block. See ForwardState."""
        for current in self._current.both():
            current.grid, current.map, current.others = grid, None, others
            current.id_tensor, current.kv_id_tensor = id_tensor, kv_id_tensor
        if not is_compiling():
            self.counts.calls += 1

    def update_map(self, x: Tensor) -> None:
        """Matches the block's tokens x [B, N, C], unless N is not the number of tokens in the grid."""
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
        if self.map_callbacks and current.map is not None and not is_compiling():
            for on_map in list(self.map_callbacks):
                on_map(current.map.argmax_map())

    def _match(self, x: Tensor, grid: PartitionTensors) -> TokenMap | SoftMap | None:
        if not self.share_across_cfg:
            return self._map(x, grid)
        half = self._map(x[x.shape[0] // 2 :], grid)
        return None if half is None else half.repeat_for_cfg()

    def _map(self, x: Tensor, grid: PartitionTensors) -> TokenMap | SoftMap | None:
        """Returns the map of the tokens x [B, N, C]; None if no token exceeded the threshold."""
        if not self.adaptive:
            return self.matcher(x, grid, self.config)
        pairs = most_similar(x, grid.parts, grid.windows)
        self.current.best = pairs.best
        return pairs.merged(len(grid.num_merged)) if len(grid.num_merged) else None

    def pop_map(self, layer: str, x: Tensor) -> TokenMap | SoftMap | None:
        """Returns the map by which a layer reduces x [B, N, C], or None. The last layer that uses it clears it."""
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
        """Applies the block's reduction: x [B, N, C] -> [B, K, C]."""
        return _reduce(x, map, self.reductions.tokens, self.current.id_tensor)

    def reduce_kv(self, x: Tensor, map: TokenMap | SoftMap) -> Tensor:
        """Applies the block's reduction of keys and values: x [B, N, C] -> [B, K, C]."""
        if not self.separate_kv:  # compiled blocks read this, and so do not depend on the reductions
            return self.reduce(x, map)
        return _reduce(x, map, self.reductions.kv, self.current.kv_id_tensor)

    def queries_and_keys(self, x: Tensor, map: TokenMap | SoftMap) -> tuple[Tensor, Tensor | None]:
        """Returns what attention projects x [B, N, C] from, for queries and for keys and values.

        Returns:
            (queries [B, K, C], or x where only keys and values are merged; keys [B, K, C], or None for the queries).
        """
        if self.kv_only:
            return x, self.reduce_kv(x, map)
        if not self.separate_kv:
            return self.reduce(x, map), None
        ids = self.current.id_tensor, self.current.kv_id_tensor
        if _by_id(map, x) and ids[0] is not None and ids[1] is not None:
            queries, keys = reduce_by_id(x, map.tensors, [len(ids[0]), len(ids[1])])
            return queries, keys
        return apply_both(self.reductions.tokens, self.reductions.kv, x, map)

    def needs_bias(self, map: TokenMap | SoftMap, joint: bool = False) -> bool:
        """Whether attention adds log(n_i) to its keys. Softmax cancels it where all groups have one size.

        Args:
            map: of the image tokens.
            joint: whether text tokens, which stand for one token each, are among the keys.
        """
        return self.proportional and (joint or not has_equal_groups(map, self.config.group_size))

    def key_bias(self, x: Tensor, map: TokenMap | SoftMap, sdpa: bool) -> Tensor | None:
        """Returns log(n_i) of each key as an additive mask [B, 1, K]; None without proportional attention."""
        return key_bias(map.log_size, x.dtype, sdpa, self.size_classes(map)) if self.needs_bias(map) else None

    def size_classes(self, map: TokenMap | SoftMap) -> SizeClasses | None:
        """Returns how many keys stand for how many tokens each, where that may be used; None in compiled code."""
        return None if is_compiling() else self.config.size_classes(map)

    def run_attention(
        self, x: Tensor, full: Callable[[], Tensor], merged: MergedForward, can_merge: Callable[[], bool]
    ) -> Tensor:
        """Runs self-attention of the tokens x [B, N, C] on merged tokens: [B, N, C].

        Args:
            x: the normed tokens of the block.
            full: runs the host's attention on all tokens.
            merged: (queries, keys, map) -> output. Runs the host's attention on merged tokens; keys are None where
                they are the queries.
            can_merge: whether this call can run on merged tokens. Asked only if there is a map.
        """
        if self.normed:
            self.update_map(x)
        map = self.pop_map("attn", x)
        if map is None or not can_merge():
            return full()
        queries, keys = self.queries_and_keys(x, map)
        out = merged(queries, keys, map)
        return out if self.kv_only else unmerge(out, map)

    def run_merged(self, layer: str, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Runs a token-wise layer on merged tokens: unmerge(forward(reduce(x)))."""
        map = self.pop_map(layer, x)
        return forward(x) if map is None else unmerge(forward(self.reduce(x, map)), map)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "counts": Counts(), "map_callbacks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reduction_ids = _ids(self.reductions)  # of this process


def _ids(reductions: BlockReductions) -> tuple[int, int]:
    return reduction_id(reductions.tokens), reduction_id(reductions.kv)


def _reduce(x: Tensor, map: TokenMap | SoftMap, reduction: Reduction, id_tensor: Tensor | None) -> Tensor:
    if _by_id(map, x) and id_tensor is not None:
        return reduce_by_id(x, map.tensors, [len(id_tensor)])[0]
    return apply_reduction(reduction, x, map)


def _by_id(map: TokenMap | SoftMap, x: Tensor) -> TypeGuard[TokenMap]:
    """Whether the operator of compiled code can reduce x."""
    gradient = x.requires_grad and torch.is_grad_enabled()
    return isinstance(map, TokenMap) and is_compiling() and not gradient


def recall_counts(blocks: Sequence[BlockState], part: ImagePart | None, first: bool) -> None:
    """Gives each block the number of tokens above its threshold in the step before.

    A block that did not run in that step (a cache skipped it) keeps its count. All counts are read in one transfer, so
    that a device is synchronized once a step.

    Args:
        blocks: the blocks with a threshold.
        part: the image part of this call; None where steps are not followed.
        first: whether this is the part's first step, in which no count is known.
    """
    counts: dict[int, float] = {}
    if part is not None and not first:
        waiting = [(i, part.best[i], blocks[i].threshold or 0) for i in sorted(part.best)]
        if waiting:
            device = waiting[0][1].device
            values = [count_above_threshold(best, threshold).to(device) for _, best, threshold in waiting]
            part.counts.update(zip((i for i, *_ in waiting), torch.stack(values).tolist(), strict=True))
            part.best.clear()
        counts = part.counts
    for i, block in enumerate(blocks):
        for current in block._current.both():
            current.best, current.num_similar = None, counts.get(i, 0.0)


def keep_best(blocks: Sequence[BlockState], part: ImagePart) -> None:
    """Stores the cosines of this forward in the image part, to be counted in its next step."""
    for i, block in enumerate(blocks):
        for current in block._current.both():
            if current.best is not None:
                part.best[i] = current.best
            current.best = None


def block_states(blocks: Sequence[BlockInfo], config: TokenFusionConfig) -> list[tuple[BlockInfo, BlockState]]:
    """Returns the blocks of a model that a configuration patches, each with a new state."""
    down_path = sum(block.path in EARLY_PATHS for block in blocks)
    shared_maps = dict[Any, SharedMap]()

    def shared_map(block: BlockInfo) -> SharedMap | None:
        if not config.share_across_blocks and config.match_interval == 1:
            return None
        key = block.level if config.share_across_blocks else block.name
        return shared_maps.setdefault(key, SharedMap(key))

    def state(block: BlockInfo) -> BlockState:
        reductions = config.reductions_at(block.depth, down_path)
        layers = block.merged_layers(config.layers)
        return BlockState(config, reductions, shared_map(block), config.threshold_at(block.depth), layers)

    return [(block, state(block)) for block in blocks if block.level < config.levels]
