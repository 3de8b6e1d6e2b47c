"""Methods of classifiers are read from their names."""

from __future__ import annotations

import pytest

pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")

from eval import EvalError
from research.classifiers import methods as reductions
from tofu_sd.core.reductions import mean, mlerp, prune
from tofu_sd.vit.methods import AdaptiveReduction, TokenReduction


def test_parse_reads_methods():
    full, tofu, word, atm = reductions.parse("baseline,tofu@depth_split=3,PPPA,atm@beta=0.1", [4], 4)
    assert full is reductions.BASELINE
    assert tofu.reduction == TokenReduction(4, early=prune, late=mlerp, depth_split=3)
    assert word.reduction == TokenReduction(4, early=prune, late=mean, depth_split=3)
    assert atm.reduction == AdaptiveReduction(beta=0.1)
    assert [m.label for m in (full, tofu, word, atm)] == [
        "baseline", "tofu@depth_split=3, r = 4", "PPPA, r = 4", "atm@beta=0.1",
    ]  # fmt: skip
    assert len(reductions.parse("atm@alpha=0.98@beta=0.035@least=0.93", [4, 8], 4)) == 1  # as in ATM's table A2
    several = reductions.parse("baseline,tome", [2, 4], 4)
    assert [m.label for m in several] == ["baseline", "tome, r = 2", "tome, r = 4"]
    (all_average,) = reductions.parse("AAAA", [1], 4)
    assert {all_average.reduction.reduction_at(layer) for layer in range(4)} == {mean}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tomme", r"unknown method 'tomme' \(did you mean 'tome'\?\)"),
        ("PPPAA", "'PPPAA' has 5 letters; it must have one for each of the 4 layers"),
        ("PAPA", "unknown method 'PAPA'"),  # it has more than one split
        ("tofu@late=median", "method 'tofu@late=median': unknown reduction 'median'"),
        ("tofu@speed=2", "method 'tofu@speed=2': .*speed"),
        ("tofu@late", "'late' in method 'tofu@late' is not of the form option=value"),
    ],
)
def test_invalid_method_raises(name, message):
    with pytest.raises(EvalError, match=message):
        reductions.parse(name, [4], 4)


def test_method_settings_hold_no_addresses():
    """Predictions are cached by it: the address of a function in it would never match again."""
    methods = reductions.parse("tome,tofu,atm", [4], 4)
    assert len({method.settings for method in methods}) == 3
    assert all("0x" not in method.settings for method in methods)


def test_label_of_a_layer_pattern_shows_its_r():
    (word,) = reductions.parse("PPPA@r=5", [2, 8], 4)
    assert word.label == "PPPA@r=5, r = 5"
    assert word.reduction.r == 5
