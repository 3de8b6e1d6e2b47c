"""ComfyUI, Forge, reForge: programs that call functions of ours around every self-attention of a UNet.

A model is a patcher there, cloned before anything is added to it. `patch_model` adds an AttentionPatches to one: what
each block's self-attention is given, and what it gives back. Nothing of the program is imported here.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ..config import TokenFusionConfig
from ..core.proportional import weighted_attention
from ..core.reductions import unmerge
from ..core.token_map import SoftMap, TokenMap
from ..patching.block_info import BlockInfo
from ..patching.block_state import BlockState, fusions
from ..patching.step_tracker import StepTracker
from .ldm import PatchSummary, Place, find_blocks, number_of_tokens, summarize

logger = logging.getLogger("tofu_sd")
# what a patch is told, one dict for each call of a block: block, block_index, activations_shape, sigmas, ...
Options = MutableMapping[str, Any]
KEY = "tofu_sd"  # in the options: what `prepare` knows of a call of the model
MAP = "tofu_sd_map"  # in the options: the map of the block that is running
UNSUPPORTED = {
    "merge_crossattn": "these programs tell patches of self-attention alone",
    "merge_mlp": "these programs tell patches of self-attention alone",
    "share_across_cfg": "these programs decide for themselves which prompts go into a batch",
    "threshold": "it counts in one call for the next, and these programs may call a model several times a step",
}
# why a block is left unmerged
OUTSIDE = "the step lies outside start_percent..end_percent"
SMALL = "the map has fewer tokens than min_tokens"
UNKNOWN = "the size of the map is unknown"
FEW = "no token is to be merged"
CHANGED = "another node changes the tokens of its self-attention first (as HyperTile and TomePatchModel do)"
REPLACED = "another node replaces its self-attention (as PAG, SEG and SAG do)"
ALTERED = "another node replaces a `forward` in it (as reference ControlNets do)"
INTERPLAY = (CHANGED, REPLACED, ALTERED)  # what a person should know of, once


class Call(NamedTuple):
    """What is known of one call of the model before its blocks run.

    replaced: places where another node's function is the self-attention. sigmas: the first and last noise level at
    which tokens are merged. begun: whether the step was noted.
    """

    replaced: frozenset[Place]
    sigmas: tuple[float, float]
    begun: bool = False


class Lane:
    """State of the calls that one thread makes on one device: the step, and the maps that blocks and steps share."""

    def __init__(self, fusion: TokenFusionConfig, infos: Mapping[Place, BlockInfo]):
        places = {info.name: place for place, info in infos.items()}
        self.states: dict[Place, BlockState] = {
            places[info.name]: state for info, state in fusions(list(infos.values()), fusion)
        }
        self.steps = StepTracker(replace(fusion, start=0.0, end=1.0))  # the window is in noise levels here
        self.is_active = True
        self.previous: Place | None = None  # where the last merged block was

        self.shared_maps = tuple(dict.fromkeys(s.shared_map for s in self.states.values() if s.shared_map is not None))

    def begin(self, options: Mapping[str, Any], sigmas: tuple[float, float], content: Tensor) -> None:
        """Notes the step at the start of a call of the model, whose latents or first tokens are `content`."""
        self.previous = None
        self._end()
        sigma, schedule = options.get("sigmas"), options.get("sample_sigmas")
        if sigma is not None:
            self.is_active = sigmas[1] <= float(sigma.flatten()[0]) <= sigmas[0]
            # a program that does not show the schedule does not say where one sampling ends
            shown = None if schedule is None else content
            self.steps.tick(sigma, shown, schedule, identifiers_of(options))
        for shared_map in self.shared_maps:
            shared_map.begin(self.steps.now)

    def _end(self) -> None:
        """Leaves the maps of the call before to the later steps of its image part."""
        part = self.steps.now.part
        for shared_map in self.shared_maps:
            if part is not None:
                shared_map.end(part)

    def match(self, place: Place, q: Tensor, size: tuple[int, int]) -> TokenMap | SoftMap | None:
        """The map of a block's tokens q [B, h w, C]; None where no token is merged."""
        state = self.states[place]
        state.begin(self.steps.grid(*size, q.device), None)
        state.update_map(q)
        return state.take("attn", q)


_numbers = itertools.count(1)
Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """A function that a compiler calls and does not look into."""
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class _Lanes(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[torch.device, Lane] = {}


class AttentionPatches:
    """The functions that a patched model calls. All clones of the model share them.

    They hold settings alone. What a call needs beside those is in its options or in a Lane, as a program with several
    devices calls them from several threads. A compiler does not look into them: the map depends on the step.

    sites: by their places. percent_to_sigma: the noise level at a share of the sampling, where the model does not give
    it as it runs. plain: the program's own attention(q, k, v, heads, options), where keys are weighted. watcher: is
    shown every map, of h x w tokens.
    """

    def __init__(
        self,
        fusion: TokenFusionConfig,
        infos: Mapping[Place, BlockInfo],
        percent_to_sigma: Callable[[float], float] | None = None,
        plain: Callable[..., Tensor] | None = None,
        watcher: Callable[[Place, TokenMap, int, int], None] | None = None,
    ):
        self.number = next(_numbers)
        self.fusion = fusion
        self.infos = dict(infos)
        self.places = tuple(Lane(fusion, infos).states)
        self.least = number_of_tokens(fusion)
        self.percent_to_sigma = percent_to_sigma
        self.call = Call(frozenset(), self._window(percent_to_sigma))  # where `prepare` does not run
        self.plain = plain
        self.watcher = watcher
        self.reasons: set[str] = set()  # why blocks were left unmerged
        self._lanes = _Lanes()

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
        self._lane(x.device).begin(options, call.sigmas, x)
        options[KEY] = call._replace(begun=True)
        with graphs_of(self):
            return execute(x, t, concat, context, control, options, **more)

    def prepare(self, options: Options, percent_to_sigma: Callable[[float], float] | None) -> Call:
        """Puts our patches where they see what all others leave, and notes which blocks have another's attention.

        Others may add or change tokens of the whole map: ours run after them, and unmerge before them.
        """
        patches = options["patches"] = dict(options.get("patches", {}))
        for name, last in (("attn1_patch", True), ("attn1_output_patch", False)):
            patches[name] = sorted(patches.get(name, ()), key=lambda patch: self._owns(patch) == last)
        replaced = options.get("patches_replace", {}).get("attn1", {})
        others = (place for place in self.places if not self._owns(attention_at(replaced, place), True))
        call = options[KEY] = Call(frozenset(others), self._window(percent_to_sigma))
        return call

    def tell_size(self, x: Tensor, when: str, layer: Any, number: int, stage: Any, options: Options) -> Tensor:
        """Forge's block_inner_modifier: gives the size of the map [B, C, h, w], and prepares the call."""
        if when == "before" and hasattr(layer, "transformer_blocks"):
            options["activations_shape"] = list(x.shape)
            self.prepare(options, self.percent_to_sigma)
        return x

    # --- in a block -------------------------------------------------------------------------------------------------

    @uncompiled
    def before(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
        """attn1_patch: what the self-attention of a block is to see of its normed tokens [B, N, C]."""
        place, lane = place_of(options), self._lane(q.device)
        if place is None or place not in lane.states or self._temporal(place, q, options, lane):
            return q, k, v
        call: Call = options.get(KEY, self.call)
        if place == self.places[0] and not call.begun:
            lane.begin(options, call.sigmas, q)
        lane.previous = place
        reason = self._obstacle(place, q, k, v, options, lane)
        size = map_size(options, q.shape[1])
        map = None if reason or size is None else lane.match(place, q, size)
        if map is None or size is None:
            self._leave(reason or FEW)
            return q, k, v
        if self.watcher is not None:
            self.watcher(place, map.argmax_map(), *size)
        options[MAP] = map
        merged = {id(x): x for x in (q, k, v)}  # one tensor, most times
        merged = {key: lane.states[place].reduce(x, map) for key, x in merged.items()}
        return (q if self.fusion.kv_only else merged[id(q)]), merged[id(k)], merged[id(v)]

    @uncompiled
    def after(self, out: Tensor, options: Options) -> Tensor:
        """attn1_output_patch: the attention's result for all tokens [B, N, C]."""
        map = options.pop(MAP, None)
        if map is None or self.fusion.kv_only or out.shape[:2] != map.after:
            return out
        return unmerge(out, map)

    @uncompiled
    def attention(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        """attn1_replace: attention of the projected q, k, v [B, N, C], the keys weighted by what they stand for."""
        heads, map = options["n_heads"], options.get(MAP)
        if map is None or k.shape[:2] != map.after:
            assert self.plain is not None
            return self.plain(q, k, v, heads, options)
        dtype = v.dtype
        if options.get("attn_precision") is torch.float32:
            q, k, v = q.float(), k.float(), v.float()
        return weighted_attention(q, k, v, heads, map.size).to(dtype)

    # --- what these ask ---------------------------------------------------------------------------------------------

    def _lane(self, device: torch.device) -> Lane:
        lanes = self._lanes.by_device
        if device not in lanes:
            lanes[device] = Lane(self.fusion, self.infos)
        return lanes[device]

    def _owns(self, patch: Any, nobody: bool = False) -> bool:
        """Whether a patch is of this object; `nobody` where there is none."""
        return nobody if patch is None else getattr(patch, "__self__", None) is self

    def _window(self, percent_to_sigma: Callable[[float], float] | None) -> tuple[float, float]:
        if percent_to_sigma is None or (self.fusion.start, self.fusion.end) == (0, 1):
            return math.inf, -math.inf
        return percent_to_sigma(self.fusion.start), percent_to_sigma(self.fusion.end)

    def _temporal(self, place: Place, q: Tensor, options: Options, lane: Lane) -> bool:
        """Whether this is a block over time, which in Stable Video Diffusion follows each block under its place.

        Its batch is another; where there are as many frames as tokens, that it comes second tells it.
        """
        if not hasattr(self.infos[place].spatial_module, "time_stack"):
            return False
        shape = options.get("activations_shape")
        return place == lane.previous or (shape is not None and shape[0] != q.shape[0])

    def _obstacle(self, place: Place, q: Tensor, k: Tensor, v: Tensor, options: Options, lane: Lane) -> str | None:
        """Why the block that is running must be left unmerged, if so."""
        if not lane.is_active:
            return OUTSIDE
        if place in options.get(KEY, self.call).replaced:
            return REPLACED
        if any(map(is_altered, self._layers(place))):
            return ALTERED
        if k.shape != q.shape or v.shape != q.shape:
            return CHANGED
        if map_size(options, q.shape[1]) is None:
            return UNKNOWN if options.get("activations_shape") is None else CHANGED
        return SMALL if q.shape[1] < self.least else None

    def _layers(self, place: Place) -> Iterator[Any]:
        """The modules of a block that its tokens pass from our first patch to our last."""
        spatial_module: Any = self.infos[place].spatial_module
        block = spatial_module.transformer_blocks[place[2]]
        yield block
        yield block.attn1
        yield from (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out)

    def _leave(self, reason: str) -> None:
        """Notes why a block is left unmerged; once in the log, where another node is why."""
        if reason in INTERPLAY and reason not in self.reasons:
            logger.warning(f"Token Fusion leaves blocks unmerged: {reason}")
        self.reasons.add(reason)


def is_altered(layer: Any) -> bool:
    """Whether a module has a `forward` of its own; its class's, put back after one had been there, is none."""
    own = vars(layer).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(layer).forward


def attention_at(replaced: Mapping[Any, Any], place: Place) -> Any:
    """The function that a program takes for the self-attention of a block, if any."""
    return replaced.get(place, replaced.get(place[:2]))


def identifiers_of(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a program says of the image part that a call generates: which prompts, and their identifiers."""
    return tuple(options.get("cond_or_uncond", ())), tuple(map(str, options.get("uuids", ())))


def place_of(options: Mapping[str, Any]) -> Place | None:
    """Where the block is that is running; None where the program does not tell."""
    block = options.get("block")
    return None if block is None else (block[0], int(block[1]), int(options.get("block_index", 0)))


def map_size(options: Mapping[str, Any], tokens: int) -> tuple[int, int] | None:
    """Height and width of the map that so many tokens lie on; None where they lie on none.

    activations_shape tells it. Without that it is the latent's size, halved as often as gives this number.
    """
    shape = options.get("activations_shape")
    if shape is not None:
        h, w = int(shape[-2]), int(shape[-1])
        return (h, w) if h * w == tokens else None
    if options.get("original_shape") is None:
        return None
    h, w = (int(side) for side in options["original_shape"][-2:])
    while h * w > tokens:
        h, w = -(-h // 2), -(-w // 2)
    return (h, w) if h * w == tokens else None


# --- compiled models --------------------------------------------------------------------------------------------------

_compiled_for: list[int] = [0]


def forget_graphs(patches: AttentionPatches) -> None:
    """Drops the graphs that torch.compile made, if any, where they were made for other patches.

    Programs compile a model without guards on its patches, so that a graph of other patches would run in place of this.
    """
    compiled = torch._dynamo.convert_frame.FRAME_COUNTER > 0
    if compiled and _compiled_for[0] != patches.number:
        torch._dynamo.reset()
    _compiled_for[0] = patches.number


@contextmanager
def graphs_of(patches: AttentionPatches) -> Iterator[None]:
    """Inside, a compiled model runs graphs of its own.

    Every graph of torch.compile is guarded by the state of autocast, of which the cache matters to nothing else here.
    So the graphs of the model without these patches are not taken inside, nor those made inside after it.
    """
    forget_graphs(patches)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(not cached)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


# --- patching a model -------------------------------------------------------------------------------------------------


def patch_model(
    patcher: Any,
    fusion: TokenFusionConfig,
    plain: Callable[..., Tensor],
    percent_to_sigma: Callable[[float], float] | None = None,
) -> tuple[Any, PatchSummary]:
    """(a clone of the program's patcher whose model fuses tokens, what is fused). The patcher itself stays as it is.

    One that fuses already is patched anew: the later fusion counts.

    plain: the program's own attention(q, k, v, heads, options), which weighted keys leave where nothing is fused.
    percent_to_sigma: the noise level at a share of the sampling, for start and end.

    ValueError for a model without such blocks, an option that cannot be had here, or another patch in its place.
    """
    model = patcher.model.diffusion_model
    for name, why in UNSUPPORTED.items():
        if getattr(fusion, name) is not None and getattr(fusion, name) is not False:
            raise ValueError(f"{name} cannot be had here: {why}")
    infos = find_blocks(model)
    if (fusion.start, fusion.end) != (0, 1) and percent_to_sigma is None:
        raise ValueError(f"start is {fusion.start:g} and end is {fusion.end:g}: this model tells no noise levels")
    clone = patcher.clone()
    _put_on(clone, AttentionPatches(fusion, infos, percent_to_sigma, plain))
    return clone, summarize(model, infos, fusion)


def watch_model(patcher: Any, watcher: Callable[[Place, TokenMap, int, int], None]) -> tuple[Any, AttentionPatches]:
    """(a clone of a patched model that shows every map, its patches). The model itself shows none.

    ValueError for a model that is not patched.
    """
    before = patches_of(patcher)
    if before is None:
        raise ValueError("this model fuses no tokens: put Token Fusion (ToFu) before Token Fusion Map")
    clone = patcher.clone()
    patches = AttentionPatches(before.fusion, before.infos, before.percent_to_sigma, before.plain, watcher)
    _put_on(clone, patches)
    return clone, patches


def patches_of(model: Any) -> AttentionPatches | None:
    """The patches of ours that a model carries."""
    there = model.model_options.get("transformer_options", {}).get("patches", {}).get("attn1_patch", ())
    owners = (getattr(patch, "__self__", None) for patch in there)
    return next((owner for owner in owners if isinstance(owner, AttentionPatches)), None)


def _put_on(clone: Any, patches: AttentionPatches) -> None:
    """Gives a clone these patches in the place of older ones.

    ValueError where keys are to be weighted and another node has replaced self-attention, in a program that does not
    show at run time who has.
    """
    _take_off(clone.model_options)
    told = clone.model_options["transformer_options"]
    wraps, modifies = hasattr(clone, "add_wrapper_with_key"), hasattr(clone, "add_block_inner_modifier")
    if patches.fusion.proportional:
        there = told["patches_replace"].get("attn1", {})
        if not (wraps or modifies) and any(attention_at(there, place) for place in patches.places):
            raise ValueError(
                "another patch has replaced self-attention in this model, whose keys cannot be weighted then: turn "
                "proportional off"
            )
        for side, number in dict.fromkeys(place[:2] for place in patches.places):
            if (side, number) not in there:  # where the program looks last: another's function is never hidden
                clone.set_model_attn1_replace(patches.attention, side, number)
    clone.set_model_attn1_patch(patches.before)
    clone.set_model_attn1_output_patch(patches.after)
    if modifies:
        clone.add_block_inner_modifier(patches.tell_size)
    if wraps:  # in the options, with which the other functions are copied
        told = clone.model_options["transformer_options"]
        wrappers = told["wrappers"] = dict(told.get("wrappers", {}))
        wrappers["apply_model"] = {**wrappers.get("apply_model", {}), KEY: [patches.around_model]}
    else:
        forget_graphs(patches)


def _take_off(model_options: dict[str, Any]) -> None:
    """Takes older patches of ours off a clone, whose lists may still be those of the model before it."""

    def ours(patch: Any) -> bool:
        return isinstance(getattr(patch, "__self__", None), AttentionPatches)

    told = model_options["transformer_options"] = dict(model_options.get("transformer_options", {}))
    lists = told["patches"] = dict(told.get("patches", {}))
    replaced = told["patches_replace"] = dict(told.get("patches_replace", {}))
    for name, patches in lists.items():
        lists[name] = [patch for patch in patches if not ours(patch)]
    if "block_inner_modifiers" in told:  # Forge's
        told["block_inner_modifiers"] = [patch for patch in told["block_inner_modifiers"] if not ours(patch)]
    if "attn1" in replaced:
        replaced["attn1"] = {place: patch for place, patch in replaced["attn1"].items() if not ours(patch)}
