"""Methods of classifiers by their names on the command line."""

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
CURVE = {"alpha", "beta", "least"}  # if one is set, thresholds are fixed; else they follow from r
PATTERN = re.compile(r"([PAM])(\1*)(?:([PAM])(\3*))?")


@dataclass(frozen=True)
class Method:
    """One row of the results.

    Args:
        name: as on the command line.
        reduction: how tokens are merged; None for the baseline.
        r: tokens merged in each layer; for thresholds, the r at which ToMe has the same FLOPs.
    """

    name: str
    reduction: TokenReduction | AdaptiveReduction | None = None
    r: int | None = None

    @property
    def label(self) -> str:
        return self.name if self.r is None else f"{self.name}, r = {self.r}"

    @property
    def settings(self) -> str:
        """All settings, written the same in every process."""
        return "" if self.reduction is None else f"{type(self.reduction).__name__} {fusion_fields(self.reduction)}"

    @property
    def adaptive(self) -> bool:
        return isinstance(self.reduction, AdaptiveReduction)

    def at(self, r: int) -> Method:
        """Returns the method at another r."""
        reduction = replace(self.reduction, r=r) if isinstance(self.reduction, TokenReduction) else self.reduction
        return replace(self, reduction=reduction, r=r)

    def with_thresholds(self, curve: tuple[float, float], scale: float) -> Method:
        """Returns the method with thresholds from 1 - curve[0] × `scale` that fall at rate curve[1] × `scale`."""
        assert isinstance(self.reduction, AdaptiveReduction)
        reduction = replace(self.reduction, alpha=1 - curve[0] * scale, beta=curve[1] * scale, least=-1.0)
        return replace(self, reduction=reduction)

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """Applies the method to a model inside a `with` block. ValueError where it does not fit."""
        if self.reduction is None:
            yield model
            return
        host.apply_patch(model, self.reduction)
        try:
            yield model
        finally:
            host.remove_patch(model)


BASELINE = Method("baseline")


def parse(names: str, rs: Sequence[int], layers: int) -> list[Method]:
    """Parses a list such as "baseline,tofu,PPPPPPAAAAAA,atm@beta=0.03".

    A word of the letters P (prune), A (average) and M (MLERP), one for each layer, is a row of ToFu's table 3.

    Args:
        names: the list. Thresholds that are set, even in part, do not depend on r.
        rs: each method is evaluated at each r.
        layers: number of layers of the model.

    Returns:
        The methods, without duplicates.

    Raises:
        EvalError: an unknown method or option, or a value out of range.
    """
    methods: dict[str, Method] = {}
    for name in (part.strip() for part in names.split(",")):
        for r in rs:
            method = _one(name, r, layers)
            methods.setdefault(method.label, method)
    return list(methods.values())


def _one(name: str, r: int, layers: int) -> Method:
    if name == BASELINE.name:
        return BASELINE
    recipe, *changes = name.split("@")
    if recipe == BASELINE.name:
        raise EvalError(f"{recipe!r} takes no options, and {name!r} sets some")
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
                "and M, one letter for each layer; each may end in @option=value"
            )
        reduction = RECIPES[recipe]
        if isinstance(reduction, AdaptiveReduction):
            return Method(name, replace(reduction, **options), None if CURVE & options.keys() else r)
        reduction = TokenReduction.of(reduction, **{"r": r, **options})
        return Method(name, reduction, reduction.r)
    except (ValueError, TypeError) as error:
        raise EvalError(f"method {name!r}: {error}") from error


def _of_pattern(word: str, match: re.Match[str], layers: int, options: dict[str, Any]) -> TokenReduction:
    if len(word) != layers:
        raise EvalError(f"{word!r} has {len(word)} letters; it must have one for each of the {layers} layers")
    conflicts = {"early", "late", "depth_split"} & options.keys()
    if conflicts:
        raise EvalError(f"{word!r} already sets {sorted(conflicts)[0]}")
    early, late = LETTERS[match[1]], LETTERS[match[3] or match[1]]
    return TokenReduction(early=early, late=late, depth_split=1 + len(match[2]), **options)
