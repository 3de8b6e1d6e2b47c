"""The options of merging, as fields that carry their type, limits and help."""

from __future__ import annotations

from dataclasses import dataclass

from .core.matching import MATCHERS
from .core.reductions import REDUCTIONS, Reduction
from .options import option

_MAIN, _METHOD = "Important", "To choose between methods"
_THRESHOLD, _SOFT = "To merge what is similar (ATM section 3.2)", "Soft clusters (AdaptiVision section 3.2)"
_LESS, _MORE = "To match less often (approximations: docs/performance.md)", "Details"
_TOMESD = "Which layers run on merged tokens (tomesd's names)"


@dataclass(frozen=True)
class ConfigFields:
    """What `TokenFusionConfig` holds; see `tofu_sd.options` for what a field describes."""

    ratio: float = option(
        0.5,
        "number",
        low=0,
        high=1,
        group=_MAIN,
        help="Share of a map's tokens that are merged, at most 0.75 in cells of 2 x 2. 0 changes nothing, bit for bit.",
    )
    proportional: bool = option(
        False,
        "switch",
        mark="p",
        group=_MAIN,
        help="Proportional attention: log(n) is added to the logit of a key that stands for n tokens (ATM appendix A, "
        "ToMe for ViTs). Attention over identical tokens then equals full attention. By default it is on where text "
        "and image share one attention, as the text would gain weight.",
    )
    early: Reduction | str = option(
        "prune",
        "function",
        choices=lambda: REDUCTIONS,
        group=_METHOD,
        help="Reduction of the blocks before `depth_split` (ToFu Eq. 7).",
    )
    late: Reduction | str = option(
        "mlerp",
        "function",
        choices=lambda: REDUCTIONS,
        group=_METHOD,
        help="Reduction of the blocks from `depth_split` on.",
    )
    kv_early: Reduction | str | None = option(
        None,
        "function",
        choices=lambda: REDUCTIONS,
        optional=True,
        group=_METHOD,
        help="Reduction of the keys and values of self-attention before `depth_split`, by the same map. None takes "
        "`early`.",
    )
    kv_late: Reduction | str | None = option(
        None,
        "function",
        choices=lambda: REDUCTIONS,
        optional=True,
        group=_METHOD,
        help="Reduction of the keys and values of self-attention from `depth_split` on, by the same map. None takes "
        "`late`.",
    )
    depth_split: int | str | None = option(
        None,
        "integer",
        low=0,
        optional=True,
        words=("auto",),
        mark="d",
        group=_METHOD,
        help="d, counted over all transformer blocks in execution order. None puts the whole down path before it, "
        "which in Stable Diffusion 1.5 is the paper's d = 6, and the first half of the blocks of a diffusion "
        "transformer. 'auto' measures functional linearity (ToFu Eq. 8) "
        "in a few steps of four small images; it needs a text-to-image pipeline with a UNet.",
    )
    matching: str = option(
        "bipartite",
        "choice",
        choices=lambda: MATCHERS,
        group=_METHOD,
        help="How tokens are matched: 'bipartite' soft matching (ToMe, ToFu); 'pairs' or 'cells', which compare only "
        "within cells of 2 x 2 tokens; or a registered matcher.",
    )
    kv_only: bool = option(
        False,
        "switch",
        group=_METHOD,
        help="Merge keys and values and keep all queries: attention costs 1 - ratio, and its output needs no "
        "unmerging.",
    )
    levels: int = option(
        1,
        "integer",
        low=1,
        mark="l",
        group=_METHOD,
        help="How many attention resolutions are merged, from the highest that has attention downwards.",
    )
    min_tokens: int | str = option(
        "auto",
        "integer",
        low=0,
        words=("auto",),
        mark="min",
        group=_METHOD,
        help="Maps of fewer tokens are skipped. 'auto' skips those on which merging is not faster: it times "
        "self-attention both ways at the first call with a size, and remembers the result on this machine. With a "
        "number images do not depend on the machine; 0 merges all.",
    )
    window: int | None = option(
        None,
        "integer",
        low=1,
        optional=True,
        mark="w",
        unit=" cells",
        group=_LESS,
        help="Compare a source only with the destinations in its square of window x window cells; None with all.",
    )
    share_across_blocks: bool = option(
        False,
        "switch",
        mark="shared",
        group=_LESS,
        help="Match in the first block of each resolution and use its map in all its blocks.",
    )
    share_across_cfg: bool = option(
        False,
        "switch",
        mark="cfg",
        group=_LESS,
        help="Match the half of the batch with the positive prompt, and use its maps for both halves. Only for "
        "pipelines that run both prompts in one batch.",
    )
    match_interval: int = option(
        1,
        "integer",
        low=1,
        mark="every",
        group=_LESS,
        help="Match again only every so many steps of an image. Calls whose step is not known match every time.",
    )
    threshold: float | None = option(
        None,
        "number",
        low=-1,
        high=2,
        optional=True,
        mark="above",
        group=_THRESHOLD,
        help="A cosine. Each block merges as many tokens as had a destination above it in the step before (the mean "
        "over the batch), in eighths of `ratio`, which is then the most. Nothing is merged in the first step of "
        "an image.",
    )
    threshold_decay: float = option(
        0.0,
        "number",
        low=-1,
        high=1,
        mark="decay",
        group=_THRESHOLD,
        help="The block at depth l has the threshold max(threshold - (exp(decay l) - 1), threshold_min) (ATM Eq. 1). "
        "In Stable Diffusion late blocks hold more similar tokens, so that a decay below 0 merges blocks more "
        "evenly.",
    )
    threshold_min: float = option(
        -1.0,
        "number",
        low=-1,
        high=2,
        mark="least",
        group=_THRESHOLD,
        help="The lowest threshold of any block.",
    )
    temperature: float | None = option(
        None,
        "number",
        low=0,
        above=True,
        optional=True,
        mark="soft",
        group=_SOFT,
        help="Assigns every token to all destinations of its window by exp(-squared distance / temperature), in units "
        "of the window's variance. Needs early and late mean, a window, and ratio 1 - 1 / (sx * sy).",
    )
    sx: int = option(2, "integer", low=1, group=_MORE, help="Width of a cell; one token of each cell is a destination.")
    sy: int = option(2, "integer", low=1, group=_MORE, help="Height of a cell.")
    seed: int | None = option(
        None,
        "integer",
        low=0,
        high=2**31 - 1,
        optional=True,
        mark="seed",
        group=_MORE,
        help="None takes each cell's top-left token as destination; an integer draws it in every step (same seed, "
        "same image).",
    )
    start: float = option(
        0.0,
        "number",
        low=0,
        high=1,
        unit=" (sampling progress)",
        group=_MORE,
        help="Merge from this part of the sampling on, measured by timestep; of a batch the first sample's counts.",
    )
    end: float = option(
        1.0,
        "number",
        low=0,
        high=1,
        unit=" (sampling progress)",
        group=_MORE,
        help="Merge up to this part of the sampling.",
    )
    match_on: str = option(
        "hidden",
        "choice",
        choices=lambda: ("hidden", "normed"),
        mark="normed",
        group=_MORE,
        help="'hidden' compares tokens before the block's first norm, as the paper does; 'normed' after it.",
    )
    merge_crossattn: bool = option(
        False, "switch", mark="x", group=_TOMESD, help="Merge the queries of cross-attention."
    )
    merge_mlp: bool = option(
        False, "switch", mark="mlp", group=_TOMESD, help="Merge the tokens of the feed-forward layer."
    )
    merge_attn: bool = option(True, "switch", mark="noattn", group=_TOMESD, help="Merge self-attention.")
