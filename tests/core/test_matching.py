"""Bipartite matching against a brute-force Algorithm 1, and the partition it starts from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.speed.contender import peak
from tofu_sd.core.matching import bipartite_soft_matching
from tofu_sd.core.partition import partition, windows
from tofu_sd.kernels import reference

CPU = torch.device("cpu")
sides, cells = st.integers(1, 12), st.integers(1, 4)


def brute_force(x, src, dst, r, may_match=lambda s, d: True):
    """Algorithm 1 as a loop over one sample.

    Args:
        may_match: whether source s may match destination d.

    Returns:
        The set of kept tokens, and for every token the kept token that represents it.
    """
    cosine = torch.nn.functional.cosine_similarity
    best_match = {}
    for s in src:
        scores = {d: cosine(x[s], x[d], dim=0).item() for d in dst if may_match(s, d)}
        best = max(scores, key=lambda d: scores[d])
        best_match[s] = (scores[best], best)
    merged = sorted(src, key=lambda s: -best_match[s][0])[:r]
    group_dst = {n: n for n in range(len(x))} | {s: best_match[s][1] for s in merged}
    return set(range(len(x))) - set(merged), [group_dst[n] for n in range(len(x))]


@given(sides, sides, cells, cells, st.integers(0, 2**31 - 1), st.floats(0, 1))
@settings(deadline=None, max_examples=80)
def test_matching_equals_brute_force_algorithm_1(h, w, sx, sy, seed, share):
    parts = partition(h, w, sx, sy, CPU)
    r = int(share * len(parts.src))
    # float64, so that cosine_similarity and the product of unit vectors sort pairs in the same order
    x = torch.randn(2, h * w, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    map = bipartite_soft_matching(x, parts, r)
    for b in range(2):
        kept, group_dst = brute_force(x[b], parts.src.tolist(), parts.dst.tolist(), r)
        assert set(map.kept_idx[b].tolist()) == kept
        assert map.kept_idx[b][map.group_idx[b]].tolist() == group_dst


@given(sides, sides, cells, cells, st.integers(1, 5), st.none() | st.integers(0, 2**31 - 1), st.floats(0, 1))
@settings(deadline=None, max_examples=120)
def test_windowed_matching_equals_brute_force_algorithm_1_within_each_window(h, w, sx, sy, side, draw, share):
    parts = partition(h, w, sx, sy, CPU, None if draw is None else torch.tensor(draw))
    r = int(share * len(parts.src))
    x = torch.randn(2, h * w, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(h * w))

    def window(n):  # rows and columns that fill no cell belong to the last cell
        y, x = min(n // w // sy, max(1, h // sy) - 1), min(n % w // sx, max(1, w // sx) - 1)
        return y // side, x // side

    map = bipartite_soft_matching(x, parts, r, windows(parts, h, w, sx, sy, side))
    for b in range(2):
        may_match = lambda s, d: window(s) == window(d)  # noqa: E731
        kept, group_dst = brute_force(x[b], parts.src.tolist(), parts.dst.tolist(), r, may_match)
        assert set(map.kept_idx[b].tolist()) == kept
        assert map.kept_idx[b][map.group_idx[b]].tolist() == group_dst


def test_window_of_full_size_equals_no_window():
    parts = partition(9, 13, 2, 2, CPU)
    x = torch.randn(2, 117, 7, generator=torch.Generator().manual_seed(0))
    whole, windowed = (bipartite_soft_matching(x, parts, 50, w) for w in (None, windows(parts, 9, 13, 2, 2, 8)))
    assert torch.equal(whole.group_idx, windowed.group_idx)


@given(sides, sides, cells, cells, st.none() | st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=200)
def test_partition_has_one_destination_per_cell_and_each_token_once(h, w, sx, sy, draw):
    src, dst = partition(h, w, sx, sy, CPU, None if draw is None else torch.tensor(draw))
    assert sorted(torch.cat((src, dst)).tolist()) == list(range(h * w))
    assert src.tolist() == sorted(src.tolist())
    cell = {(n // w // sy, n % w // sx) for n in dst.tolist()}
    assert cell == {(y, x) for y in range(max(1, h // sy)) for x in range(max(1, w // sx))}
    if draw is None:
        assert all(n // w % sy == 0 and n % w % sx == 0 for n in dst.tolist())


def test_random_destinations_are_reproducible_and_uniform():
    draws = [partition(64, 64, 2, 2, CPU, torch.tensor(i)).dst for i in range(8)]
    assert torch.equal(draws[3], partition(64, 64, 2, 2, CPU, torch.tensor(3)).dst)
    assert len({tuple(d.tolist()) for d in draws}) == 8
    corner = torch.cat([d // 64 % 2 * 2 + d % 2 for d in draws])
    share = corner.bincount(minlength=4) / len(corner)
    # 8,192 samples: a uniform share of 1/4 has standard deviation 0.0048; the limit is five of them
    assert (share - 0.25).abs().max() < 0.024


def test_matching_is_independent_of_batch():
    parts = partition(6, 5, 2, 2, CPU)
    x = torch.randn(4, 30, 7, generator=torch.Generator().manual_seed(0))
    whole = bipartite_soft_matching(x, parts, 11)
    alone = bipartite_soft_matching(x[2:3], parts, 11)
    assert torch.equal(whole.group_idx[2:3], alone.group_idx)
    assert torch.equal(whole.kept_idx[2:3], alone.kept_idx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_and_zero_tokens_give_a_valid_map_in_each_dtype(dtype):
    """Black borders give tokens that tie or have zero norm; ties go to the earlier source."""
    parts = partition(4, 4, 2, 2, CPU)
    for x in (torch.zeros(1, 16, 3, dtype=dtype), torch.ones(1, 16, 3, dtype=dtype)):
        map = bipartite_soft_matching(x, parts, 5)
        gone = sorted(set(range(16)) - set(map.kept_idx[0].tolist()))
        assert gone == parts.src[:5].tolist()
        assert map.kept_idx[0][map.group_idx[0][gone]].tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_dtype_matches_as_its_float32_values(dtype):
    """Cosines of neighbours differ by less than bfloat16 resolves; its ties would merge the top of the image."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 32), torch.linspace(0, 3, 32), indexing="ij")
    smooth = torch.stack([(x * k).sin() + (y * (5 - k)).cos() for k in range(1, 5)], dim=-1).view(1, 1024, 4).to(dtype)
    parts = partition(32, 32, 2, 2, CPU)
    half, exact = (bipartite_soft_matching(tokens, parts, 512) for tokens in (smooth, smooth.float()))
    assert torch.equal(half.kept_idx, exact.kept_idx)
    assert torch.equal(half.group_idx, exact.group_idx)


def test_chunked_scores_equal_unchunked_scores(monkeypatch):
    parts = partition(8, 9, 2, 2, CPU)
    x = torch.randn(2, 72, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    window_grid = windows(parts, 8, 9, 2, 2, 3)
    whole = [bipartite_soft_matching(x, parts, 20, layout) for layout in (None, window_grid)]
    monkeypatch.setattr(reference, "SCRATCH", 4000)  # a few rows per chunk, with a smaller last chunk
    chunked = [bipartite_soft_matching(x, parts, 20, layout) for layout in (None, window_grid)]
    assert all(torch.equal(a.group_idx, b.group_idx) for a, b in zip(whole, chunked, strict=True))


def test_matching_2048_px_peak_memory_is_below_64_mib():
    """Stable Diffusion 1.5 has 65,536 tokens here; the full score matrix would take 3 GiB."""
    parts = partition(256, 256, 2, 2, CPU)
    x = torch.randn(1, 65536, 320, generator=torch.Generator().manual_seed(0))
    assert peak(lambda: bipartite_soft_matching(x, parts, 32768), CPU) < 64 * 2**20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_nan_and_inf_tokens_give_a_valid_map(value, share):
    """A half-precision model that overflows generates a black image; matching must not raise an index error."""
    parts = partition(6, 6, 2, 2, CPU)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 36, 4, generator=g)
    x[torch.rand(x.shape, generator=g) < share] = value
    map = bipartite_soft_matching(x, parts, 18)
    assert torch.equal(map.group_idx.gather(1, map.kept_idx), torch.arange(18).expand(2, -1))
    assert all(len(row.unique()) == 18 for row in map.kept_idx)


def test_nan_destination_attracts_no_source():
    """One NaN token must not absorb all others; other destinations are always more similar."""
    parts = partition(6, 6, 2, 2, CPU)
    x = torch.rand(1, 36, 4, generator=torch.Generator().manual_seed(0)) + 0.1  # all cosines are positive
    x[0, parts.dst[3]] = float("nan")
    map = bipartite_soft_matching(x, parts, 18)
    assert (map.group_idx[0] == map.group_idx[0, parts.dst[3]]).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_dtype_does_not_change_matching(dtype):
    parts = partition(32, 32, 2, 2, CPU)
    x = torch.randn(1, 1024, 16, generator=torch.Generator().manual_seed(0))
    plain = bipartite_soft_matching(x, parts, 512)
    with torch.autocast("cpu", dtype):
        cast = bipartite_soft_matching(x, parts, 512)
    assert torch.equal(plain.group_idx, cast.group_idx)


def test_matching_leaves_global_rng_unchanged():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    x = torch.ones(1, 16, 3)
    bipartite_soft_matching(x, partition(4, 4, 2, 2, CPU, torch.tensor(1)), 5)
    assert torch.equal(torch.get_rng_state(), before)
