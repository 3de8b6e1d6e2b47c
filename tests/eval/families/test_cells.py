"""What a cell of the table of features says, for features that are right, refused, absent and wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tofu_sd
from eval.families import cells
from eval.families.cells import Absent, Cell, Feature, cell
from eval.families.features import FEATURES
from eval.families.tiny import FAMILIES, Tiny
from eval.reporting import pages

FLUX = FAMILIES["flux.1"]
ROOT = Path(__file__).parents[3]


def _absent(model: Any) -> None:
    raise Absent("nobody wrote it")


def _fails(model: Any) -> None:
    raise KeyError("no such\nlayer")


def _fails_when_patched(model: Any) -> None:
    if tofu_sd.summary(model).config is not None:
        raise RuntimeError("not ours")


def _result(shift_of: Any) -> Any:
    """Runs a model and adds to its result what `shift_of` gives for its configuration."""

    def run(tiny: Tiny, model: Any, call: dict[str, Any]) -> Tensor:
        return tiny.predict(model, **call) + shift_of(tofu_sd.summary(model).config)

    return run


NAN = float("nan")
EXPECTED: dict[str, tuple[Feature, Cell]] = {
    "right": (Feature(""), Cell(cells.SUPPORTED)),
    "refused": (
        Feature("", {"levels": 2}),
        Cell(cells.REFUSED, "levels is 2, and … has one resolution: leave levels off"),
    ),
    "absent": (Feature("", prepare=_absent), Cell(cells.ABSENT, "nobody wrote it")),
    "broken in diffusers": (Feature("", prepare=_fails), Cell(cells.ABSENT, r"fails in diffusers: 'no such\nlayer'")),
    "another's error": (Feature("", prepare=_fails_when_patched), Cell(cells.WRONG, "not ours")),
    "not refused": (Feature("", alone=False), Cell(cells.WRONG, "it should be refused, and runs")),
    "merges nothing": (Feature("", {"min_tokens": 100}), Cell(cells.WRONG, "no token is merged")),
    "not finite": (
        Feature("", run=_result(lambda config: NAN if config else 0.0)),
        Cell(cells.WRONG, "the result is (2, 64, 16) in place of (2, 64, 16), or not finite"),
    ),
    "ratio 0 differs": (
        Feature("", run=_result(lambda config: 1.0 if config else 0.0)),
        Cell(cells.WRONG, "ratio 0 differs from the unpatched model"),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_cell_says_what_is_so(name: str) -> None:
    feature, expected = EXPECTED[name]
    assert cell("flux.1", FLUX, feature) == expected


def test_trace_of_a_removed_patch_is_wrong() -> None:
    """A model that was patched once and is not the same afterwards."""
    seen: list[Any] = []

    def run(tiny: Tiny, model: Any, call: dict[str, Any]) -> Tensor:
        config = tofu_sd.summary(model).config
        seen.append(config)
        return tiny.predict(model, **call) + float(config is None and any(seen))

    found = cell("flux.1", FLUX, Feature("", run=run))
    assert found == Cell(cells.WRONG, "the model without its patch differs from the unpatched model")


def test_features_leave_nothing_behind() -> None:
    """The same cell after all others: a feature that sets something global would change it."""
    default, backend = (
        next(f for f in FEATURES if f.name == name) for name in ("default", "another attention backend")
    )
    kernel = torch.nn.functional.scaled_dot_product_attention
    assert cell("flux.1", FLUX, backend).kind == cells.REFUSED
    replaced = next(f for f in FEATURES if f.name == "another function for torch's attention")
    assert cell("flux.1", FLUX, replaced).kind == cells.REFUSED
    assert torch.nn.functional.scaled_dot_product_attention is kernel
    assert cell("flux.1", FLUX, default) == Cell(cells.SUPPORTED)


def test_rows_and_columns_are_complete() -> None:
    """Every family of the library has a column, and every row another name."""
    from tofu_sd.hosts.diffusers_transformers import host_of
    from tofu_sd.hosts.diffusers_transformers.registry import FAMILIES as known

    assert len({feature.name for feature in FEATURES}) == len(FEATURES)
    models = [tiny.make() for tiny in FAMILIES.values()]
    assert {type(model).__name__ for model in models} == set(known)
    assert all(host_of(model) is not None for model in models)


def test_published_table_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell is found out again, so that the page cannot claim what does not work."""
    monkeypatch.chdir(ROOT)
    page = Path("docs/tables/transformers.md")
    text = page.read_text()
    assert "<!-- python -m eval.support" in text
    assert pages.filled(text, pages.to_root(page)) == text
