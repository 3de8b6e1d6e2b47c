"""Properties of TokenMap and the functions that use it, for every shape (hypothesis), dtype and batch size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu_sd.core.matching import bipartite_soft_matching
from tofu_sd.core.partition import partition
from tofu_sd.core.reductions import REDUCTIONS, mean, mlerp, partial_mlerp, prune, reduce_by_id, reduction_id, unmerge
from tofu_sd.core.token_map import TokenMap, draw_merge_map

CPU = torch.device("cpu")


@st.composite
def maps(draw):
    """Tokens x [B, N, C] and a TokenMap of them, over odd, thin and indivisible grids, with cells of 1 to 3."""
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    sx, sy = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    B, C = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**31 - 1))
    random_seed = torch.tensor(seed) if draw(st.booleans()) else None
    parts = partition(h, w, sx, sy, CPU, random_seed)
    r = draw(st.integers(0, len(parts.src)))
    x = torch.randn(B, h * w, C, generator=torch.Generator().manual_seed(seed))
    return x, bipartite_soft_matching(x, parts, r), r


@given(maps())
@settings(deadline=None, max_examples=150)
def test_each_token_has_one_group_and_kept_tokens_represent_themselves(case):
    x, map, r = case
    B, N, _ = x.shape
    assert map.kept_idx.shape == (B, N - r)
    assert map.group_idx.shape == (B, N)
    assert torch.equal(map.group_idx.gather(1, map.kept_idx), torch.arange(N - r).expand(B, -1))
    assert all(len(row.unique()) == N - r for row in map.kept_idx)  # no token is kept twice


@given(maps())
@settings(deadline=None, max_examples=100)
def test_group_sizes_sum_to_token_count(case):
    x, map, _ = case
    assert map.size.sum(dim=1).tolist() == [x.shape[1]] * x.shape[0]
    assert map.size.min() >= 1  # a kept token represents at least itself


@given(maps())
@settings(deadline=None, max_examples=100)
def test_prune_undoes_unmerge_exactly(case):
    x, map, _ = case
    merged = prune(x, map)
    assert torch.equal(unmerge(merged, map).gather(1, map.kept_idx.unsqueeze(-1).expand(-1, -1, x.shape[-1])), merged)


@given(maps())
@settings(deadline=None, max_examples=100)
def test_merging_no_tokens_is_the_identity(case):
    x = case[0]
    map = bipartite_soft_matching(x, partition(1, x.shape[1], 2, 1, CPU), 0)
    for reduction in REDUCTIONS.values():
        # mlerp divides by a norm and multiplies by it again: one rounding for each
        assert torch.allclose(unmerge(reduction(x, map), map), x, rtol=1e-6, atol=1e-7)
    assert torch.equal(unmerge(prune(x, map), map), x)


@given(maps(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(deadline=None, max_examples=100)
def test_constant_tokens_stay_constant_in_each_dtype(case, dtype):
    """A flat sky stays flat: merging equal tokens changes nothing."""
    x, map, _ = case
    flat = x[:, :1].to(dtype).expand_as(x)
    for reduction in REDUCTIONS.values():
        # sums of at most 81 equal float32 numbers, then one rounding to `dtype`
        torch.testing.assert_close(
            unmerge(reduction(flat, map), map), flat, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6
        )


def reduce_groups_in_a_loop(x, map, one_group):
    """Reduces each group in a loop over tokens, as the paper defines it."""
    B, K = map.kept_idx.shape
    out = torch.empty(B, K, x.shape[-1], dtype=torch.float64)
    for b in range(B):
        for k in range(K):
            out[b, k] = one_group(x[b, map.group_idx[b] == k].double())
    return out


@given(maps())
@settings(deadline=None, max_examples=60)
def test_mean_averages_the_group_including_the_kept_token(case):
    x, map, _ = case
    expected = reduce_groups_in_a_loop(x, map, lambda group: group.mean(0))
    # float32 sums of at most 81 numbers of order 1: 81 rounding errors of 6e-8 stay below 1e-5
    assert torch.allclose(mean(x, map).double(), expected, atol=1e-5)


@given(maps())
@settings(deadline=None, max_examples=60)
def test_mlerp_has_mean_direction_and_largest_norm(case):
    x, map, _ = case
    y = mlerp(x, map).double()
    largest = reduce_groups_in_a_loop(x, map, lambda group: group.norm(dim=-1).max())[..., 0]
    direction = reduce_groups_in_a_loop(x, map, lambda group: group.mean(0))
    kept = direction.norm(dim=-1) > 1e-3  # where the mean is almost zero, its direction is only rounding error
    assert torch.allclose(y.norm(dim=-1)[kept], largest[kept], rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(y, direction, dim=-1)
    assert torch.allclose(cosine[kept], torch.ones_like(cosine[kept]), atol=1e-4)


@given(maps())
@settings(deadline=None, max_examples=60)
def test_partial_mlerp_lies_between_the_mean_and_mlerp_by_the_size_of_the_group(case):
    """A pair becomes MLERP; in a group of n tokens 1 / (n - 1)^2 of what MLERP adds is added."""
    x, map, _ = case
    average, whole = mean(x, map).double(), mlerp(x, map).double()
    share = (map.size.double() - 1).clamp_min(1) ** -2
    expected = average + share.unsqueeze(-1) * (whole - average)
    torch.testing.assert_close(partial_mlerp(x, map).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("src", "dst"), [(3.0, 1.0), (1.0, 3.0)])
def test_mlerp_keeps_largest_norm_of_source_or_destination(src, dst):
    """Other implementations of the paper divide by the destination's norm, or exclude it from the maximum."""
    x = torch.tensor([[[dst, 0.0], [0.0, src]]])
    y = mlerp(x, TokenMap(torch.tensor([[0]]), torch.tensor([[0, 0]])))
    assert y.norm().item() == pytest.approx(3.0, rel=1e-6)
    assert (y / y.norm()).flatten().tolist() == pytest.approx([dst / 10**0.5, src / 10**0.5], rel=1e-6)


@pytest.mark.parametrize("norm", [1e-38, 1.0, 5.0, 1e4])
def test_mlerp_of_opposite_tokens_is_zero_and_not_nan(norm):
    """The mean has no direction, whatever the norm; value and gradient stay finite."""
    x = torch.tensor([[[norm, 0.0], [-norm, 0.0]]], requires_grad=True)
    y = mlerp(x, TokenMap(torch.tensor([[0]]), torch.tensor([[0, 0]])))
    y.sum().backward()
    assert y.tolist() == [[[0.0, 0.0]]]
    assert x.grad.abs().max() <= norm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_half_precision_dtype_equals_rounded_float32_result(name, dtype):
    """Sums are float32, so a group of 1,000 tokens is rounded once, not 1,000 times."""
    x = (torch.randn(1, 1024, 8, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    map = TokenMap(torch.tensor([[0, 1]]), torch.cat((torch.tensor([0, 1]), torch.zeros(1022).long()))[None])
    y, exact = REDUCTIONS[name](x, map), REDUCTIONS[name](x.float(), map)
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_gradients_equal_finite_differences(name):
    parts = partition(3, 3, 2, 2, CPU)
    x = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(1))
    map = bipartite_soft_matching(x, parts, 4)
    reduction = REDUCTIONS[name]
    x = x.requires_grad_()
    weight = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2))
    (reduction(x, map) * weight).sum().backward()
    # reductions sum in float32: a step of 1e-2 agrees up to its square and rounding
    for index in [(0, 0, 0), (0, 4, 1), (1, 8, 2), (1, 3, 0)]:
        step = torch.zeros_like(x)
        step[index] = 1e-2
        with torch.no_grad():
            up, down = (reduction(x + s * step, map) * weight for s in (1, -1))
            slope = (up.sum() - down.sum()) / 2e-2
        assert x.grad[index].item() == pytest.approx(slope.item(), abs=2e-3)


@given(maps(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=60)
def test_reduce_by_id_equals_each_reduction_in_each_dtype(case, dtype):
    """Compiled code calls one operator; its results equal eager code, also for a user's own reduction."""
    x, map, _ = case
    x = x.to(dtype)

    def double(x, map):
        return 2 * prune(x, map)

    for reduction in (*REDUCTIONS.values(), double):
        assert reduction_id(reduction) >= 2
        (reduced,) = reduce_by_id(x, map.tensors, [reduction_id(reduction)])
        assert torch.equal(reduced, reduction(x, map))
        for other in REDUCTIONS.values():
            both = reduce_by_id(x, map.tensors, [reduction_id(reduction), reduction_id(other)])
            assert both[0].data_ptr() != both[1].data_ptr()  # torch forbids that results of an operator share memory
            assert all(torch.equal(a, f(x, map)) for a, f in zip(both, (reduction, other), strict=True))


@given(maps(), st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_compose_equals_two_maps_in_sequence(case, more):
    x, first, _ = case
    y = prune(x, first)
    later = bipartite_soft_matching(y, partition(1, y.shape[1], 2, 1, CPU), min(more, y.shape[1] // 2))
    both = first.compose(later)
    assert torch.equal(prune(y, later), prune(x, both))
    z = prune(y, later)
    assert torch.equal(unmerge(unmerge(z, later), first), unmerge(z, both))


def test_proportional_attention_over_identical_tokens_equals_full_attention():
    """log(n_i) added to the logit of key i makes it count n_i times (ATM appendix A); without it the result differs."""
    g = torch.Generator().manual_seed(3)
    distinct = torch.randn(1, 4, 8, generator=g)
    group_idx = torch.tensor([[0, 1, 2, 3, 0, 0, 0, 1, 2, 0]])
    map, x = (
        TokenMap(torch.tensor([[0, 1, 2, 3]]), group_idx),
        distinct.gather(1, group_idx.unsqueeze(-1).expand(-1, -1, 8)),
    )
    attention = torch.nn.functional.scaled_dot_product_attention
    full, merged = attention(x, x, x), mean(x, map)
    weighted = unmerge(attention(merged, merged, merged, attn_mask=map.log_size.unsqueeze(1)), map)
    plain = unmerge(attention(merged, merged, merged), map)
    assert torch.allclose(weighted, full, atol=1e-6)  # differs by one float32 softmax
    assert (plain - full).abs().max() > 1e-2


def test_draw_merge_map_colours_groups_and_leaves_single_tokens_gray() -> None:
    group_idx = torch.tensor([[0, 0, 1, 2, 2, 2]])
    image = draw_merge_map(TokenMap(torch.tensor([[0, 2, 3]]), group_idx), 2, 3)
    assert image.shape == (1, 3, 2, 3)
    assert 0 <= image.min() <= image.max() <= 1
    colours = image[0].flatten(1).T
    assert torch.equal(colours[0], colours[1])
    assert torch.equal(colours[3], colours[5])
    assert not torch.equal(colours[0], colours[3])
    assert colours[2].unique().numel() == 1  # gray
