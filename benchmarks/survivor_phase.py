"""Rotary models: states are merged before their projections, and a survivor keeps the position that it had.

`python -m eval.run --batch 1 --method benchmarks/survivor_phase.py:survivor-phase`. The library merges
queries, keys and values after the rotation, which averages phases; here a group has the phase of one token, and the
projections get cheaper too. Not a setting of the library: diffusers rotates all samples of a batch alike, and each
sample has survivors of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor

import tofu_sd
from eval import EvalError
from eval.methods.registry import register_method
from tofu_sd import recipes
from tofu_sd.core.reductions import unmerge
from tofu_sd.hosts.diffusers_transformers.interception import MergedCall, call_mask
from tofu_sd.patching.block_state import BlockState
from tofu_sd.patching.patch import patch_of, states_of


@register_method("survivor-phase", takes_ratio=True)
@contextmanager
def survivor_phase(pipe: Any, ratio: float) -> Iterator[Any]:
    """Inside, Flux.1 averages states before their projections, with log n on the keys."""
    transformer = getattr(pipe, "transformer", pipe)
    config = replace(recipes.proportional(recipes.TOME), ratio=ratio, min_tokens=0)  # the same on any machine
    with tofu_sd.patched(pipe, config), ExitStack() as stack:
        patch = patch_of(transformer)
        assert patch is not None
        for name, state in states_of(patch).items():
            attention = transformer.get_submodule(f"{name}.attn")
            if not isinstance(attention, FluxAttention):
                raise EvalError(f"survivor-phase is written for Flux.1, and this is {type(transformer).__name__}")
            attention.forward = _Merged(attention, state)
            stack.callback(delattr, attention, "forward")
        yield pipe


class _Merged:
    """The forward of an attention layer whose image tokens are merged before it.

    Args:
        attention: the layer.
        state: of its block.
    """

    def __init__(self, attention: Any, state: BlockState):
        self.attention = attention
        self.state = state

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, image_rotary_emb: Any = None
    ) -> Any:
        is_single = encoder_hidden_states is None
        tokens = len(image_rotary_emb[0])
        text = tokens - self.state.current.map.before[1] if is_single else encoder_hidden_states.shape[1]
        image = hidden_states[:, text:] if is_single else hidden_states
        if len(image) > 1:
            raise EvalError("survivor-phase rotates all samples of a batch alike: give --batch 1")
        map = self.state.pop_map("attn", image)
        kept = torch.cat([torch.arange(text, device=image.device), text + map.kept_idx[0]])
        reduced = self.state.reduce(image, map)
        if is_single:
            reduced = torch.cat([hidden_states[:, :text], reduced], dim=1)
        mask = call_mask(MergedCall(self.state, map, text, projected=False), reduced, len(kept))
        rotation = tuple(x[kept] for x in image_rotary_emb)
        out = FluxAttention.forward(self.attention, reduced, encoder_hidden_states, mask, rotation)
        if is_single:
            return torch.cat([out[:, :text], unmerge(out[:, text:], map)], dim=1)
        return unmerge(out[0], map), out[1]
