"""Forward hooks that hand the blocks what belongs to the step and the size of the map."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.operators import is_compiling, refuse_export
from .block_state import BlockState, keep_best, recall_counts
from .one_at_a_time import OneAtATime, has_compiled
from .per_thread import PerThread
from .shared_map import SharedMap
from .step_tracker import StepTracker


def get_argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, *names: str) -> Any:
    """An argument of a host's module, by any of the names that hosts have for it, or by its place; None if neither."""
    named = next((kwargs[name] for name in names if name in kwargs), None)
    return args[place] if named is None and len(args) > place else named


class _StepHook:
    """Forward pre-hook of the model: notes the step, and recalls what earlier steps of the image part left."""

    def __init__(self, steps: StepTracker, shared_maps: Sequence[SharedMap], adaptive: Sequence[BlockState]):
        self.steps = steps
        self.shared_maps = shared_maps
        self.adaptive = adaptive  # the sites that have a threshold

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = self.steps.now
        timestep = get_argument(args, kwargs, 1, "timestep", "timesteps")
        if timestep is not None:  # else the model itself says what it lacks
            content = get_argument(args, kwargs, 0, "sample", "x")
            self.steps.tick(timestep, content, get_argument(args, kwargs, 2, "encoder_hidden_states", "context"))
        for shared_map in self.shared_maps:
            shared_map.begin(now)
        if self.adaptive:
            recall_counts(self.adaptive, now.part, now.is_first_step)


class _StepEndHook:
    """Forward hook of the model: leaves what this step found to the later steps of the image part."""

    def __init__(self, tick: _StepHook):
        self.tick = tick

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        part = self.tick.steps.now.part
        if part is None:
            return
        for shared_map in self.tick.shared_maps:
            shared_map.end(part)
        keep_best(self.tick.adaptive, part)


class _GuidanceHook:
    """Forward pre-hook of the model under `share_across_cfg`: the two halves of the batch must be the same latents.

    Pipelines with guidance repeat the latents for the negative and the positive prompt; without guidance the halves are
    different images. A batch is looked at once for each conditioning tensor, as it makes the device wait.
    """

    def __init__(self) -> None:
        self._checked = PerThread(list[Any])  # [weak reference to the conditioning, shape] of the last batch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = get_argument(args, kwargs, 0, "sample", "x")
        shown = get_argument(args, kwargs, 2, "encoder_hidden_states", "context")
        if not isinstance(x, Tensor):
            return  # the model itself says what it lacks
        if len(x) % 2:
            raise ValueError(
                f"share_across_cfg needs two equal halves of the batch, which has {len(x)} samples: {_GUIDANCE}"
            )
        first, second = x.chunk(2)
        if is_compiling():
            torch._assert_async((first == second).all(), f"share_across_cfg: {_GUIDANCE}")
            return
        checked = self._checked.get()
        if checked and checked[0]() is shown and checked[1] == x.shape:
            return
        if not torch.equal(first, second):
            raise ValueError(
                f"share_across_cfg needs two equal halves of the batch, and these {len(x)} differ: {_GUIDANCE}"
            )
        if shown is not None:
            checked[:] = [weakref.ref(shown), x.shape]


_GUIDANCE = "the pipeline must run the negative and the positive prompt in one batch (guidance above 1); leave it off"


class _PartitionHook:
    """Forward pre-hook of what sees the 4-D map: hands its sites this step's sources and destinations."""

    def __init__(self, steps: StepTracker, blocks: list[BlockState], level: int, least: int):
        self.steps = steps
        self.blocks = blocks
        self.level = level
        self.least = least  # tokens, under which the map is left alone
        self.one_at_a_time = OneAtATime()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_compiling() and threading.active_count() > 1 and has_compiled(module):
            self.one_at_a_time.hold(module)
        x = get_argument(args, kwargs, 0, "hidden_states", "x")
        h, w = x.shape[-2:]
        grid = self.steps.grid(h, w, x.device) if h * w >= self.least else None
        if grid is not None:
            refuse_export()
        for block in self.blocks:
            mine = grid
            if grid is not None and block.adaptive:
                mine = self.steps.limited(grid, block.current.num_similar)
            block.begin(mine, self.steps.length(block.number, x.device))


Hook = _StepHook | _PartitionHook | _GuidanceHook
