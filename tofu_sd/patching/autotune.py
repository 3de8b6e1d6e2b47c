"""Measures from how many tokens on merging is faster: on the model's own attention, once for each device and kind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import BlockReductions, TokenFusionConfig
from .block_state import BlockState
from .host import ATTRIBUTE
from .patch import Patch, patch_of
from .step_tracker import StepTracker

SIDES = (8, 12, 16, 24, 32, 48, 64, 96, 128)
BUDGET = 1.0  # timed seconds for one kind of attention; the size that exceeds it is the last
REPEATS = 3  # of each size, of which the first warms up and compiles
_measured: dict[tuple[Any, ...], int] = {}


def break_even(model: nn.Module) -> dict[int, int]:
    """Returns, for each level that a patch merges, from how many tokens on its merged self-attention is faster.

    It takes about a second for each kind of attention on each device, once in a process. Every block is measured with a
    matching of its own; blocks that share a map are faster from fewer tokens on than this says.

    Args:
        model: a patched UNet.

    Raises:
        ValueError: the weights are not where they will run, or not of the type in which they will run.
    """
    patch = patch_of(model)
    assert patch is not None
    config = replace(patch.config, min_tokens=0)
    sizes: dict[int, int] = {}
    for level, (attention, width, reductions) in _first_attention_of_levels(patch).items():
        _check_measurable(model, attention)
        key = _cache_key(attention, config, reductions)
        if key not in _measured:
            _measured[key] = _measure(attention, width, config, reductions)
        sizes[level] = _measured[key]
    return sizes


def _first_attention_of_levels(patch: Patch) -> dict[int, tuple[nn.Module, int, BlockReductions]]:
    """Returns the first self-attention of each level, with the width of its tokens and its reductions."""
    blocks = {block.layers["attn"]: block for block in patch.blocks}
    first: dict[int, tuple[nn.Module, int, BlockReductions]] = {}
    for layer, _, _, state in patch.swaps:
        if layer in blocks:
            first.setdefault(blocks[layer].level, (layer, blocks[layer].width, state.reductions))
    return first


def _check_measurable(model: nn.Module, attention: nn.Module) -> None:
    """Raises ValueError where the time of an attention cannot be measured now."""
    weight = next(attention.parameters(), None)
    if weight is None:
        raise ValueError(
            "min_tokens is 'auto', which measures with tokens of the weights' type, and this model's attention has "
            "no weights of its own (it is quantized): give a number of tokens"
        )
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(
            f"min_tokens is 'auto', which measures with tokens of the weights' type, and these are {weight.dtype}: "
            "give a number of tokens"
        )
    if weight.device.type == "meta" or any("_hf_hook" in vars(module) for module in model.modules()):
        raise ValueError(
            "min_tokens is 'auto', which measures where the model runs; offloading decides that later: give a "
            "number of tokens, or apply the patch before offloading is set up"
        )


def _cache_key(attention: nn.Module, config: TokenFusionConfig, reductions: BlockReductions) -> tuple[Any, ...]:
    """Returns everything on which the time of an attention depends."""
    weight = next(attention.parameters())
    device = torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else weight.device.type
    shapes = tuple(parameter.shape for parameter in attention.parameters())
    processor = type(getattr(attention, "processor", None))
    return device, weight.dtype, shapes, getattr(attention, "heads", None), processor, config, reductions


def _measure(attention: nn.Module, width: int, config: TokenFusionConfig, reductions: BlockReductions) -> int:
    """Returns the smaller of the first two successive sizes at which merging is faster.

    If there are none, one token more than the largest size tried.
    """
    weight = next(attention.parameters())
    state = BlockState(config, reductions)
    steps = StepTracker(replace(config, seed=None, start=0.0, end=1.0, match_interval=1))
    generator = torch.Generator(weight.device).manual_seed(0)
    own, faster_from, tokens, spent = getattr(attention, ATTRIBUTE), None, 0, 0.0
    setattr(attention, ATTRIBUTE, state)
    try:
        for side in SIDES:
            tokens = side * side
            x = torch.randn(2, tokens, width, device=weight.device, dtype=weight.dtype, generator=generator)
            full, merged, seconds = _time_pair(attention, state, x, steps.grid(side, side, weight.device))
            spent += seconds
            if merged < full and faster_from is not None:
                return faster_from
            faster_from = tokens if merged < full else None
            if spent > BUDGET:
                break
    finally:
        setattr(attention, ATTRIBUTE, own)
    return tokens + 1 if faster_from is None else faster_from


@torch.no_grad()
def _time_pair(attention: nn.Module, state: BlockState, x: torch.Tensor, grid: Any) -> tuple[float, float, float]:
    """Times full and merged attention of x [B, N, C], interleaved: (fastest full, fastest merged, all), in seconds."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(REPEATS):
        for merge in (False, True):

            def run(merge: bool = merge, x: Any = x, grid: Any = grid) -> None:
                state.start_forward(grid if merge else None)
                if not state.normed:
                    state.update_map(x)
                attention(x)

            times[merge].append(_seconds(run, x.device))
    full, merged = times[False][1:], times[True][1:]
    return min(full), min(merged), sum(full) + sum(merged)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits until a device has finished its work."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
