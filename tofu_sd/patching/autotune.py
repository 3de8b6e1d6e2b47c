"""Decides on which maps tokens are merged: where that is faster, by timing the model's own attention both ways.

A decision is made once for each device, type, batch, map and method, and remembered by a `TimingCache`.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import timing_cache
from ..config import BlockReductions, TokenFusionConfig
from ..kernels.operators import is_compiling, is_dynamo_compiling
from ..timing import device_name, seconds, versions
from ..timing_cache import Timing
from .block_state import BlockState
from .host import ATTRIBUTE, Probe, run_alone
from .step_tracker import StepTracker

logger = logging.getLogger("tofu_sd")

ROUNDS = 5
BUDGET = 0.2  # seconds of timed calls, after which no further round begins
CLEAR = 1.25  # a first round that differs by this factor decides alone
_reported: set[tuple[str, int]] = set()


class MergeRule:
    """On which maps of one resolution level tokens are merged: from `min_tokens` on, or where it was measured to pay.

    Args:
        attention: a self-attention of the level.
        width: channels of its tokens.
        config: how tokens are merged.
        reductions: of its block.
        users: how many calls of blocks use one map.
        merged_class: the class that runs on merged tokens, where the attention is not of it.
        native: height and width of the level's map at the model's own size, for compiled code.
        probe: runs the attention on the tokens of a map.
    """

    def __init__(
        self,
        attention: nn.Module,
        width: int,
        config: TokenFusionConfig,
        reductions: BlockReductions,
        *,
        users: int = 1,
        merged_class: type[nn.Module] | None = None,
        native: tuple[int, int] | None = None,
        probe: Probe = run_alone,
    ):
        self.attention = attention
        self.width = width
        self.config = config
        self.reductions = reductions
        self.users = users
        self.merged_class = merged_class
        self.native = native
        self.probe = probe
        self.known: tuple[tuple[int, int, int, torch.device, torch.dtype, bool], ...] = ()
        self._register()

    def _register(self) -> None:
        # a compiled model that is patched again with the same options keeps its graph
        self.number = _numbers.setdefault((id(self.attention), self.config, self.reductions), len(_numbers))
        _rules[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    @property
    def measures(self) -> bool:
        """Whether it is measured where merging pays. Without self-attention nothing is."""
        return self.config.min_tokens == "auto" and self.config.merge_attn

    def merges(self, batch: int, h: int, w: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Returns whether h x w maps of a batch are merged. Measures, unless it is known.

        Compiled code cannot measure. When it is compiled, the model's own size is measured with two samples; maps of
        fewer tokens are not merged, and all others are if that pays. An exported model merges all.
        """
        if not self.measures:
            return h * w >= self.fewest
        if is_compiling():
            if self.native is None or not is_dynamo_compiling():
                return True
            return h * w >= math.prod(self.native) and _pays_at_native_size(self.number)
        situation = (batch, h, w, device, dtype)
        for *known, pays in self.known:
            if tuple(known) == situation:
                return bool(pays)
        pays = self._decide(*situation)
        self.known = (*self.known[-31:], (*situation, pays))
        return pays

    @property
    def fewest(self) -> int:
        """Maps of fewer tokens are never merged."""
        return 0 if self.config.min_tokens == "auto" else int(self.config.min_tokens)

    def pays(self, h: int, w: int) -> bool | None:
        """Returns the last decision on h x w maps; None before it, and where nothing is measured."""
        decisions = [pays for _, height, width, _, _, pays in self.known if (height, width) == (h, w)]
        return decisions[-1] if decisions else None

    def pays_at_native_size(self) -> bool:
        """Returns whether merging pays for two samples of the model's own size, where the weights are now."""
        weight = next(self.attention.parameters(), None)
        if self.native is None or weight is None or not weight.is_floating_point() or weight.device.type == "meta":
            return True  # nothing to measure with
        return self._decide(2, *self.native, weight.device, weight.dtype)

    def _decide(self, batch: int, h: int, w: int, device: torch.device, dtype: torch.dtype) -> bool:
        if not self.config.num_merged(h, w):
            return False
        key = self._key(batch, h, w, device, dtype)
        timing = timing_cache.cache.get(key)
        if timing is None:
            try:
                timing = self._measure(batch, h, w, device, dtype)
            except Exception as error:  # attention of a kind that was never seen, or too little memory for both ways
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                logger.warning(f"self-attention cannot be timed here, so it is merged as requested ({reason})")
                return True
            timing_cache.cache.put(key, timing)
        level = logging.INFO if timing.pays else logging.WARNING
        if (key, level) not in _reported:
            _reported.add((key, level))
            method = f"{self.config.slug} ({self.reductions.label})"
            logger.log(level, _report(timing, batch, h, w, device, method))
        return timing.pays

    def _key(self, batch: int, h: int, w: int, device: torch.device, dtype: torch.dtype) -> str:
        """Returns everything on which the time depends."""
        attention = self.attention
        shapes = " ".join("x".join(map(str, parameter.shape)) for parameter in attention.parameters())
        processor = type(getattr(attention, "processor", None)).__name__
        kind = f"{type(attention).__name__} {getattr(attention, 'heads', '')} {processor} {shapes}"
        config = replace(self.config, min_tokens=0, depth_split=None, start=0.0, end=1.0)
        options = {name: getattr(value, "__name__", value) for name, value in vars(config).items()}
        method = f"{options} {self.reductions.label} {self.users}"
        digest = hashlib.sha256(f"{kind} {method}".encode()).hexdigest()[:16]
        size = f"{batch} x {h} x {w} x {self.width}"
        return f"{device_name(device)}, {versions()}, {dtype}, {size}, {config.slug}, {digest}"

    def _measure(self, batch: int, h: int, w: int, device: torch.device, dtype: torch.dtype) -> Timing:
        """Times attention with and without merging in turns, on noise. Changes neither the model nor random states."""
        steps = StepTracker(replace(self.config, seed=None, start=0.0, end=1.0, match_interval=1, threshold=None))
        state = BlockState(replace(self.config, share_across_blocks=False), self.reductions)
        attention = copy.copy(self.attention)  # shares the weights; another thread may be running the original
        vars(attention)[ATTRIBUTE] = state
        attention.__class__ = self.merged_class or type(attention)
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(batch, h * w, self.width, device=device, dtype=dtype, generator=generator)
        grid = steps.grid(h, w, device)

        def full() -> None:
            state.start_forward(None)
            self.probe(attention, x)

        def match() -> None:
            state.start_forward(grid)
            state.update_map(x)

        def merged() -> None:
            match()
            self.probe(attention, x)

        with torch.no_grad():
            return _time(full, merged, match if self.users > 1 else None, self.users, device)


_numbers: dict[Any, int] = {}
_rules: weakref.WeakValueDictionary[int, MergeRule] = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _pays_at_native_size(number: int) -> bool:
    """Runs when code is compiled, outside of it, and is a constant there."""
    return _rules[number].pays_at_native_size()


def _time(
    full: Callable[[], None], merged: Callable[[], None], match: Callable[[], None] | None, users: int,
    device: torch.device,
) -> Timing:  # fmt: skip
    """Returns the fastest of a few interleaved rounds; a map that several calls use counts by its share."""
    merged()  # first calls compile, choose kernels and take memory
    full()
    best_full = best_merged = math.inf
    spent = 0.0
    for _ in range(ROUNDS):
        own_full, own_merged = seconds(full, device), seconds(merged, device)
        if match is not None:
            own_merged -= (1 - 1 / users) * seconds(match, device)
        best_full, best_merged = min(best_full, own_full), min(best_merged, own_merged)
        spent += own_full + own_merged
        if spent > BUDGET or not 1 / CLEAR < best_merged / best_full < CLEAR:
            break
    return Timing(best_full, max(best_merged, 1e-9))


def _report(timing: Timing, batch: int, h: int, w: int, device: torch.device, method: str) -> str:
    """Returns a sentence for the log."""
    where = f"maps of {h} x {w} tokens in batches of {batch} on {device_name(device)}"
    takes = f"self-attention takes {timing.ratio:.2f} times as long with {method}"
    return f"{where}: {takes}" + ("" if timing.pays else ", so they are not merged; min_tokens=0 merges them anyway")
