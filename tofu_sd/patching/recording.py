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
from .host import BlockInfo
from .patch import Patch, states_of


@dataclass(frozen=True)
class MapRecord:
    """A map as a block made it.

    Args:
        block: name of the block.
        call: index of the model's call, from 0.
        h, w: height and width of the map.
        map: on the CPU.
    """

    block: str
    call: int
    h: int
    w: int
    map: TokenMap


@contextmanager
def recording(model: nn.Module, patch: Patch) -> Iterator[list[MapRecord]]:
    """Yields a list to which every map that the patch of a model makes is appended."""
    records: list[MapRecord] = []
    calls = itertools.count()
    local = threading.local()  # of each thread: the index of its call, and the sizes of the maps in it

    def start_call(*_: Any) -> None:
        local.call, local.sizes = next(calls), {}

    def store_size(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called = patch.arguments.map_of(module, args, kwargs)
        local.sizes[module] = called.h, called.w

    def on_map(block: BlockInfo, map: TokenMap) -> None:
        h, w = local.sizes[block.spatial_module]
        records.append(MapRecord(block.name, local.call, h, w, TokenMap(map.kept_idx.cpu(), map.group_idx.cpu())))

    states = states_of(patch)
    handles = [model.register_forward_pre_hook(start_call)]
    handles += [
        module.register_forward_pre_hook(store_size, with_kwargs=True)
        for module in {block.spatial_module for block in patch.blocks}
    ]
    callbacks = {block.name: partial(on_map, block) for block in patch.blocks}
    for name, callback in callbacks.items():
        states[name].map_callbacks.append(callback)
    try:
        yield records
    finally:  # only its own: contexts may end in any order
        for name, callback in callbacks.items():
            states[name].map_callbacks.remove(callback)
        for handle in handles:
            handle.remove()
