"""TokenFusionConfig: what to merge, how much, how, where and when, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from .config_fields import ConfigFields
from .core.reductions import Reduction, get_reduction, mean
from .core.token_map import SizeClasses, SoftMap, TokenMap, size_classes
from .options import check_options, defaults_of, describe_options, specs_of
from .utils import did_you_mean

PAIRED_ONCE = 0.5  # the ratio at which each token has one partner

BUCKETS = 8
"""Under a threshold the number of merged tokens is a multiple of this share of the most that may be merged."""


def layer_threshold(alpha: float, beta: float, threshold_min: float, layer: int) -> float:
    """The cosine above which tokens count as similar in a layer, from 0 (ATM Eq. 1).

    max(alpha - (exp(beta layer) - 1), threshold_min)
    """
    return max(alpha - math.expm1(beta * layer), threshold_min)


class BlockReductions(NamedTuple):
    """The reductions of one block: of its tokens, and of the keys and values of its self-attention."""

    tokens: Reduction
    kv: Reduction

    @property
    def label(self) -> str:
        """The names of the reductions: "mlerp", or "mlerp, keys and values mean"."""
        kv = "" if self.kv is self.tokens else f", keys and values {self.kv.__name__}"
        return self.tokens.__name__ + kv


@dataclass(frozen=True)
class TokenFusionConfig(ConfigFields):
    """How tokens are merged. The default is the paper's ToFu: ratio 0.5 at the highest resolution with attention.

    The options are in `tofu_sd.config_fields`; `python -m tofu_sd.config` prints them.

    Raises:
        ValueError: a value is out of range, or two options exclude each other. Names the value and the limit.
    """

    def __post_init__(self) -> None:
        for name in ("early", "late"):
            object.__setattr__(self, name, get_reduction(getattr(self, name)))
        for name in ("kv_early", "kv_late"):
            if getattr(self, name) is not None:
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
    def in_cells(self) -> bool:
        """Whether tokens are matched within cells of 2 x 2."""
        return self.matching in ("pairs", "cells")

    @property
    def group_size(self) -> int | None:
        """How many tokens each survivor stands for where all groups have one size; None where sizes are not known."""
        if not self.in_cells:
            return None
        return 2 if self.matching == "pairs" and self.ratio <= PAIRED_ONCE else 4

    def size_classes(self, map: TokenMap | SoftMap) -> SizeClasses | None:
        """Returns how many survivors of a map stand for how many tokens each; None where that depends on the image.

        Tokens that are paired twice form groups of four, and of two at the edge of an odd map. None too where
        `min_tokens` is a number: attention by size is chosen by a measurement, and then nothing depends on the machine.
        """
        if (
            self.min_tokens != "auto"
            or self.group_size is None
            or (self.matching == "pairs" and self.ratio > PAIRED_ONCE)
        ):
            return None
        return size_classes(map, self.group_size)

    @property
    def slug(self) -> str:
        """A short name for rows, folders and plots: 'tofu-r50', 'kv-mean-r75+p'."""
        name = "kv-" * self.kv_only + _pair_name(self.early, self.late)
        if self.separate_kv:
            name += f"-kv-{_pair_name(self.kv_early or self.early, self.kv_late or self.late)}"
        parts = [name, f"r{100 * self.ratio:g}"]
        if self.matching not in ("bipartite", "soft"):
            parts.append(self.matching)
        changed = [
            (spec, getattr(self, name))
            for name, spec in specs_of(self).items()
            if spec.mark and name != "proportional" and getattr(self, name) != defaults_of(self)[name]
            if (name, getattr(self, name)) != ("min_tokens", 0)  # which maps are merged is no part of a method
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

    @property
    def separate_kv(self) -> bool:
        """Whether keys and values are reduced otherwise than queries."""
        return self.kv_early is not None or self.kv_late is not None

    def reductions_at(self, depth: int, down_path: int) -> BlockReductions:
        """Returns the reductions of a block (Eq. 7). down_path: number of transformer blocks in the down path."""
        if self.depth_split == "auto":
            raise ValueError("depth_split is 'auto', which is measured on a pipeline of diffusers: give a number here")
        d = down_path if self.depth_split is None else int(self.depth_split)
        tokens, kv = (self.early, self.kv_early) if depth < d else (self.late, self.kv_late)
        return BlockReductions(get_reduction(tokens), get_reduction(kv or tokens))

    @property
    def layers(self) -> tuple[str, ...]:
        """Which layers of a block run on merged tokens, in the order in which they run: 'attn', 'crossattn', 'mlp'."""
        merged = {"attn": self.merge_attn, "crossattn": self.merge_crossattn, "mlp": self.merge_mlp}
        return tuple(layer for layer, on in merged.items() if on)

    def num_merged(self, h: int, w: int) -> int:
        """Returns r: how many tokens of an h x w map are merged, at most its sources. Thin maps have few sources.

        Under a threshold this is the maximum.
        """
        if self.in_cells:
            cells, wanted = (h // 2) * (w // 2), int(h * w * self.ratio)
            if self.matching == "cells":
                return 3 * min(wanted // 3, cells)
            return min(wanted, 2 * cells) if self.ratio <= PAIRED_ONCE else 3 * cells
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


def _pair_name(early: Reduction | str, late: Reduction | str) -> str:
    """Returns the name of two reductions in slugs: 'tofu' for the paper's, else 'mean' or 'mean-prune'."""
    names = (get_reduction(early).__name__, get_reduction(late).__name__)
    return "tofu" if names == ("prune", "mlerp") else "-".join(dict.fromkeys(names))


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
    if config.matching not in ("bipartite", "soft"):
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
    if {config.early, config.late, config.kv_early or mean, config.kv_late or mean} != {mean}:
        return f"temperature is {value!r}, which averages: early, late, kv_early and kv_late must be 'mean'"
    if config.window is None:
        return f"temperature is {value!r} and window is None: soft matching needs a window, an integer >= 1"
    if config.threshold is not None:
        return f"temperature is {value!r} and threshold is {config.threshold!r}: set only one"
    return None


def _check_cells(config: TokenFusionConfig) -> str | None:
    if not config.in_cells:
        return None
    matching = f"matching is {config.matching!r}"
    for name in ("window", "seed"):
        if (value := getattr(config, name)) is not None:
            return f"{name} is {value!r} and {matching}, which stays within cells of 2 x 2: it has no effect"
    if (config.sx, config.sy) != (2, 2):
        return f"sx is {config.sx}, sy is {config.sy} and {matching}, whose cells are 2 x 2"
    if config.matching == "pairs" and config.ratio > PAIRED_ONCE and not math.isclose(config.ratio, config.max_ratio):
        return (
            f"ratio is {config.ratio!r} and {matching}: it must be at most {PAIRED_ONCE}, where each token is merged "
            f"with another, or {config.max_ratio:g}, where the pairs are paired again"
        )
    return None


def _check_kv(config: TokenFusionConfig) -> str | None:
    name = "kv_early" if config.kv_early is not None else "kv_late"
    if not config.separate_kv:
        return None
    value = getattr(config, name).__name__
    if config.kv_only:
        return f"{name} is {value!r} and kv_only is True, in which early and late reduce keys and values: set only one"
    return None if config.merge_attn else f"{name} is {value!r} and merge_attn is False: it has no effect"


def _check_steps(config: TokenFusionConfig) -> str | None:
    if config.start < config.end:
        return None
    return f"start is {config.start} and end is {config.end}: start must come before end"


def _check_layers(config: TokenFusionConfig) -> str | None:
    if not config.layers:
        return "merge_attn, merge_crossattn and merge_mlp are all False: nothing would be merged"
    return None


_CHECKS: tuple[Callable[[TokenFusionConfig], str | None], ...] = (
    _check_ratio, _check_threshold, _check_soft_matching, _check_cells, _check_kv, _check_steps, _check_layers,
)  # fmt: skip


if __name__ == "__main__":
    print(describe_options(TokenFusionConfig))
