"""A classifier's method by its name on the command line -> how its tokens are fused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from eval import EvalError
from eval.methods.registry import fusion_fields
from tofu_sd import recipes
from tofu_sd.hosts import timm as host
from tofu_sd.utils import did_you_mean
from tofu_sd.vit.methods import RECIPES, AdaptiveReduction, TokenReduction

LETTERS = {"P": "prune", "A": "mean", "M": "mlerp"}
CURVE = {"alpha", "beta", "least"}  # given, thresholds are as they are told; else those of an r
PATTERN = re.compile(r"([PAM])(\1*)(?:([PAM])(\3*))?")


@dataclass(frozen=True)
class Method:
    """One row. told: None is the full model. r: tokens that leave in each layer; of thresholds, those of the method
    whose operations they are set to.
    """  # fmt: skip

    name: str
    told: TokenReduction | AdaptiveReduction | None = None
    r: int | None = None

    @property
    def label(self) -> str:
        return self.name if self.r is None else f"{self.name}, r = {self.r}"

    @property
    def settings(self) -> str:
        """All that decides what it does, the same in every process."""
        return "" if self.told is None else f"{type(self.told).__name__} {fusion_fields(self.told)}"

    @property
    def adaptive(self) -> bool:
        return isinstance(self.told, AdaptiveReduction)

    def at(self, r: int) -> Method:
        """The same at another r."""
        told = replace(self.told, r=r) if isinstance(self.told, TokenReduction) else self.told
        return replace(self, told=told, r=r)

    def falling(self, curve: tuple[float, float], scale: float) -> Method:
        """The same with thresholds that begin curve[0] × `scale` below 1 and fall at a rate of curve[1] × `scale`."""
        assert isinstance(self.told, AdaptiveReduction)
        told = replace(self.told, alpha=1 - curve[0] * scale, beta=curve[1] * scale, least=-1.0)
        return replace(self, told=told)

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside, the model works on fewer tokens. ValueError for a method that does not fit it."""
        if self.told is None:
            yield model
            return
        host.apply_patch(model, self.told)
        try:
            yield model
        finally:
            host.remove_patch(model)


BASELINE = Method("full")


def parse(names: str, rs: Sequence[int], layers: int) -> list[Method]:
    """The methods of a list such as "full,tofu,PPPPPPAAAAAA,atm@beta=0.03", each at every r, each once.

    Thresholds that are given in full or in part are as they are told, whatever r. A word of P (prune), A (average) and
    M (MLERP), as many as the model has layers, is ToFu's table 3. EvalError for an unknown method or option, or a value
    out of range.
    """
    found: dict[str, Method] = {}
    for name in (part.strip() for part in names.split(",")):
        for r in rs:
            method = _one(name, r, layers)
            found.setdefault(method.label, method)
    return list(found.values())


def _one(name: str, r: int, layers: int) -> Method:
    if name == BASELINE.name:
        return BASELINE
    recipe, *changes = name.split("@")
    if recipe == BASELINE.name:
        raise EvalError(f"{recipe!r} takes no options, and {name!r} gives some")
    try:
        options = dict(recipes.option(change, name) for change in changes)
        pattern = PATTERN.fullmatch(recipe)
        if pattern:
            fixed = _of_pattern(recipe, pattern, layers, {"r": r, **options})
            return Method(name, fixed, fixed.r)
        if recipe not in RECIPES:
            known = [BASELINE.name, *RECIPES]
            raise EvalError(
                f"unknown method {recipe!r}{did_you_mean(recipe, known)}; known: {', '.join(known)}, or a word of P, A "
                "and M, a letter a layer; each with any @option=value behind it"
            )
        told = RECIPES[recipe]
        if isinstance(told, AdaptiveReduction):
            return Method(name, replace(told, **options), None if CURVE & options.keys() else r)
        told = TokenReduction.of(told, **{"r": r, **options})
        return Method(name, told, told.r)
    except (ValueError, TypeError) as error:
        raise EvalError(f"method {name!r}: {error}") from error


def _of_pattern(word: str, found: re.Match[str], layers: int, options: dict[str, Any]) -> TokenReduction:
    if len(word) != layers:
        raise EvalError(f"{word!r} has {len(word)} letters; the model has {layers} layers, and each takes one")
    told = {"early", "late", "depth_split"} & options.keys()
    if told:
        raise EvalError(f"{word!r} says itself what {sorted(told)[0]} would")
    early, late = LETTERS[found[1]], LETTERS[found[3] or found[1]]
    return TokenReduction(early=early, late=late, depth_split=1 + len(found[2]), **options)
