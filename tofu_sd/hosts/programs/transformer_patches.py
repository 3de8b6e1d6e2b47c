"""The functions that ComfyUI calls around the blocks and the attention of a patched diffusion transformer.

They are put into the options of each call of the model, not of the model itself, so that nodes before and after keep
theirs: a function that another node has put into the same place is called by ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ...config import TokenFusionConfig
from ...core.token_map import TokenMap
from ...patching.autotune import MergeRule
from ...patching.block_state import BlockState
from ...patching.host import BlockInfo
from ..ldm import Place
from .base_patches import FEW, KEY, OUTSIDE, UNKNOWN, ModelPatches, graphs_of, percent_to_sigma_of, uncompiled
from .call_state import CallState, Options
from .joint_call import JointCall, JointProbe, named_arguments
from .transformer_families import DOUBLE, FAMILIES, SINGLE, heads_of, map_size, padded_tokens, reference_tokens

OVERRIDE = "optimized_attention_override"
RUNNING = "tofu_sd_block"  # in the options: the JointCall of the block that is running
# why a block is not merged
FRAMES = "the latent has several frames or layers"
CHANGED = "another node changes the number of image tokens"
MASKED = "an attention mask hides tokens by their position"
UNREACHED = "another node replaces its attention"
UNSEEN = "no block ran through its patches: a cache skipped the call, or another node replaces the model's forward"


@dataclass
class TransformerCall:
    """What is known of one call of the model.

    Args:
        size: height and width of the map in tokens; None where it is unknown.
        others: number of tokens that follow the image: of reference images, or of padding.
        replaced: functions of other nodes that replace blocks, by kind and number.
        owner: another node's optimized_attention_override.
        text: number of text tokens; None before the first block that gets text and image apart.
        blocks: how many blocks have run.
    """

    size: tuple[int, int] | None
    others: int
    replaced: Mapping[Any, Callable[..., Any]]
    owner: Callable[..., Any] | None
    text: int | None = None
    blocks: int = 0


class BlockEntry:
    """Runs a block with the map of its image tokens. It replaces the block in the options of a call.

    Args:
        patches: of the model.
        place: of the block.
    """

    def __init__(self, patches: TransformerPatches, place: Place):
        self.patches = patches
        self.place = place

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        """Runs the block, or the function by which another node replaces it, with the block on merged tokens in it."""
        run = partial(self._run, extra["original_block"])
        replaced = args["transformer_options"][KEY].replaced.get(self.place[:2])
        return run(args) if replaced is None else replaced(args, {**extra, "original_block": run})

    def _run(self, original: Callable[[dict[str, Any]], Any], args: dict[str, Any]) -> Any:
        options = args["transformer_options"]
        self.patches.enter(self.place, args["img"], args.get("txt"), options)
        try:
            return original(args)
        finally:
            self.patches.leave(options)


class NextBlock:
    """Takes the tokens that ComfyUI shows after a block to the next, in models whose blocks cannot be replaced.

    Args:
        patches: of the model.
    """

    def __init__(self, patches: TransformerPatches):
        self.patches = patches

    def __call__(self, args: dict[str, Any]) -> dict[str, Any]:
        """Ends a block and begins the next, if any. Returns {}: the tokens stay as they are."""
        options = args["transformer_options"]
        self.patches.leave(options)
        place = (DOUBLE, args["block_index"] + 1, 0)
        if place in self.patches.places:
            self.patches.enter(place, args["img"], args["txt"], options)
        return {}


class TransformerPatches(ModelPatches):
    """The patches of a diffusion transformer. See ModelPatches; `plain` is needed.

    ComfyUI shows a block's hidden states where a block is replaced, and its queries, keys and values, after norm and
    rotation, where its attention is. The first are matched, the second are merged.
    """

    warned = (UNKNOWN, FRAMES, CHANGED, MASKED, UNREACHED, UNSEEN)

    def __init__(
        self,
        config: TokenFusionConfig,
        blocks: Mapping[Place, BlockInfo],
        percent_to_sigma: Callable[[float], float] | None = None,
        plain: Callable[..., Tensor] | None = None,
        on_map: Callable[[Place, TokenMap, int, int], None] | None = None,
    ):
        assert plain is not None
        first = next(iter(blocks.values()))
        self.patch = first.downsample  # side of a token in the latent
        self.model = first.spatial_module
        self.family = FAMILIES[type(self.model).__name__]
        self.probe = JointProbe(heads_of(self.model, self.family), self.family.text_tokens, plain)
        super().__init__(config, blocks, percent_to_sigma, plain, on_map)
        self.entries = {place[:2]: BlockEntry(self, place) for place in self.places}
        self.next_block = NextBlock(self)

    def rule_of(self, block: BlockInfo, state: BlockState) -> MergeRule:
        """Returns on which maps a block is merged, by its attention of text and image together."""
        return MergeRule(self.probe, block.width, state.config, state.reductions, users=state.config.match_interval)

    # --- before the blocks of a call --------------------------------------------------------------------------------

    def around_model(
        self, execute: Any, x: Tensor, t: Tensor, concat: Any = None, context: Any = None, control: Any = None,
        transformer_options: Mapping[str, Any] | None = None, **more: Any,
    ) -> Any:  # fmt: skip
        """ComfyUI's wrapper of a call of the model: puts the functions of the blocks and of attention into its options.

        SD3's model calls no wrappers of its own, so that the latent is read here for all.
        """
        options = dict(transformer_options or {})
        call = self.prepare(options, map_size(tuple(x.shape), self.patch), reference_tokens(more, self.patch))
        state = self._call_state(x.device)
        state.start_call(options, self._window(percent_to_sigma_of(execute, self.percent_to_sigma)), x)
        with graphs_of(self):
            out = execute(x, t, concat, context, control, options, **more)
        if not call.blocks and state.is_active:
            self._skip(UNSEEN)
        return out

    def prepare(self, options: Options, size: tuple[int, int] | None, references: int) -> TransformerCall:
        """Puts the functions of the blocks and of attention into the options of a call.

        Args:
            options: of the call.
            size: height and width of the map in tokens; None where it is unknown.
            references: number of tokens of reference images.
        """
        replaced = options["patches_replace"] = dict(options.get("patches_replace", {}))
        others = replaced.get("dit", {})
        if self.family.shown_after:
            patches = options["patches"] = dict(options.get("patches", {}))
            patches[DOUBLE] = [*patches.get(DOUBLE, ()), self.next_block]  # after those that change the tokens
        else:
            replaced["dit"] = {**others, **self.entries}
        padding = 0 if size is None else padded_tokens(size[0] * size[1], self.model, self.family)
        call = options[KEY] = TransformerCall(size, references + padding, others, options.get(OVERRIDE))
        options[OVERRIDE] = self.attention
        return call

    # --- around a block ---------------------------------------------------------------------------------------------

    @uncompiled
    def enter(self, place: Place, image: Tensor, text: Tensor | None, options: Options) -> None:
        """Matches the image tokens of a block before it runs.

        Args:
            place: of the block.
            image: [B, N + R, C], tokens of the image and its reference images; [B, T + N + R, C] in single blocks.
            text: [B, T, C]; None in single blocks.
            options: of the call.
        """
        options.pop(RUNNING, None)
        call: TransformerCall = options[KEY]
        state = self._call_state(image.device)
        call.blocks += 1
        single = place[0] == SINGLE
        if not single:
            call.text = 0 if text is None else text.shape[1]
        start = (call.text or 0) if single else 0
        own = image[:, start:]
        reason = self._reason_to_skip(place, own, call, state)
        map = None
        if reason is None and call.size is not None:
            h, w = call.size
            map = state.match(place, own[:, : h * w].contiguous(), call.size)
            if map is not None and self.on_map is not None:
                self.on_map(place, map.argmax_map(), h, w)
        if map is None:
            self._skip(reason or FEW)
        else:
            options[RUNNING] = JointCall(state.states[place], map, call.text or 0, own.shape[1])

    @uncompiled
    def leave(self, options: Options) -> None:
        """Forgets the map of a block that has run, and reports an attention that was not reached."""
        running: JointCall | None = options.pop(RUNNING, None)
        if running is not None and not running.calls:
            self._skip(UNREACHED)

    def _reason_to_skip(self, place: Place, image: Tensor, call: TransformerCall, state: CallState) -> str | None:
        """Returns why a block must not be merged, or None.

        Args:
            place: of the block.
            image: [B, N + R, C], as far as is known.
            call: of the model.
            state: of the calls on this device.
        """
        if not state.is_active:
            return OUTSIDE
        if call.size is None:
            return FRAMES
        if call.text is None:
            return UNKNOWN
        h, w = call.size
        if image.shape[1] != h * w + call.others:
            return CHANGED
        return self._reason_of_rule(place, image, call.size, state)

    # --- in a block -------------------------------------------------------------------------------------------------

    @uncompiled
    def attention(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """optimized_attention_override: runs attention on merged image tokens, by another node's override if any."""
        options: Options = kwargs["transformer_options"]
        owner = options[KEY].owner
        attend = function if owner is None else partial(owner, function)
        running: JointCall | None = options.get(RUNNING)
        if running is None:
            return attend(*args, **kwargs)
        named = named_arguments(args, kwargs)
        start = running.start_of(named["q"], named["k"], named["v"], bool(named.get("skip_reshape")))
        if start is None:  # not the block's own attention
            return attend(*args, **kwargs)
        if named.get("mask") is not None:
            running.calls += 1
            self._skip(MASKED)
            return attend(*args, **kwargs)
        return running.run(attend, start, named, own=owner is None)
