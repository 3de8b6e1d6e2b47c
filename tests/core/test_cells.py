"""Matching within cells of 2 x 2 tokens, against a brute force over all pairings."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tofu_sd
from tofu_sd.core.cells import make_cells, match_cells, match_pairs
from tofu_sd.core.token_map import TokenMap, has_equal_groups

CPU = torch.device("cpu")
sides, seeds = st.integers(1, 9), st.integers(0, 2**31 - 1)


def draw(h, w, seed, batch=2):
    return torch.randn(batch, h * w, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def groups_of(map, b):
    """Returns the groups of several tokens of one sample, as sets of positions."""
    members = {}
    for n, k in enumerate(map.group_idx[b].tolist()):
        members.setdefault(k, set()).add(n)
    return {frozenset(group) for group in members.values() if len(group) > 1}


def cosine(x, y):
    return torch.nn.functional.cosine_similarity(x, y, dim=0).item()


def best_pairs(x, cells):
    """The best of the three pairings of each cell: a list of (cosine, pair)."""
    found = []
    for a, b, c, d in cells:
        pairings = [((a, b), (c, d)), ((a, c), (b, d)), ((a, d), (b, c))]
        scored = [[(cosine(x[i], x[j]), frozenset((i, j))) for i, j in pairing] for pairing in pairings]
        found += max(scored, key=lambda pairs: pairs[0][0] + pairs[1][0])
    return found


@given(sides, sides, seeds, st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_pairs_are_the_most_similar_ones_of_the_best_pairing_of_each_cell(h, w, seed, share):
    x, cells = draw(h, w, seed), make_cells(h, w, CPU)
    r = int(share * 2 * len(cells.tokens))
    map = match_pairs(x, cells, r)
    for b in range(2):
        found = sorted(best_pairs(x[b], cells.tokens.tolist()), key=lambda pair: -pair[0])
        assert groups_of(map, b) == {pair for _, pair in found[:r]}


@given(sides, sides, seeds, st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_cells_are_those_of_the_largest_mean_cosine(h, w, seed, share):
    x, cells = draw(h, w, seed), make_cells(h, w, CPU)
    n = int(share * len(cells.tokens))
    map = match_cells(x, cells, 3 * n)
    unit = torch.nn.functional.normalize(x, dim=-1)
    for b in range(2):
        mean = [(unit[b, cell] @ unit[b, cell].T).mean().item() for cell in cells.tokens]
        chosen = sorted(range(len(mean)), key=lambda i: -mean[i])[:n]
        assert groups_of(map, b) == {frozenset(cells.tokens[i].tolist()) for i in chosen}


@given(sides, sides, seeds)
@settings(deadline=None, max_examples=40)
def test_pairs_twice_make_groups_of_four_from_the_pairs_of_adjacent_cells(h, w, seed):
    x, cells = draw(h, w, seed, batch=1), make_cells(h, w, CPU)
    M = len(cells.tokens)
    once, twice = groups_of(match_pairs(x, cells, 2 * M), 0), groups_of(match_pairs(x, cells, 3 * M), 0)
    assert all(len(group) == 4 for group in twice)
    assert len(twice) == M
    for group in twice:  # a union of two pairs, of the same two cells of a row
        pairs = [pair for pair in once if pair <= group]
        assert len(pairs) == 2
        at = {(n // w // 2, n % w // 4) for n in group}
        assert len(at) == 1
    for row, column in itertools.product(range(h // 2), range(w // 4)):  # the best of the three pairings of four pairs
        near = [pair for pair in once if {(n // w // 2, n % w // 4) for n in pair} == {(row, column)}]
        average = {pair: x[0, sorted(pair)].mean(0) for pair in near}
        a, b, c, d = near
        score = {
            frozenset((p | q, s | t)): cosine(average[p], average[q]) + cosine(average[s], average[t])
            for p, q, s, t in ((a, b, c, d), (a, c, b, d), (a, d, b, c))
        }
        chosen = frozenset(group for group in twice if group & (a | b | c | d))
        assert score[chosen] == pytest.approx(max(score.values()))


@pytest.mark.parametrize(("matching", "step"), [(match_pairs, 1), (match_cells, 3)])
@given(sides, sides, seeds, st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_survivors_stand_for_themselves_and_are_sorted_by_size(matching, step, h, w, seed, share):
    """Attention over classes of one size each needs that order; unmerging needs the first property."""
    x, cells = draw(h, w, seed), make_cells(h, w, CPU)
    M = len(cells.tokens)
    most = 2 * M if step == 1 else 3 * M
    r = int(share * most) // step * step
    map = matching(x, cells, r)
    assert map.after == (2, h * w - r)
    assert torch.equal(map.group_idx.gather(1, map.kept_idx), torch.arange(h * w - r).expand(2, -1))
    size = map.size[0].tolist()
    assert size == sorted(size, reverse=True)
    assert set(size) <= {1.0, step + 1.0}


def test_tokens_that_are_not_finite_are_merged_last():
    x = draw(4, 4, 0, batch=1).float()
    x[0, 0] = float("nan")
    assert frozenset({0}) not in groups_of(match_pairs(x, make_cells(4, 4, CPU), 7), 0)
    assert all(0 not in group for group in groups_of(match_cells(x, make_cells(4, 4, CPU), 9), 0))


@pytest.mark.parametrize(("matching", "ratio", "size"), [("pairs", 0.5, 2), ("pairs", 0.75, 4), ("cells", 0.75, 4)])
def test_equal_groups_need_no_bias(matching, ratio, size):
    """softmax(s + log n) is softmax(s); on an odd map single tokens remain, and the bias is needed."""
    config = tofu_sd.TokenFusionConfig(ratio=ratio, matching=matching, proportional=True)
    assert config.group_size == size
    for side, equal in ((8, True), (7, False)):
        r = config.num_merged(side, side)
        before, after = torch.zeros(1, side * side).long(), torch.zeros(1, side * side - r).long()
        assert has_equal_groups(TokenMap(after, before), config.group_size) == equal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matching": "pairs", "ratio": 0.6}, "ratio is 0.6 and matching is 'pairs': it must be at most 0.5"),
        ({"matching": "pairs", "window": 8}, "window is 8 and matching is 'pairs', which stays within cells"),
        ({"matching": "cells", "seed": 1}, "seed is 1 and matching is 'cells'"),
        ({"matching": "cells", "sx": 3}, "sx is 3, sy is 2 and matching is 'cells', whose cells are 2 x 2"),
        ({"matching": "pairs", "threshold": 0.5}, "matching is 'pairs' and threshold is 0.5"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tofu_sd.TokenFusionConfig(**options)


def test_number_of_merged_tokens():
    """Pairs: the ratio, at most half, or three of four. Cells: whole cells. An odd row and column stay."""
    merged = [
        tofu_sd.TokenFusionConfig(ratio=ratio, matching=matching).num_merged(h, w)
        for matching, ratio, h, w in (
            ("pairs", 0.25, 8, 8), ("pairs", 0.5, 8, 8), ("pairs", 0.75, 8, 8), ("pairs", 0.5, 7, 7),
            ("cells", 0.75, 8, 8), ("cells", 0.5, 8, 8), ("cells", 0.75, 7, 7), ("pairs", 0.5, 1, 8),
        )
    ]  # fmt: skip
    assert merged == [16, 32, 48, 18, 48, 30, 27, 0]
