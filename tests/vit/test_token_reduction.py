"""Schedules, thresholds, token sizes and the merging error, without a model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tofu_sd.core.reductions import mean, mlerp, prune
from tofu_sd.core.token_map import TokenMap
from tofu_sd.vit.methods import AdaptiveReduction, TokenReduction, alternating, merging_error
from tofu_sd.vit.reducer import reduce_sized


@given(st.integers(0, 40), st.integers(1, 24), st.integers(1, 300), st.sampled_from(["constant", "decreasing"]))
def test_schedule_keeps_at_least_half_of_each_layers_tokens(r, layers, tokens, schedule):
    leaving = TokenReduction(r, schedule).num_merged(layers, tokens)
    assert len(leaving) == layers
    for gone in leaving:
        assert 0 <= gone <= tokens // 2
        tokens -= gone
    if schedule == "decreasing" and layers > 1:
        assert leaving[-1] == 0


def test_decreasing_schedule_merges_the_same_total():
    assert TokenReduction(8).num_merged(12, 196) == [8] * 12
    decreasing = TokenReduction(8, "decreasing").num_merged(12, 196)
    assert decreasing == [16, 15, 13, 12, 10, 9, 7, 6, 4, 3, 1, 0]
    assert sum(decreasing) == 96


@pytest.mark.parametrize("reduction", [prune, mean, mlerp])
def test_token_size_weights_the_reduction(reduction):
    """A token of size 3 merges like three equal tokens."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 5, generator=g)
    size = torch.tensor([[1.0, 3, 1, 1, 2, 1, 5, 1]]).expand(2, -1)
    map = TokenMap(torch.tensor([[0, 2, 4, 6]]).expand(2, -1), torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]]).expand(2, -1))
    many = x.repeat_interleave(size[0].long(), dim=1)
    group_idx = map.group_idx.repeat_interleave(size[0].long(), dim=1)
    spread = TokenMap(torch.stack([(group_idx[0] == k).nonzero()[0, 0] for k in range(4)]).expand(2, -1), group_idx)
    assert torch.allclose(reduce_sized(reduction, x, map, size), reduction(many, spread), atol=1e-5)


def test_sources_and_destinations_alternate():
    parts = alternating(7, torch.device("cpu"))
    assert parts.src.tolist() == [1, 3, 5]
    assert parts.dst.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("layer", "threshold"), [(0, 0.9), (1, 0.9 - math.expm1(0.05)), (3, 0.9 - math.expm1(0.15)), (11, 0.6)]
)
def test_layer_thresholds_fall_from_alpha_to_the_minimum(layer, threshold):
    """Eq. 1, whose layers are numbered from 1."""
    assert AdaptiveReduction(0.9, 0.05, 0.6).threshold(layer) == pytest.approx(threshold)


@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 200))
def test_merging_error_is_within_its_bounds(seed, n1, n2):
    """Theorem 1, and Eq. 5 of its proof, which is exact."""
    g = torch.Generator().manual_seed(seed)
    x1, x2 = torch.randn(2, 7, 4, generator=g, dtype=torch.float64)
    sizes = torch.full((7,), float(n1), dtype=torch.float64), torch.full((7,), float(n2), dtype=torch.float64)
    apart = 1 - torch.nn.functional.cosine_similarity(x1, x2, dim=-1)
    low = n1 * n2 / (n1 + n2) * apart
    error = merging_error(x1, x2, *sizes)
    assert (error >= low - 1e-9).all()
    assert (error <= 2 * low + 1e-9).all()
    exact = (n1 + n2) - ((n1 + n2) ** 2 - 2 * n1 * n2 * apart).sqrt()
    assert torch.allclose(error, exact, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 3}, "alpha is 3; it must be a number from -1 to 2"),
        ({"beta": -0.1}, "beta is -0.1; it must be a number from 0"),
        ({"least": float("nan")}, "least is nan; it must be a number from -1 to 1"),
        ({"split": 1.5}, "split is 1.5; it must be a number from 0 to 1"),
        ({"beta": 1000}, "beta is 1000; it must be a number from 0 to 1"),
        ({"beta": math.inf}, "beta is inf; it must be a number from 0 to 1"),
        ({"class_only": 1}, "class_only is 1; it must be True or False"),
    ],
)
def test_thresholds_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveReduction(**options)
