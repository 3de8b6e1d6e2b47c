"""What is known of a call of a model from the options of ComfyUI, Forge and reForge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...config import TokenFusionConfig
from ...core.token_map import SoftMap, TokenMap
from ...patching.autotune import MergeRule
from ...patching.block_state import BlockState, block_states
from ...patching.host import BlockInfo
from ...patching.step_tracker import StepTracker
from ..ldm import Place, merged_attention

# the options of a patch, one dict for each call of a block: block, block_index, activations_shape, sigmas, ...
Options = MutableMapping[str, Any]
RuleOf = Callable[[BlockInfo, BlockState], MergeRule]


class CallState:
    """State of the calls that one thread makes on one device: the step, and the maps that blocks and steps share.

    Args:
        config: how tokens are merged.
        blocks: the model's blocks, by place.
        rule_of: returns on which maps a block is merged.
    """

    def __init__(self, config: TokenFusionConfig, blocks: Mapping[Place, BlockInfo], rule_of: RuleOf):
        places = {block.name: place for place, block in blocks.items()}
        self.states: dict[Place, BlockState] = {
            places[block.name]: state for block, state in block_states(list(blocks.values()), config)
        }
        self.rules = {place: rule_of(blocks[place], state) for place, state in self.states.items()}
        self.steps = StepTracker(replace(config, start=0.0, end=1.0))  # the window is in noise levels here
        self.is_active = True
        self.previous: Place | None = None  # place of the last merged block
        self.shared_maps = tuple(dict.fromkeys(s.shared_map for s in self.states.values() if s.shared_map is not None))

    def start_call(self, options: Mapping[str, Any], sigmas: tuple[float, float], content: Tensor) -> None:
        """Sets the step at the start of a call of the model.

        Args:
            options: of the call.
            sigmas: the first and last noise level at which tokens are merged.
            content: the latents or first tokens of the call.
        """
        self.previous = None
        self._store_maps()
        sigma, schedule = options.get("sigmas"), options.get("sample_sigmas")
        if sigma is not None:
            self.is_active = sigmas[1] <= float(sigma.flatten()[0]) <= sigmas[0]
            # without the schedule it is unknown where one sampling ends
            known_content = None if schedule is None else content
            self.steps.start_step(sigma, known_content, schedule, identifiers_of(options))
        for shared_map in self.shared_maps:
            shared_map.load(self.steps.now)

    def _store_maps(self) -> None:
        """Stores the maps of the last call for the later steps of its image part."""
        part = self.steps.now.part
        for shared_map in self.shared_maps:
            if part is not None:
                shared_map.store(part)

    def match(self, place: Place, q: Tensor, size: tuple[int, int]) -> TokenMap | SoftMap | None:
        """Returns the map of a block's tokens q [B, h w, C]; None where no token is merged."""
        state = self.states[place]
        state.start_forward(self.steps.grid(*size, q.device))
        state.update_map(q)
        return state.pop_map("attn", q)


def unet_rule(block: BlockInfo, state: BlockState) -> MergeRule:
    """Returns on which maps a block is merged. Each measures for itself, and finds what the others have measured."""
    attention = block.layers["attn"]
    merged_class = merged_attention(type(attention))  # type: ignore[arg-type]
    users = state.config.match_interval
    return MergeRule(attention, block.width, state.config, state.reductions, users=users, merged_class=merged_class)


def identifiers_of(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the identifiers of the image part that a call generates: which prompts, and their ids."""
    return tuple(options.get("cond_or_uncond", ())), tuple(map(str, options.get("uuids", ())))


def place_of(options: Mapping[str, Any]) -> Place | None:
    """Returns the place of the block that is running; None where the program does not give it."""
    block = options.get("block")
    return None if block is None else (block[0], int(block[1]), int(options.get("block_index", 0)))


def map_size(options: Mapping[str, Any], tokens: int) -> tuple[int, int] | None:
    """Returns height and width of the map on which so many tokens lie; None if they lie on none.

    It is in activations_shape. Without that, it is the latent's size, halved until it has this number of tokens.
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
