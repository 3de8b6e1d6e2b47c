"""The functions that ComfyUI, Forge and reForge call around every self-attention of a patched UNet.

Nothing of these programs is imported here.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ...config import TokenFusionConfig
from ...core.proportional import proportional_attention
from ...core.reductions import unmerge
from ...core.token_map import TokenMap, has_equal_groups
from ...patching.host import BlockInfo
from ..ldm import Place
from .call_state import CallState, Options, map_size, place_of

logger = logging.getLogger("tofu_sd")
KEY = "tofu_sd"  # in the options: the Call that `prepare` stores
MAP = "tofu_sd_map"  # in the options: the map of the block that is running
# why a block is not merged
OUTSIDE = "the step lies outside start_percent..end_percent"
SMALL = "the map has fewer tokens than min_tokens"
SLOWER = "merging is not faster on this map"
UNKNOWN = "the size of the map is unknown"
FEW = "no token is to be merged"
CHANGED = "another node changes the tokens of its self-attention first (as HyperTile and TomePatchModel do)"
REPLACED = "another node replaces its self-attention (as PAG, SEG and SAG do)"
ALTERED = "another node replaces a `forward` in it (as reference ControlNets do)"
WARNED = (CHANGED, REPLACED, ALTERED)  # reasons that are logged as a warning, once each


class Call(NamedTuple):
    """What is known of one call of the model before its blocks run.

    Args:
        replaced: places where another node's function replaces self-attention.
        sigmas: the first and last noise level at which tokens are merged.
        started: whether the step of this call has been set.
    """

    replaced: frozenset[Place]
    sigmas: tuple[float, float]
    started: bool = False


_numbers = itertools.count(1)
Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Makes compiled code call a function without tracing it. A decorator."""
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class _CallStates(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[torch.device, CallState] = {}


class AttentionPatches:
    """The functions that a patched model calls. All clones of the model share them.

    They hold only settings. The state of a call is in its options or in a CallState, as programs with several devices
    call them from several threads. Compiled code does not trace them, as the map depends on the step.

    Args:
        config: how tokens are merged.
        blocks: the model's blocks, by place.
        percent_to_sigma: the noise level at a share of the sampling, where the model does not provide it at run time.
        plain: the program's own attention(q, k, v, heads, options); needed for proportional attention.
        on_map: called with every map: (place, map, h, w).
    """

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
        self.places = tuple(CallState(config, blocks).states)
        self.percent_to_sigma = percent_to_sigma
        self.call = Call(frozenset(), self._window(percent_to_sigma))  # where `prepare` does not run
        self.plain = plain
        self.on_map = on_map
        self.reasons: set[str] = set()  # why blocks were not merged
        self._call_states = _CallStates()

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionPatches:
        """Returns itself: programs copy patches for every node, and must not copy the model with them."""
        return self

    # --- before the blocks of a call --------------------------------------------------------------------------------

    def around_model(
        self, execute: Any, x: Tensor, t: Tensor, concat: Any = None, context: Any = None, control: Any = None,
        transformer_options: Mapping[str, Any] | None = None, **more: Any,
    ) -> Any:  # fmt: skip
        """ComfyUI's wrapper of a call of the model: runs it with options that `prepare` has changed."""
        options = dict(transformer_options or {})
        sampling = getattr(getattr(execute, "class_obj", None), "model_sampling", None)
        call = self.prepare(options, getattr(sampling, "percent_to_sigma", self.percent_to_sigma))
        self._call_state(x.device).start_call(options, call.sigmas, x)
        options[KEY] = call._replace(started=True)
        with graphs_of(self):
            return execute(x, t, concat, context, control, options, **more)

    def prepare(self, options: Options, percent_to_sigma: Callable[[float], float] | None) -> Call:
        """Orders the patches of a call, and stores at which blocks another node's function replaces self-attention.

        Others may add or change tokens of the whole map: ours run after them, and unmerge before them.
        """
        patches = options["patches"] = dict(options.get("patches", {}))
        for name, last in (("attn1_patch", True), ("attn1_output_patch", False)):
            patches[name] = sorted(patches.get(name, ()), key=lambda patch: self._owns(patch) == last)
        replaced = options.get("patches_replace", {}).get("attn1", {})
        others = (place for place in self.places if not self._owns(attention_at(replaced, place), True))
        call = options[KEY] = Call(frozenset(others), self._window(percent_to_sigma))
        return call

    def store_size(self, x: Tensor, when: str, layer: Any, number: int, stage: Any, options: Options) -> Tensor:
        """Forge's block_inner_modifier: stores the size of the map [B, C, h, w], and prepares the call."""
        if when == "before" and hasattr(layer, "transformer_blocks"):
            options["activations_shape"] = list(x.shape)
            self.prepare(options, self.percent_to_sigma)
        return x

    # --- in a block -------------------------------------------------------------------------------------------------

    @uncompiled
    def before(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
        """attn1_patch: reduces the normed tokens [B, N, C] of a block's self-attention."""
        place, state = place_of(options), self._call_state(q.device)
        if place is None or place not in state.states or self._is_temporal(place, q, options, state):
            return q, k, v
        call: Call = options.get(KEY, self.call)
        if place == self.places[0] and not call.started:
            state.start_call(options, call.sigmas, q)
        state.previous = place
        reason = self._reason_to_skip(place, (q, k, v), options, state)
        size = map_size(options, q.shape[1])
        map = None if reason or size is None else state.match(place, q, size)
        if map is None or size is None:
            self._skip(reason or FEW)
            return q, k, v
        if self.on_map is not None:
            self.on_map(place, map.argmax_map(), *size)
        options[MAP] = map
        block = state.states[place]
        if self.config.kv_only:
            queries, keys = q, block.reduce_kv(k, map)
        elif q is k:  # usually one tensor, as v is
            queries, keys = block.reduce_queries_and_keys(q, map)
        else:
            queries, keys = block.reduce(q, map), block.reduce_kv(k, map)
        return queries, keys, keys if v is k else block.reduce_kv(v, map)

    @uncompiled
    def after(self, out: Tensor, options: Options) -> Tensor:
        """attn1_output_patch: unmerges the result of attention to [B, N, C]."""
        map = options.pop(MAP, None)
        if map is None or self.config.kv_only or out.shape[:2] != map.after:
            return out
        return unmerge(out, map)

    @uncompiled
    def attention(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        """attn1_replace: proportional attention of the projected q, k, v [B, N, C]."""
        heads, map = options["n_heads"], options.get(MAP)
        if map is None or k.shape[:2] != map.after or has_equal_groups(map, self.config.group_size):
            assert self.plain is not None
            return self.plain(q, k, v, heads, options)
        dtype = v.dtype
        if options.get("attn_precision") is torch.float32:
            q, k, v = q.float(), k.float(), v.float()
        return proportional_attention(q, k, v, heads, map.log_size, self.config.size_classes(map)).to(dtype)

    # --- helpers of these -------------------------------------------------------------------------------------------

    def _call_state(self, device: torch.device) -> CallState:
        states = self._call_states.by_device
        if device not in states:
            states[device] = CallState(self.config, self.blocks)
        return states[device]

    def _owns(self, patch: Any, without: bool = False) -> bool:
        """Whether a patch belongs to this object; `without` if there is no patch."""
        return without if patch is None else getattr(patch, "__self__", None) is self

    def _window(self, percent_to_sigma: Callable[[float], float] | None) -> tuple[float, float]:
        if percent_to_sigma is None or (self.config.start, self.config.end) == (0, 1):
            return math.inf, -math.inf
        return percent_to_sigma(self.config.start), percent_to_sigma(self.config.end)

    def _is_temporal(self, place: Place, q: Tensor, options: Options, state: CallState) -> bool:
        """Whether this is a block over time. In Stable Video Diffusion one follows each block, at the same place.

        Its batch size differs. If there are as many frames as tokens, it is recognized as the second at its place.
        """
        if not hasattr(self.blocks[place].spatial_module, "time_stack"):
            return False
        shape = options.get("activations_shape")
        return place == state.previous or (shape is not None and shape[0] != q.shape[0])

    def _reason_to_skip(
        self, place: Place, qkv: tuple[Tensor, Tensor, Tensor], options: Options, state: CallState
    ) -> str | None:
        """Returns why the block that is running must not be merged, or None."""
        q, k, v = qkv
        if not state.is_active:
            return OUTSIDE
        if place in options.get(KEY, self.call).replaced:
            return REPLACED
        if any(map(is_altered, self._layers(place))):
            return ALTERED
        if k.shape != q.shape or v.shape != q.shape:
            return CHANGED
        if map_size(options, q.shape[1]) is None:
            return UNKNOWN if options.get("activations_shape") is None else CHANGED
        return self._reason_of_rule(place, q, options, state)

    def _reason_of_rule(self, place: Place, q: Tensor, options: Options, state: CallState) -> str | None:
        """Returns why merging is not wanted on this map, or None."""
        rule, size = state.rules[place], map_size(options, q.shape[1])
        if size is None or rule.merges(q.shape[0], *size, q.device, q.dtype):
            return None
        return SLOWER if rule.measures else SMALL

    def _layers(self, place: Place) -> Iterator[Any]:
        """Yields the modules of a block that run between `before` and `after`."""
        spatial_module: Any = self.blocks[place].spatial_module
        block = spatial_module.transformer_blocks[place[2]]
        yield block
        yield block.attn1
        yield from (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out)

    def _skip(self, reason: str) -> None:
        """Stores why a block is not merged, and warns once where another node is the reason."""
        if reason in WARNED and reason not in self.reasons:
            logger.warning(f"Token Fusion skips blocks: {reason}")
        self.reasons.add(reason)


def is_altered(layer: Any) -> bool:
    """Whether a module has a `forward` of its own, other than its class's method put back on the instance."""
    own = vars(layer).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(layer).forward


def attention_at(replaced: Mapping[Any, Any], place: Place) -> Any:
    """Returns the function that replaces the self-attention of a block, if any."""
    return replaced.get(place, replaced.get(place[:2]))


# --- compiled models --------------------------------------------------------------------------------------------------

_compiled_for: list[int] = [0]


def forget_graphs(patches: AttentionPatches) -> None:
    """Drops the graphs that torch.compile has made for other patches.

    Programs compile a model without guards on its patches, so that such a graph would run instead of these patches.
    """
    compiled = torch._dynamo.convert_frame.FRAME_COUNTER > 0
    if compiled and _compiled_for[0] != patches.number:
        torch._dynamo.reset()
    _compiled_for[0] = patches.number


@contextmanager
def graphs_of(patches: AttentionPatches) -> Iterator[None]:
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
