"""What the patches of UNets and of transformers share: the step of a call, and the graphs of compiled models.

Nothing of ComfyUI, Forge and reForge is imported here.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ...config import TokenFusionConfig
from ...core.token_map import TokenMap
from ...patching.autotune import MergeRule
from ...patching.block_state import BlockState
from ...patching.host import BlockInfo
from ..ldm import Place
from .call_state import CallState, unet_rule

logger = logging.getLogger("tofu_sd")
KEY = "tofu_sd"  # in the options of a call: what is known of it before its blocks run
# why a block is not merged
OUTSIDE = "the step lies outside start_percent..end_percent"
SMALL = "the map has fewer tokens than min_tokens"
SLOWER = "merging is not faster on this map"
UNKNOWN = "the size of the map is unknown"
FEW = "no token is to be merged"

_numbers = itertools.count(1)
Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Makes compiled code call a function without tracing it. A decorator."""
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class _CallStates(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[torch.device, CallState] = {}


class ModelPatches:
    """The functions that a patched model calls. All clones of the model share them.

    They hold only settings. The state of a call is in its options or in a CallState, as programs with several devices
    call them from several threads. Compiled code does not trace them, as the map depends on the step.

    Args:
        config: how tokens are merged.
        blocks: the model's blocks, by place.
        percent_to_sigma: the noise level at a share of the sampling, where the model does not provide it at run time.
        plain: the program's own attention(q, k, v, heads, options).
        on_map: called with every map: (place, map, h, w).
    """

    warned: tuple[str, ...] = ()  # reasons that are logged as a warning, once each

    def __init__(
        self,
        config: TokenFusionConfig,
        blocks: Mapping[Place, BlockInfo],
        percent_to_sigma: Callable[[float], float] | None = None,
        plain: Callable[..., Tensor] | None = None,
        on_map: Callable[[Place, TokenMap, int, int], None] | None = None,
    ):
        self.number = next(_numbers)
        self.config = config
        self.blocks = dict(blocks)
        self.percent_to_sigma = percent_to_sigma
        self.plain = plain
        self.on_map = on_map
        self.reasons: set[str] = set()  # why blocks were not merged
        self._call_states = _CallStates()
        self.places = tuple(self._new_call_state().states)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelPatches:
        """Returns itself: programs copy patches for every node, and must not copy the model with them."""
        return self

    def recording(self, on_map: Callable[[Place, TokenMap, int, int], None]) -> ModelPatches:
        """Returns patches with the same settings that call `on_map` with every map."""
        return type(self)(self.config, self.blocks, self.percent_to_sigma, self.plain, on_map)

    def rule_of(self, block: BlockInfo, state: BlockState) -> MergeRule:
        """Returns on which maps a block is merged."""
        return unet_rule(block, state)

    def _new_call_state(self) -> CallState:
        return CallState(self.config, self.blocks, self.rule_of)

    def _call_state(self, device: torch.device) -> CallState:
        states = self._call_states.by_device
        if device not in states:
            states[device] = self._new_call_state()
        return states[device]

    def _window(self, percent_to_sigma: Callable[[float], float] | None) -> tuple[float, float]:
        if percent_to_sigma is None or (self.config.start, self.config.end) == (0, 1):
            return math.inf, -math.inf
        return percent_to_sigma(self.config.start), percent_to_sigma(self.config.end)

    def _reason_of_rule(self, place: Place, x: Tensor, size: tuple[int, int], state: CallState) -> str | None:
        """Returns why merging is not wanted on a map of x [B, N, C], or None."""
        rule = state.rules[place]
        if rule.merges(x.shape[0], *size, x.device, x.dtype):
            return None
        return SLOWER if rule.measures else SMALL

    def _skip(self, reason: str) -> None:
        """Stores why a block is not merged, and warns once where another node is the reason."""
        if reason in self.warned and reason not in self.reasons:
            logger.warning(f"Token Fusion skips blocks: {reason}")
        self.reasons.add(reason)


def percent_to_sigma_of(execute: Any, otherwise: Callable[[float], float] | None) -> Callable[[float], float] | None:
    """Returns percent_to_sigma of the model that a wrapper's `execute` runs, as other nodes may have changed it."""
    sampling = getattr(getattr(execute, "class_obj", None), "model_sampling", None)
    return getattr(sampling, "percent_to_sigma", otherwise)


# --- compiled models --------------------------------------------------------------------------------------------------

_compiled_for: list[int] = [0]


def forget_graphs(patches: ModelPatches) -> None:
    """Drops the graphs that torch.compile has made for other patches.

    Programs compile a model without guards on its patches, so that such a graph would run instead of these patches.
    """
    compiled = torch._dynamo.convert_frame.FRAME_COUNTER > 0
    if compiled and _compiled_for[0] != patches.number:
        torch._dynamo.reset()
    _compiled_for[0] = patches.number


@contextmanager
def graphs_of(patches: ModelPatches) -> Iterator[None]:
    """Gives a compiled model separate graphs inside a `with` block.

    Every graph of torch.compile is guarded by the state of autocast, whose cache has no other effect here. Switching it
    separates the graphs with these patches from those without.
    """
    forget_graphs(patches)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(not cached)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
