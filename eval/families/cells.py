"""One cell of the table: a feature with a family, found out by running a tiny random model."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tofu_sd

from .tiny import Tiny

LIBRARY = Path(tofu_sd.__file__).parent
SUPPORTED, REFUSED, ABSENT, WRONG = "yes", "refused", "–", "WRONG"


class Absent(Exception):
    """diffusers does not have a feature in a family. The message says why."""


@dataclass(frozen=True)
class Feature:
    """What may be combined with a patch.

    Args:
        name: of the row.
        options: of the patch.
        make: gives the model; by default the family's tiny model.
        prepare: changes the model.
        call: gives arguments of the model in place of the usual ones.
        run: gives the result of the model.
        before: whether `prepare` comes before the patch.
        alone: whether the feature runs without a patch here; otherwise only its refusal can be shown.
        undone: whether the model gives the baseline again once the patch is removed, with the feature still on.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[[str, Tiny], Any] = lambda family, tiny: tiny.make()
    prepare: Callable[[Any], Any] = lambda model: None
    call: Callable[[str, Tiny], dict[str, Any]] = lambda family, tiny: {}
    run: Callable[[Tiny, Any, dict[str, Any]], Tensor] = lambda tiny, model, call: tiny.predict(model, **call)
    before: bool = False
    alone: bool = True
    undone: bool = True


@dataclass(frozen=True)
class Cell:
    """What was found out. `reason` is the message of a refusal, of diffusers, or of what is wrong."""

    kind: str
    reason: str = ""


def cell(family: str, tiny: Tiny, feature: Feature) -> Cell:
    """Returns whether a feature works with the patched models of a family.

    It does if the patched model merges tokens, ratio 0 equals the unpatched model with the feature bit for bit, and so
    does the model without its patch.

    Args:
        family: name of the family.
        tiny: its tiny model.
        feature: what is tried.
    """
    baseline = None
    try:
        call = feature.call(family, tiny)
        model = feature.make(family, tiny)
        feature.prepare(model)
        if feature.alone:
            baseline = feature.run(tiny, model, call)
    except Absent as absent:
        return Cell(ABSENT, str(absent))
    except Exception as error:
        return Cell(ABSENT, f"fails in diffusers: {_line(error)}")
    try:
        model = feature.make(family, tiny)
        merged = _patched(family, tiny, feature, model, 0.5)
        if baseline is None:
            return Cell(WRONG, "it should be refused, and runs")
        undone = feature.run(tiny, tofu_sd.remove_patch(model), call) if feature.undone else baseline
        unmerged = _patched(family, tiny, feature, feature.make(family, tiny), 0.0)
    except Exception as error:
        return Cell(REFUSED if _is_refusal(error) else WRONG, _line(error).replace(type(model).__name__, "…"))
    return _compared(baseline, merged, unmerged, undone)


def _patched(family: str, tiny: Tiny, feature: Feature, model: Any, ratio: float) -> Tensor:
    """Returns the result of a model with patch and feature."""
    if feature.before:
        feature.prepare(model)
    tofu_sd.apply_patch(model, ratio, **{"min_tokens": 0, **feature.options})
    if not feature.before:
        feature.prepare(model)
    return feature.run(tiny, model, feature.call(family, tiny))


def _compared(baseline: Tensor, merged: Tensor, unmerged: Tensor, undone: Tensor) -> Cell:
    if merged.shape != baseline.shape or not merged.isfinite().all():
        return Cell(WRONG, f"the result is {tuple(merged.shape)} in place of {tuple(baseline.shape)}, or not finite")
    if torch.equal(merged, baseline):
        return Cell(WRONG, "no token is merged")
    if not torch.equal(unmerged, baseline):
        return Cell(WRONG, "ratio 0 differs from the unpatched model")
    if not torch.equal(undone, baseline):
        return Cell(WRONG, "the model without its patch differs from the unpatched model")
    return Cell(SUPPORTED)


def _is_refusal(error: Exception) -> bool:
    """Whether the library itself raised an error, not something that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return LIBRARY in Path(frames[-1].filename).parents


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
