"""Named configurations: those of papers, and ours. `named("kv:tome+p")` parses a method of the command line."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

from .config import TokenFusionConfig
from .core.reductions import mean, mlerp, partial_mlerp, prune
from .utils import did_you_mean

TOFU = TokenFusionConfig(early=prune, late=mlerp)  # Token Fusion, WACV 2024, section 4.2: prune, then MLERP
TOME = TokenFusionConfig(early=mean, late=mean)  # Token Merging for Fast Stable Diffusion, CVPRW 2023: mean everywhere
PRUNE = TokenFusionConfig(early=prune, late=prune)  # ToFu Table 3, PPP…: prune everywhere
MLERP = TokenFusionConfig(early=mlerp, late=mlerp)  # ToFu Eq. 10 everywhere

# ours, by the measurements in docs/performance.md
TOFU_FAST = replace(TOFU, window=8)  # matching within windows of 16 x 16 tokens
TOFU_MAX = replace(TOFU_FAST, levels=2, merge_crossattn=True, merge_mlp=True)  # all layers of two resolutions
FAITHFUL = replace(TOME, proportional=True, window=8)  # proportional attention at the cost of TOFU_FAST
# queries keep their length, which sets how sharp attention is; keys of large groups are averaged, with log(n)
ASYMMETRIC = replace(MLERP, kv_early=partial_mlerp, kv_late=partial_mlerp, proportional=True)
ADAPTIVE = replace(FAITHFUL, threshold=0.7, threshold_decay=-0.016)  # ATM's thresholds, at most `ratio`
CONDENSE = replace(FAITHFUL, temperature=0.03, sx=2, sy=1)  # AdaptiVision's soft clusters, one centroid for each cell

RECIPES = {
    "tofu": TOFU, "tofu-fast": TOFU_FAST, "tofu-max": TOFU_MAX, "faithful": FAITHFUL,
    "asymmetric": ASYMMETRIC, "adaptive": ADAPTIVE, "condense": CONDENSE,
    "tome": TOME, "prune": PRUNE, "mlerp": MLERP,
}  # fmt: skip


def proportional(config: TokenFusionConfig) -> TokenFusionConfig:
    """Returns a configuration with proportional attention (ATM appendix A, ToMe for ViTs): `+p`."""
    return replace(config, proportional=True)


def kv_only(config: TokenFusionConfig) -> TokenFusionConfig:
    """Returns a configuration that merges only keys and values, where ToDo downsamples: `kv:`."""
    return replace(config, kv_only=True)


class UnknownMethodError(ValueError):
    """No recipe has this name."""


def named(name: str, ratio: float = 0.5) -> TokenFusionConfig:
    """Parses a method such as "tofu", "kv:tome+p" or "tofu@depth_split=3@levels=2".

    Args:
        name: `[kv:]RECIPE[+p][@option=value]...`; options are the fields of TokenFusionConfig.
        ratio: share of tokens that are merged.

    Raises:
        UnknownMethodError: an unknown recipe.
        TypeError: an unknown option.
        ValueError: a value out of range.
    """
    method, *changes = name.split("@")
    recipe, plus, mark = method.removeprefix("kv:").partition("+")
    if recipe not in RECIPES or (plus and mark != "p"):
        raise UnknownMethodError(
            f"unknown method {name!r}{did_you_mean(recipe, RECIPES)}; known: {', '.join(RECIPES)}, each may have kv: "
            "before it, +p after it and any number of @option=value at the end"
        )
    options = dict(option(change, name) for change in changes)
    config = TokenFusionConfig.of(
        RECIPES[recipe], **{"ratio": ratio, **options}
    )  # together, as the largest ratio depends on the cells
    if plus:
        config = proportional(config)
    return kv_only(config) if method.startswith("kv:") else config


def option(change: str, method: str) -> tuple[str, Any]:
    """Parses 'levels=2' as ('levels', 2). Numbers, True, False and None are Python's; anything else is a word.

    Args:
        change: of the form option=value.
        method: the whole method, for the error message.

    Raises:
        ValueError: the change has another form.
    """
    name, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"{change!r} in method {method!r} is not of the form option=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
