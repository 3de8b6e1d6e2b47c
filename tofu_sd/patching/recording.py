"""Records the maps that patched blocks make."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..core.token_map import TokenMap
from .block_info import BlockInfo
from .hooks import get_argument
from .patch import Patch, states_of


@dataclass(frozen=True)
class MapRecord:
    """A map as a block made it. call: of the model, from 0. h, w: of the tokens; the map's tensors are on the CPU."""

    block: str
    call: int
    h: int
    w: int
    map: TokenMap


@contextmanager
def recording(model: nn.Module, patch: Patch) -> Iterator[list[MapRecord]]:
    """Inside, every map that the patch of a model makes is added to what this gives."""
    seen: list[MapRecord] = []
    numbers = itertools.count()
    here = threading.local()  # of a thread: the number of its call, and the sizes of the maps in it

    def begin(*_: Any) -> None:
        here.call, here.sizes = next(numbers), {}

    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here.sizes[module] = tuple(get_argument(args, kwargs, 0, "hidden_states", "x").shape[-2:])

    def watch(block: BlockInfo, map: TokenMap) -> None:
        h, w = here.sizes[block.spatial_module]
        seen.append(MapRecord(block.name, here.call, h, w, TokenMap(map.kept_idx.cpu(), map.group_idx.cpu())))

    states = states_of(patch)
    handles = [model.register_forward_pre_hook(begin)]
    handles += [
        c.register_forward_pre_hook(measure, with_kwargs=True) for c in {block.spatial_module for block in patch.blocks}
    ]
    watchers = {block.name: partial(watch, block) for block in patch.blocks}
    for name, watcher in watchers.items():
        states[name].watchers.append(watcher)
    try:
        yield seen
    finally:  # its own and no other's: contexts may end in any order
        for name, watcher in watchers.items():
            states[name].watchers.remove(watcher)
        for handle in handles:
            handle.remove()
