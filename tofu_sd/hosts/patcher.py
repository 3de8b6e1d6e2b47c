"""ComfyUI, Forge, reForge: programs that call functions of ours around every self-attention of a UNet.

A model is a patcher there, cloned before anything is added to it. `patch_model` adds an AttentionPatches to one: what
each block's self-attention is given, and what it gives back. Nothing of the program is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..clock import Clock
from ..patch import Site, SiteFusion, Summary, fusions
from ..policy import TokenFusion
from ..proportional import weighted_attention
from ..reduce import unmerge
from ..tokens import SoftMap, TokenMap
from .ldm import Place, find_sites, number_of_tokens, told

Options = Mapping[str, Any]  # what a patch is told: block, block_index, activations_shape, sigmas, cond_or_uncond, ...
UNSUPPORTED = {
    "merge_crossattn": "these programs tell patches of self-attention alone",
    "merge_mlp": "these programs tell patches of self-attention alone",
    "share_guidance": "these programs decide for themselves which prompts go into a batch",
    "threshold": "it counts in one call for the next, and these programs may call a model several times a step",
}


class AttentionPatches:
    """The functions that a patched model calls, and what they share. One for each clone: programs copy it with it.

    sites: by their places. sigmas: fusing goes on from the first noise level down to the second. plain: the program's
    own attention(q, k, v, heads, options), where keys are weighted.
    """

    def __init__(
        self,
        fusion: TokenFusion,
        sites: Mapping[Place, Site],
        sigmas: tuple[float, float] = (math.inf, -math.inf),
        plain: Callable[..., Tensor] | None = None,
    ):
        self.fusion = fusion
        places = {site.name: place for place, site in sites.items()}
        chosen = fusions(list(sites.values()), fusion)
        self.states: dict[Place, SiteFusion] = {places[site.name]: state for site, state in chosen}
        self.least = number_of_tokens(fusion)
        self.sigmas = sigmas
        self.plain = plain
        self.clock = Clock(replace(fusion, start=0.0, end=1.0))  # the window is in noise levels here
        self.open = True
        self.map: TokenMap | SoftMap | None = None  # of the block that is running
        self.watcher: Callable[[Place, TokenMap, int, int], None] | None = None  # is shown every map, of h x w tokens

    def before(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
        """attn1_patch: what the self-attention of a block is to see of its normed tokens [B, N, C]."""
        self.map = None
        place = place_of(options)
        state = self.states.get(place) if place else None
        if state is None:
            return q, k, v
        if place == next(iter(self.states)):
            self._begin(options)
        if not self.open or k.shape != q.shape or v.shape != q.shape:  # another patch has been here
            return q, k, v
        size = map_size(options, q.shape[1])
        if size is None or q.shape[1] < self.least:
            return q, k, v
        state.begin(self.clock.layout(*size, q.device), None)
        state.observe(q)
        self.map = map = state.take("attn", q)
        if map is None or place is None:
            return q, k, v
        if self.watcher is not None:
            self.watcher(place, map.hard(), *size)
        fused = {id(x): x for x in (q, k, v)}  # one tensor, most times
        fused = {key: state.reduce(x, map) for key, x in fused.items()}
        return (q if self.fusion.keys_only else fused[id(q)]), fused[id(k)], fused[id(v)]

    def after(self, out: Tensor, options: Options) -> Tensor:
        """attn1_output_patch: the attention's result for all tokens [B, N, C]."""
        map, self.map = self.map, None
        if map is None or self.fusion.keys_only or out.shape[:2] != map.after:
            return out
        return unmerge(out, map)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        """attn1_replace: attention of the projected q, k, v [B, N, C], the keys weighted by what they stand for."""
        heads, map = options["n_heads"], self.map
        if map is None or k.shape[:2] != map.after:
            assert self.plain is not None
            return self.plain(q, k, v, heads, options)
        dtype = v.dtype
        if options.get("attn_precision") is torch.float32:
            q, k, v = q.float(), k.float(), v.float()
        return weighted_attention(q, k, v, heads, map.size).to(dtype)

    def tell_size(self, x: Tensor, when: str, layer: Any, number: int, stage: Any, options: dict[str, Any]) -> Tensor:
        """Forge's block_inner_modifier: tells the size of the map [B, C, h, w] that Forge does not tell itself."""
        if when == "before" and hasattr(layer, "transformer_blocks"):
            options["activations_shape"] = list(x.shape)
        return x

    def _begin(self, options: Options) -> None:
        """A call of the model has come to its first fused block."""
        sigma = options.get("sigmas")
        if sigma is not None:
            if self.sigmas != (math.inf, -math.inf):
                self.open = self.sigmas[1] <= float(sigma.flatten()[0]) <= self.sigmas[0]
            self.clock.tick(sigma, options.get("sample_sigmas"))
        if self.clock.anew:
            for state in self.states.values():
                if state.relay is not None:
                    state.relay.map = None


def place_of(options: Options) -> Place | None:
    """Where the block is that is running; None where the program does not tell."""
    block = options.get("block")
    return None if block is None else (block[0], int(block[1]), int(options.get("block_index", 0)))


def map_size(options: Options, tokens: int) -> tuple[int, int] | None:
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


def patch_model(
    patcher: Any,
    fusion: TokenFusion,
    plain: Callable[..., Tensor],
    percent_to_sigma: Callable[[float], float] | None = None,
) -> tuple[Any, Summary]:
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
    sites = find_sites(model)
    window = math.inf, -math.inf
    if (fusion.start, fusion.end) != (0, 1):
        if percent_to_sigma is None:
            raise ValueError(f"start is {fusion.start:g} and end is {fusion.end:g}: this model tells no noise levels")
        window = percent_to_sigma(fusion.start), percent_to_sigma(fusion.end)
    clone = patcher.clone()
    _take_off(clone.model_options)
    patches = AttentionPatches(fusion, sites, window, plain)
    clone.set_model_attn1_patch(patches.before)
    clone.set_model_attn1_output_patch(patches.after)
    if hasattr(clone, "add_block_inner_modifier"):
        clone.add_block_inner_modifier(patches.tell_size)
    if fusion.proportional:
        there = clone.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
        for side, number, index in patches.states:
            if (side, number, index) in there or (side, number) in there:
                raise ValueError(
                    "another patch has replaced self-attention in this model, whose keys cannot be weighted then: put "
                    "Token Fusion before it, or turn proportional off"
                )
            clone.set_model_attn1_replace(patches.attention, side, number, index)
    return clone, told(model, sites, fusion)


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
