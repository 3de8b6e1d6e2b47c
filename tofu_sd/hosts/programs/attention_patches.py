"""The functions that ComfyUI, Forge and reForge call around every self-attention of a patched UNet.

Nothing of these programs is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.proportional import proportional_attention
from ...core.reductions import unmerge
from ...core.token_map import has_equal_groups
from ..ldm import Place
from .base_patches import FEW, KEY, OUTSIDE, UNKNOWN, ModelPatches, graphs_of, percent_to_sigma_of, uncompiled
from .call_state import CallState, Options, map_size, place_of

MAP = "tofu_sd_map"  # in the options: the map of the block that is running
CHANGED = "another node changes the tokens of its self-attention first (as HyperTile and TomePatchModel do)"
REPLACED = "another node replaces its self-attention (as PAG, SEG and SAG do)"
ALTERED = "another node replaces a `forward` in it (as reference ControlNets do)"


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


class AttentionPatches(ModelPatches):
    """The patches of a UNet. Proportional attention needs the program's own attention. See ModelPatches."""

    warned = (CHANGED, REPLACED, ALTERED)

    @cached_property
    def call(self) -> Call:
        """What is known of a call where `prepare` does not run."""
        return Call(frozenset(), self._window(self.percent_to_sigma))

    # --- before the blocks of a call --------------------------------------------------------------------------------

    def around_model(
        self, execute: Any, x: Tensor, t: Tensor, concat: Any = None, context: Any = None, control: Any = None,
        transformer_options: Mapping[str, Any] | None = None, **more: Any,
    ) -> Any:  # fmt: skip
        """ComfyUI's wrapper of a call of the model: runs it with options that `prepare` has changed."""
        options = dict(transformer_options or {})
        call = self.prepare(options, percent_to_sigma_of(execute, self.percent_to_sigma))
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
        if q is k:  # usually one tensor, as v is
            queries, reduced = block.queries_and_keys(q, map)
            keys = queries if reduced is None else reduced
        else:
            queries = q if self.config.kv_only else block.reduce(q, map)
            keys = block.reduce_kv(k, map)
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

    def _owns(self, patch: Any, without: bool = False) -> bool:
        """Whether a patch belongs to this object; `without` if there is no patch."""
        return without if patch is None else getattr(patch, "__self__", None) is self

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
        size = map_size(options, q.shape[1])
        if size is None:
            return UNKNOWN if options.get("activations_shape") is None else CHANGED
        return self._reason_of_rule(place, q, size, state)

    def _layers(self, place: Place) -> Iterator[Any]:
        """Yields the modules of a block that run between `before` and `after`."""
        spatial_module: Any = self.blocks[place].spatial_module
        block = spatial_module.transformer_blocks[place[2]]
        yield block
        yield block.attn1
        yield from (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out)


def is_altered(layer: Any) -> bool:
    """Whether a module has a `forward` of its own, other than its class's method put back on the instance."""
    own = vars(layer).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(layer).forward


def attention_at(replaced: Mapping[Any, Any], place: Place) -> Any:
    """Returns the function that replaces the self-attention of a block, if any."""
    return replaced.get(place, replaced.get(place[:2]))
