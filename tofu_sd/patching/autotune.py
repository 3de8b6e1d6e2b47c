"""From how many tokens on fusing pays: measured on the model's own attention, once for each device and kind of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import TokenFusionConfig
from ..core.reductions import Reduction
from .block_info import ATTRIBUTE
from .block_state import BlockState
from .patch import patch_of
from .step_tracker import StepTracker

SIDES = (8, 12, 16, 24, 32, 48, 64, 96, 128)
BUDGET = 1.0  # timed seconds for one kind of attention; the size that exceeds it is the last
_measured: dict[tuple[Any, ...], int] = {}


def break_even(model: nn.Module) -> dict[int, int]:
    """For each level that a model's patch fuses: from how many tokens on its fused self-attention is the faster one.

    About a second for each kind of attention on each device, and nothing from then on. Every block is taken to match
    for itself; blocks that share a map pay from fewer tokens on than this says. ValueError where the weights are not
    where, or not of the type in which, they will run.
    """
    patch = patch_of(model)
    assert patch is not None
    fusion = replace(patch.fusion, min_tokens=0)
    found: dict[int, int] = {}
    for part, _, _, state in patch.swaps:
        block = next(block for block in patch.blocks if part in block.layers.values())
        if block.level in found or part is not block.layers["attn"]:
            continue
        weight = next(part.parameters(), None)
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
        processor = type(getattr(part, "processor", None))
        shapes = tuple(parameter.shape for parameter in part.parameters())
        key = (
            _name(weight.device),
            weight.dtype,
            shapes,
            getattr(part, "heads", None),
            processor,
            fusion,
            state.reduction,
        )
        if key not in _measured:
            _measured[key] = _measure(part, block.width, fusion, state.reduction)
        found[block.level] = _measured[key]
    return found


def _measure(attention: nn.Module, width: int, fusion: TokenFusionConfig, reduction: Reduction) -> int:
    """The first of two sizes in a row at which fusing was faster; one token more than the largest tried if none was."""
    weight = next(attention.parameters())
    state = BlockState(fusion, reduction)
    steps = StepTracker(replace(fusion, seed=None, start=0.0, end=1.0, match_interval=1))
    generator = torch.Generator(weight.device).manual_seed(0)
    own, pays, tokens = getattr(attention, ATTRIBUTE), None, 0
    setattr(attention, ATTRIBUTE, state)
    spent = 0.0
    try:
        with torch.no_grad():
            for side in SIDES:
                tokens = side * side
                x = torch.randn(2, tokens, width, device=weight.device, dtype=weight.dtype, generator=generator)
                grid = steps.grid(side, side, weight.device)
                times: dict[bool, float] = {}
                for turn, fused in enumerate((False, True) * 3):  # in turns; the first pair warms up and compiles

                    def run(fused: bool = fused, x: Any = x, grid: Any = grid) -> None:
                        state.begin(grid if fused else None, None)
                        if not state.normed:
                            state.update_map(x)
                        attention(x)

                    seconds = _seconds(run, weight.device)
                    if turn > 1:
                        times[fused] = min(seconds, times.get(fused, float("inf")))
                        spent += seconds
                if times[True] < times[False] and pays is not None:
                    return pays
                pays = tokens if times[True] < times[False] else None
                if spent > BUDGET:
                    break
    finally:
        setattr(attention, ATTRIBUTE, own)
    return tokens + 1 if pays is None else pays


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
