"""Forward hooks that give the blocks what depends on the step and the size of the map."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.operators import is_compiling, refuse_export
from .autotune import MergeRule
from .block_state import BlockState, keep_best, recall_counts
from .host import ArgumentNames
from .shared_map import SharedMap
from .step_tracker import StepTracker
from .threads import OneAtATime, PerThread, has_compiled


class _StepHook:
    """Forward pre-hook of the model: sets the step, and loads what earlier steps of the image part stored.

    Args:
        steps: is given the timestep of each call.
        shared_maps: the maps that blocks or steps share.
        adaptive: the blocks that have a threshold.
        arguments: where the model takes its timestep, latent and conditioning.
    """

    def __init__(
        self,
        steps: StepTracker,
        shared_maps: Sequence[SharedMap],
        adaptive: Sequence[BlockState],
        arguments: ArgumentNames,
    ):
        self.steps = steps
        self.shared_maps = shared_maps
        self.adaptive = adaptive
        self.arguments = arguments

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now, names = self.steps.now, self.arguments
        timestep = names.timestep.get(args, kwargs)
        if timestep is not None:  # without one the model itself raises
            self.steps.start_step(timestep, names.latent.get(args, kwargs), names.conditioning.get(args, kwargs))
        for shared_map in self.shared_maps:
            shared_map.load(now)
        if self.adaptive:
            recall_counts(self.adaptive, now.part, now.is_first_step)


class _StepEndHook:
    """Forward hook of the model: stores what later steps of the image part use."""

    def __init__(self, step_hook: _StepHook):
        self.step_hook = step_hook

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        part = self.step_hook.steps.now.part
        if part is None:
            return
        for shared_map in self.step_hook.shared_maps:
            shared_map.store(part)
        keep_best(self.step_hook.adaptive, part)


class _GuidanceHook:
    """Forward pre-hook of the model under `share_across_cfg`: the two halves of the batch must be the same latents.

    Pipelines with guidance repeat the latents for the negative and the positive prompt. Without guidance the halves are
    different images. A batch is compared once for each conditioning tensor, as comparing synchronizes the device.
    """

    def __init__(self, arguments: ArgumentNames) -> None:
        self.arguments = arguments
        self._checked = PerThread(list[Any])  # [weak reference to the conditioning, shape] of the last batch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = self.arguments.latent.get(args, kwargs)
        conditioning = self.arguments.conditioning.get(args, kwargs)
        if not isinstance(x, Tensor):
            return  # the model itself raises
        if len(x) % 2:
            raise ValueError(
                f"share_across_cfg needs two equal halves of the batch, which has {len(x)} samples: {_GUIDANCE}"
            )
        first, second = x.chunk(2)
        if is_compiling():
            torch._assert_async((first == second).all(), f"share_across_cfg: {_GUIDANCE}")
            return
        checked = self._checked.get()
        if checked and checked[0]() is conditioning and checked[1] == x.shape:
            return
        if not torch.equal(first, second):
            raise ValueError(
                f"share_across_cfg needs two equal halves of the batch, and these {len(x)} differ: {_GUIDANCE}"
            )
        if conditioning is not None:
            checked[:] = [weakref.ref(conditioning), x.shape]


_GUIDANCE = "the pipeline must run the negative and the positive prompt in one batch (guidance above 1); leave it off"


class _PartitionHook:
    """Forward pre-hook of a spatial module: gives its blocks the sources and destinations of this step.

    Args:
        steps: makes the grids.
        groups: the patched blocks in this module, by the rule that says on which maps they are merged.
        arguments: where the module takes its map [B, C, h, w].
    """

    def __init__(self, steps: StepTracker, groups: list[tuple[MergeRule, list[BlockState]]], arguments: ArgumentNames):
        self.steps = steps
        self.groups = groups
        self.arguments = arguments
        self.one_at_a_time = OneAtATime()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_compiling() and threading.active_count() > 1 and has_compiled(module):
            self.one_at_a_time.hold(module)
        batch, h, w, device, dtype, after = self.arguments.map_of(module, args, kwargs)
        grid = self.steps.grid(h, w, device)
        others = self.steps.length(after, device) if after else None
        for rule, blocks in self.groups:
            merges = grid is not None and rule.merges(batch, h, w, device, dtype)
            if merges:
                refuse_export()
            for block in blocks:
                own = grid if merges else None
                if own is not None and block.adaptive:
                    own = self.steps.limited(own, block.current.num_similar)
                tokens, kv = block.reduction_ids
                kv_id_tensor = self.steps.length(kv, device) if block.separate_kv else None
                block.start_forward(own, self.steps.length(tokens, device), kv_id_tensor, others)


Hook = _StepHook | _PartitionHook | _GuidanceHook
