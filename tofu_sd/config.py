"""TokenFusion: what to fuse, how much, how, where and when, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from .core.reductions import REDUCTIONS, Reduction, mean, mlerp, prune
from .utils import did_you_mean

BUCKETS = 8
"""Under a threshold so many shares of the most that may be fused are told apart: each is a shape of its own."""


def reduction_named(name: str | Reduction) -> Reduction:
    """The reduction called `name`; a function is returned as it is.

    ValueError for an unknown name, and for a function without one: rows and folders are named after it.
    """
    if callable(name):
        if not getattr(name, "__name__", "").isidentifier():
            raise ValueError(f"the reduction {name!r} has no name of its own: write it as a function, with def")
        return name
    if name not in REDUCTIONS:
        hint = did_you_mean(str(name), REDUCTIONS)
        raise ValueError(f"unknown reduction {name!r}{hint}; known: {', '.join(REDUCTIONS)}")
    return REDUCTIONS[name]


def falling_threshold(alpha: float, beta: float, least: float, layer: int) -> float:
    """The cosine above which tokens are alike in a layer, from 0: max(alpha - (exp(beta layer) - 1), least) (Eq. 1)."""
    return max(alpha - math.expm1(beta * layer), least)


@dataclass(frozen=True)
class TokenFusion:
    """How tokens are fused. The default is the paper's ToFu: half the tokens of the highest-resolution self-attention.

    Important
        ratio: share of a map's tokens that are fused away, 0 to 1 - 1 / (sx * sy). 0 changes nothing, bit for bit.
        proportional: give a fused token the attention of all the tokens it stands for: log(n_i) is added to its key's
            logit (ATM appendix A, ToMe for ViTs). Fused attention over identical tokens then equals full attention.
    To choose between methods
        early, late: reductions of the blocks before and from `depth_split` on (`prune`, `mean`, `mlerp`, or any
            function of the same signature). ToFu Eq. 7.
        depth_split: d, counted over all transformer blocks of the model in execution order; None puts the whole down
            path before it, which in Stable Diffusion 1.5 is the paper's d = 6. "auto" measures it on a text-to-image
            pipeline, by functional linearity (ToFu Eq. 8) in a few steps of four small pictures.
        keys_only: fuse keys and values and leave the queries whole; attention costs (1 - ratio), its output needs no
            unmerging.
        levels: how many attention resolutions are fused, from the highest that has attention downwards.
        min_tokens: maps of fewer tokens are left alone. "auto" measures, in about a second, from how many tokens on
            fusing is faster on this machine; pictures then depend on the machine.
    To fuse what is alike, however much it is (ATM section 3.2, for classifiers)
        threshold: a cosine from -1 on; in each block and step as many tokens are fused as had a destination above it in
            the step before, the mean over the batch, in steps of an eighth of `ratio`, which is the most then. Nothing
            is fused in the first step of a picture. (Known as with `match_every`: steps that are not known to go on
            with a picture are its first.) None fuses `ratio` always.
        threshold_decay, threshold_least: the block at depth l has the threshold max(threshold - (exp(decay l) - 1),
            least) (ATM Eq. 1). In Stable Diffusion late blocks are the more alike, so that a decay below 0, which
            raises it, fuses blocks more evenly.
    To condense instead (AdaptiVision section 3.2)
        temperature: shares every token out among the cells of its `window`, by exp(-squared distance / temperature) to
            the cell's destination, in units of the window's variance; `mean` averages by these shares, and every token
            gets its shares of the result. Needs early and late mean, a window, and ratio 1 - 1 / (sx * sy).
    To match less (each is an approximation: see docs/performance.md for what it costs)
        window: compare a source with the destinations of its square of window x window cells alone; None with all.
        share_level: match in the first block of each resolution and use its map in all blocks of that resolution.
        share_guidance: match the second half of the batch, the positive prompt, and use its maps for both halves; only
            for pipelines that put the negative and the positive prompt in one batch.
        match_every: match anew every so many steps of a picture. Steps are known by the `encoder_hidden_states`
            that a pipeline shows its model in all of them; where they are not the same tensor, every step matches. (A
            loop of one's own that breaks a picture off and begins another one later in the schedule with the same
            tensor would begin with the old map.)
    To tinker with
        sx, sy: cell of the destination grid; one token a cell is a destination.
        seed: None takes each cell's top-left token, an integer draws it anew every step (the same image every time).
        start, end: part of the sampling in which tokens are fused, in progress 0..1, measured by timestep. Where the
            samples of a batch have timesteps of their own, as in training, the first one's counts here and for `seed`.
        match_on: "hidden" compares tokens before the block's first norm, as the paper does; "normed" after it.
    Seldom worth it (they are tomesd's)
        merge_attn, merge_crossattn, merge_mlp: which layers of a block run on fused tokens.

    Raises ValueError naming the value and the limit.
    """

    ratio: float = 0.5
    proportional: bool = False
    early: Reduction | str = prune
    late: Reduction | str = mlerp
    depth_split: int | str | None = None
    keys_only: bool = False
    levels: int = 1
    min_tokens: int | str = 0
    window: int | None = None
    share_level: bool = False
    share_guidance: bool = False
    match_every: int = 1
    threshold: float | None = None
    threshold_decay: float = 0.0
    threshold_least: float = -1.0
    temperature: float | None = None
    sx: int = 2
    sy: int = 2
    seed: int | None = None
    start: float = 0.0
    end: float = 1.0
    match_on: str = "hidden"
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "early", reduction_named(self.early))
        object.__setattr__(self, "late", reduction_named(self.late))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        for name in ("sx", "sy", "levels", "match_every"):
            value = getattr(self, name)
            if not _whole(value) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        least = self.min_tokens
        if least != "auto" and (isinstance(least, str) or not _whole(least) or least < 0):
            raise ValueError(f"min_tokens is {self.min_tokens!r}; it must be 'auto' or a whole number of at least 0")
        if least == "auto" and not self.merge_attn:
            raise ValueError(
                "min_tokens is 'auto', which measures self-attention, and merge_attn is False: give a number"
            )
        if self.window is not None and (not _whole(self.window) or self.window < 1):
            raise ValueError(f"window is {self.window!r}; it must be None or a whole number of cells, at least 1")
        if not _number(self.ratio):
            raise ValueError(f"ratio is {self.ratio!r}; it must be a number from 0 to {self.max_ratio:g}")
        if not 0 <= self.ratio <= self.max_ratio:  # NaN fails both comparisons
            why = f"one token in each {self.sx} x {self.sy} cell has to stay, so at most 1 - 1/(sx*sy) can go"
            raise ValueError(f"ratio is {self.ratio}; it must lie between 0 and {self.max_ratio:g}: {why}")
        self._check_threshold()
        self._check_temperature()
        for name in ("start", "end"):
            if not _number(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must lie between 0 and 1 (sampling progress)")
        if self.start >= self.end:
            raise ValueError(f"start is {self.start} and end is {self.end}: start must come before end")
        split = self.depth_split
        if split not in (None, "auto") and (isinstance(split, str) or not _whole(split) or split < 0):
            raise ValueError(f"depth_split is {split!r}; it must be None, 'auto' or a whole number of at least 0")
        if self.seed is not None and (not _whole(self.seed) or not 0 <= self.seed < 2**31):
            raise ValueError(f"seed is {self.seed!r}; it must be None or a whole number from 0 to {2**31 - 1}")
        if self.match_on not in ("hidden", "normed"):
            hint = did_you_mean(str(self.match_on), ("hidden", "normed"))
            raise ValueError(f"match_on is {self.match_on!r}{hint}; it must be 'hidden' or 'normed'")
        if not self.layers:
            raise ValueError("merge_attn, merge_crossattn and merge_mlp are all False: nothing would be fused")

    def _check_threshold(self) -> None:
        limits = {"threshold": (-1, 2), "threshold_decay": (-1, 1), "threshold_least": (-1, 2)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is None and name == "threshold":
                continue
            if not _number(value) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; it must be a number from {low} to {high}")
        if self.threshold is None:
            for name, usual in (("threshold_decay", 0), ("threshold_least", -1)):
                if getattr(self, name) != usual:
                    raise ValueError(f"{name} is {getattr(self, name)!r} and threshold is None: it changes nothing")
        elif self.match_every > 1 or self.share_level:
            shared = f"match_every is {self.match_every}" if self.match_every > 1 else "share_level is True"
            raise ValueError(
                f"{shared} and threshold is {self.threshold!r}, which decides in each block and step: give one of them"
            )

    def _check_temperature(self) -> None:
        value = self.temperature
        if value is None:
            return
        if not _number(value) or not 0 < value < math.inf:
            raise ValueError(f"temperature is {value!r}; it must be None or a number above 0")
        if self.ratio and not math.isclose(self.ratio, self.max_ratio):
            raise ValueError(
                f"ratio is {self.ratio} and temperature is {value!r}: one token is made of each {self.sx} x {self.sy} "
                f"cell, so ratio must be 1 - 1/(sx*sy), here {self.max_ratio:g}; sx=2, sy=1 gives 0.5"
            )
        if (self.early, self.late) != (mean, mean):
            raise ValueError(f"temperature is {value!r}, which averages: early and late must be 'mean'")
        if self.window is None:
            raise ValueError(
                f"temperature is {value!r} and window is None: tokens are shared out within a window, which must be a "
                "whole number of cells"
            )
        if self.threshold is not None:
            raise ValueError(f"temperature is {value!r} and threshold is {self.threshold!r}: give one of them")

    @classmethod
    def of(cls, ratio: float | TokenFusion = 0.5, /, **options: Any) -> TokenFusion:
        """A TokenFusion from a ratio, or from another TokenFusion, with any options changed.

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
    def key(self) -> str:
        """A short name for rows, folders and plots alike: 'tofu-r50', 'kv-mean-r75+p'."""
        reductions = (reduction_named(self.early).__name__, reduction_named(self.late).__name__)
        name = "tofu" if reductions == ("prune", "mlerp") else "-".join(dict.fromkeys(reductions))
        parts = ["kv-" * self.keys_only + name, f"r{100 * self.ratio:g}"]
        default = type(self)()
        if self.depth_split is not None:
            parts.append(f"d{self.depth_split}")
        for letter, value, usual in (
            ("l", self.levels, default.levels),
            ("min", self.min_tokens, default.min_tokens),
            ("w", self.window, None),
            ("every", self.match_every, default.match_every),
            ("above", self.threshold, None),
            ("decay", self.threshold_decay, default.threshold_decay),
            ("least", self.threshold_least, default.threshold_least),
            ("soft", self.temperature, None),
            ("seed", self.seed, None),
        ):
            if value != usual:
                parts.append(f"{letter}{value}")
        if (self.sx, self.sy) != (2, 2):
            parts.append(f"{self.sx}x{self.sy}")
        if (self.start, self.end) != (0, 1):
            parts.append(f"t{100 * self.start:g}to{100 * self.end:g}")
        marks = {
            "shared": self.share_level,
            "cfg": self.share_guidance,
            "normed": self.match_on == "normed",
            "x": self.merge_crossattn,
            "mlp": self.merge_mlp,
            "noattn": not self.merge_attn,
        }
        parts += [mark for mark, on in marks.items() if on]
        return "-".join(parts) + "+p" * self.proportional

    @property
    def timed(self) -> bool:
        """Whether what is done depends on the timestep."""
        several = self.match_every > 1 or self.threshold is not None
        return self.seed is not None or (self.start, self.end) != (0, 1) or several

    def reduction(self, depth: int, down_path: int) -> Reduction:
        """Eq. 7: what a block at `depth` does in a model whose down path has `down_path` transformer blocks."""
        if self.depth_split == "auto":
            raise ValueError("depth_split is 'auto', which is measured on a pipeline of diffusers: give a number here")
        d = down_path if self.depth_split is None else int(self.depth_split)
        return reduction_named(self.early if depth < d else self.late)

    @property
    def layers(self) -> tuple[str, ...]:
        """Which layers of a block run on fused tokens, in the order in which they run: 'attn', 'crossattn', 'mlp'."""
        merged = {"attn": self.merge_attn, "crossattn": self.merge_crossattn, "mlp": self.merge_mlp}
        return tuple(layer for layer, on in merged.items() if on)

    def leaving(self, h: int, w: int) -> int:
        """r: how many tokens of an h x w map leave; never more than its sources, which are few in a thin map.

        Under a threshold this is the most.
        """
        sources = h * w - max(1, h // self.sy) * max(1, w // self.sx)
        if self.temperature is not None:
            return sources if self.ratio else 0
        return min(int(h * w * self.ratio), sources)

    def bucket(self, most: int, alike: float) -> int:
        """How many of `most` tokens leave where so many are `alike`: the largest eighth that is not above that."""
        return max(r for r in (most * eighth // BUCKETS for eighth in range(BUCKETS + 1)) if r <= alike)

    def threshold_at(self, depth: int) -> float | None:
        """The threshold of the block at `depth`, None where there is none."""
        if self.threshold is None:
            return None
        return falling_threshold(self.threshold, self.threshold_decay, self.threshold_least, depth)


_SWITCHES = tuple(field.name for field in fields(TokenFusion) if field.type == "bool")


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
