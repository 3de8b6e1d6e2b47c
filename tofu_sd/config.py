"""TokenFusionConfig: what to merge, how much, how, where and when, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from .core.matching import BUILT_IN_MATCHERS, MATCHERS
from .core.reductions import REDUCTIONS, Reduction, get_reduction, mean
from .options import check_options, defaults_of, markdown_table, option, specs_of
from .utils import did_you_mean

BUCKETS = 8
"""Under a threshold the number of merged tokens is a multiple of this share of the most that may be merged."""


def layer_threshold(alpha: float, beta: float, threshold_min: float, layer: int) -> float:
    """The cosine above which tokens count as similar in a layer, from 0 (ATM Eq. 1).

    max(alpha - (exp(beta layer) - 1), threshold_min)
    """
    return max(alpha - math.expm1(beta * layer), threshold_min)


_MAIN, _METHOD = "Important", "To choose between methods"
_THRESHOLD, _SOFT = "To merge what is similar (ATM section 3.2)", "Soft clusters (AdaptiVision section 3.2)"
_LESS, _MORE = "To match less often (approximations: docs/performance.md)", "Details"
_TOMESD = "Which layers run on merged tokens (tomesd's names)"


@dataclass(frozen=True)
class TokenFusionConfig:
    """How tokens are merged. The default is the paper's ToFu: ratio 0.5 at the highest resolution with attention.

    Each field carries its type, limits and help (see `tofu_sd.options`); `python -m tofu_sd.config` prints them.

    Raises:
        ValueError: a value is out of range, or two options exclude each other. Names the value and the limit.
    """

    ratio: float = option(
        0.5,
        "number",
        low=0,
        high=1,
        group=_MAIN,
        help="Share of a map's tokens that are merged, at most 1 - 1 / (sx * sy). 0 changes nothing, bit for bit.",
    )
    proportional: bool = option(
        False,
        "switch",
        mark="p",
        group=_MAIN,
        help="Proportional attention: log(n) is added to the logit of a key that stands for n tokens (ATM appendix A, "
        "ToMe for ViTs). Attention over identical tokens then equals full attention.",
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
    depth_split: int | str | None = option(
        None,
        "integer",
        low=0,
        optional=True,
        words=("auto",),
        mark="d",
        group=_METHOD,
        help="d, counted over all transformer blocks in execution order. None puts the whole down path before it, "
        "which in Stable Diffusion 1.5 is the paper's d = 6. 'auto' measures functional linearity (ToFu Eq. 8) "
        "in a few steps of four small images; it needs a text-to-image pipeline.",
    )
    matching: str = option(
        "bipartite",
        "choice",
        choices=lambda: MATCHERS,
        group=_METHOD,
        help="How tokens are matched: bipartite soft matching (ToMe, ToFu), or a registered matcher.",
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
        0,
        "integer",
        low=0,
        words=("auto",),
        mark="min",
        group=_METHOD,
        help="Maps of fewer tokens are skipped. 'auto' measures, in about a second, from how many tokens on merging "
        "is faster on this machine; images then depend on the machine.",
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

    def __post_init__(self) -> None:
        for name in ("early", "late"):
            object.__setattr__(self, name, get_reduction(getattr(self, name)))
        if self.temperature is not None and self.matching == "bipartite":
            object.__setattr__(self, "matching", "soft")
        check_options(self, skip=("ratio",))
        for check in _CHECKS:
            if message := check(self):
                raise ValueError(message)

    @classmethod
    def of(cls, ratio: float | TokenFusionConfig = 0.5, /, **options: Any) -> TokenFusionConfig:
        """Returns a configuration from a ratio, or another configuration with options changed.

        TypeError for an unknown option.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
        return replace(ratio, **options) if isinstance(ratio, cls) else cls(**{"ratio": ratio, **options})

    @property
    def max_ratio(self) -> float:
        return 1 - 1 / (self.sx * self.sy)

    @property
    def slug(self) -> str:
        """A short name for rows, folders and plots: 'tofu-r50', 'kv-mean-r75+p'."""
        reductions = (get_reduction(self.early).__name__, get_reduction(self.late).__name__)
        name = "tofu" if reductions == ("prune", "mlerp") else "-".join(dict.fromkeys(reductions))
        parts = ["kv-" * self.kv_only + name, f"r{100 * self.ratio:g}"]
        if self.matching not in ("bipartite", "soft"):
            parts.append(self.matching)
        changed = [
            (spec, getattr(self, name))
            for name, spec in specs_of(self).items()
            if spec.mark and name != "proportional" and getattr(self, name) != defaults_of(self)[name]
        ]
        parts += [f"{spec.mark}{value}" for spec, value in changed if spec.kind in ("integer", "number")]
        if (self.sx, self.sy) != (2, 2):
            parts.append(f"{self.sx}x{self.sy}")
        if (self.start, self.end) != (0, 1):
            parts.append(f"t{100 * self.start:g}to{100 * self.end:g}")
        parts += [spec.mark for spec, _ in changed if spec.kind in ("switch", "choice")]
        return "-".join(parts) + "+p" * self.proportional

    @property
    def needs_timestep(self) -> bool:
        """Whether merging depends on the timestep."""
        several = self.match_interval > 1 or self.threshold is not None
        return self.seed is not None or (self.start, self.end) != (0, 1) or several

    def reduction_at(self, depth: int, down_path: int) -> Reduction:
        """Returns the reduction of a block (Eq. 7). down_path: number of transformer blocks in the down path."""
        if self.depth_split == "auto":
            raise ValueError("depth_split is 'auto', which is measured on a pipeline of diffusers: give a number here")
        d = down_path if self.depth_split is None else int(self.depth_split)
        return get_reduction(self.early if depth < d else self.late)

    @property
    def layers(self) -> tuple[str, ...]:
        """Which layers of a block run on merged tokens, in the order in which they run: 'attn', 'crossattn', 'mlp'."""
        merged = {"attn": self.merge_attn, "crossattn": self.merge_crossattn, "mlp": self.merge_mlp}
        return tuple(layer for layer, on in merged.items() if on)

    def num_merged(self, h: int, w: int) -> int:
        """Returns r: how many tokens of an h x w map are merged, at most its sources. Thin maps have few sources.

        Under a threshold this is the maximum.
        """
        sources = h * w - max(1, h // self.sy) * max(1, w // self.sx)
        if self.temperature is not None:
            return sources if self.ratio else 0
        return min(int(h * w * self.ratio), sources)

    def bucket(self, most: int, num_similar: float) -> int:
        """Returns how many of `most` tokens are merged: the largest multiple of an eighth up to `num_similar`."""
        return max(r for r in (most * eighth // BUCKETS for eighth in range(BUCKETS + 1)) if r <= num_similar)

    def threshold_at(self, depth: int) -> float | None:
        """Returns the threshold of the block at `depth`; None without a threshold."""
        if self.threshold is None:
            return None
        return layer_threshold(self.threshold, self.threshold_decay, self.threshold_min, depth)


# --- checks of more than one option: each gives a message or None -----------------------------------------------------


def _check_ratio(config: TokenFusionConfig) -> str | None:
    limit, spec = config.max_ratio, specs_of(config)["ratio"]
    if spec.accepts(config.ratio) and config.ratio <= limit:
        return None
    why = f"one token in each {config.sx} x {config.sy} cell stays, so at most 1 - 1/(sx*sy) can be merged"
    return f"ratio is {config.ratio!r}; it must be a number from 0 to {limit:g}: {why}"


def _check_threshold(config: TokenFusionConfig) -> str | None:
    if config.threshold is None:
        defaults = defaults_of(config)
        idle = [name for name in ("threshold_decay", "threshold_min") if getattr(config, name) != defaults[name]]
        return f"{idle[0]} is {getattr(config, idle[0])!r} and threshold is None: it has no effect" if idle else None
    if config.matching not in BUILT_IN_MATCHERS:
        return (
            f"matching is {config.matching!r} and threshold is {config.threshold!r}, which counts cosines of bipartite "
            "matching: set only one"
        )
    if config.match_interval == 1 and not config.share_across_blocks:
        return None
    shared = (
        f"match_interval is {config.match_interval}" if config.match_interval > 1 else "share_across_blocks is True"
    )
    return f"{shared} and threshold is {config.threshold!r}, which decides in each block and step: set only one"


def _check_soft_matching(config: TokenFusionConfig) -> str | None:
    value = config.temperature
    if value is None:
        return "matching is 'soft' and temperature is None: set temperature" if config.matching == "soft" else None
    if config.matching != "soft":
        return f"temperature is {value!r} and matching is {config.matching!r}: temperature needs matching='soft'"
    if config.ratio and not math.isclose(config.ratio, config.max_ratio):
        return (
            f"ratio is {config.ratio} and temperature is {value!r}: each {config.sx} x {config.sy} cell becomes one "
            f"token, so ratio must be 1 - 1/(sx*sy), here {config.max_ratio:g}; sx=2, sy=1 gives 0.5"
        )
    if (config.early, config.late) != (mean, mean):
        return f"temperature is {value!r}, which averages: early and late must be 'mean'"
    if config.window is None:
        return f"temperature is {value!r} and window is None: soft matching needs a window, an integer >= 1"
    if config.threshold is not None:
        return f"temperature is {value!r} and threshold is {config.threshold!r}: set only one"
    return None


def _check_steps(config: TokenFusionConfig) -> str | None:
    if config.start < config.end:
        return None
    return f"start is {config.start} and end is {config.end}: start must come before end"


def _check_layers(config: TokenFusionConfig) -> str | None:
    if not config.layers:
        return "merge_attn, merge_crossattn and merge_mlp are all False: nothing would be merged"
    if config.min_tokens == "auto" and not config.merge_attn:
        return "min_tokens is 'auto', which measures self-attention, and merge_attn is False: give a number"
    return None


_CHECKS: tuple[Callable[[TokenFusionConfig], str | None], ...] = (
    _check_ratio, _check_threshold, _check_soft_matching, _check_steps, _check_layers,
)  # fmt: skip


if __name__ == "__main__":
    print(markdown_table(TokenFusionConfig))
