"""A paper a line. `named("kv:mean+p", ratio=0.5)` reads a recipe as the evaluation's command line writes it."""

from __future__ import annotations

from dataclasses import replace

from .policy import TokenFusion, did_you_mean
from .reduce import mean, mlerp, prune

TOFU = TokenFusion(early=prune, late=mlerp)  # Token Fusion, WACV 2024, section 4.2: prune, then MLERP
TOME = TokenFusion(early=mean, late=mean)  # Token Merging for Fast Stable Diffusion, CVPRW 2023: mean everywhere
PRUNE = TokenFusion(early=prune, late=prune)  # ToFu Table 3, PPP…: prune everywhere
MLERP = TokenFusion(early=mlerp, late=mlerp)  # ToFu Eq. 10 everywhere

RECIPES = {"tofu": TOFU, "tome": TOME, "prune": PRUNE, "mlerp": MLERP}


def proportional(fusion: TokenFusion) -> TokenFusion:
    """The same with log(n_i) on the keys (ATM appendix A, ToMe for ViTs): `+p`."""
    return replace(fusion, proportional=True)


def keys_only(fusion: TokenFusion) -> TokenFusion:
    """The same on keys and values alone, queries whole (the place where ToDo downsamples): `kv:`."""
    return replace(fusion, keys_only=True)


def named(name: str, ratio: float = 0.5) -> TokenFusion:
    """The recipe written `[kv:]NAME[+p]`. ValueError for an unknown name."""
    base, plus, marks = name.removeprefix("kv:").partition("+")
    if base not in RECIPES or (plus and marks != "p"):
        hint = did_you_mean(base, RECIPES)
        raise ValueError(
            f"unknown method {name!r}{hint}; known: {', '.join(RECIPES)}, each with a kv: before or a +p behind"
        )
    fusion = replace(RECIPES[base], ratio=ratio)
    fusion = proportional(fusion) if plus else fusion
    return keys_only(fusion) if name.startswith("kv:") else fusion
