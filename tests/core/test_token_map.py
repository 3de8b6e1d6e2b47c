"""Laws of the TokenMap and of the verbs that take it, for every shape (hypothesis), dtype and batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu_sd.core.matching import bipartite_soft_matching
from tofu_sd.core.partition import partition
from tofu_sd.core.reductions import REDUCTIONS, mean, mlerp, prune, reduce_by_id, reduction_id, unmerge
from tofu_sd.core.token_map import TokenMap, draw_merge_map

CPU = torch.device("cpu")


@st.composite
def maps(draw):
    """Tokens x [B, N, C] and a TokenMap of them, over odd, thin and indivisible maps and cells of 1 to 3."""
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    sx, sy = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    B, C = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**31 - 1))
    drawn = torch.tensor(seed) if draw(st.booleans()) else None
    parts = partition(h, w, sx, sy, CPU, drawn)
    r = draw(st.integers(0, len(parts.src)))
    x = torch.randn(B, h * w, C, generator=torch.Generator().manual_seed(seed))
    return x, bipartite_soft_matching(x, parts, r), r


@given(maps())
@settings(deadline=None, max_examples=150)
def test_every_token_has_one_home_and_survivors_are_at_home_with_themselves(case):
    x, map, r = case
    B, N, _ = x.shape
    assert map.kept_idx.shape == (B, N - r)
    assert map.group_idx.shape == (B, N)
    assert torch.equal(map.group_idx.gather(1, map.kept_idx), torch.arange(N - r).expand(B, -1))
    assert all(len(row.unique()) == N - r for row in map.kept_idx)  # no token survives twice


@given(maps())
@settings(deadline=None, max_examples=100)
def test_sizes_count_all_tokens(case):
    x, map, _ = case
    assert map.size.sum(dim=1).tolist() == [x.shape[1]] * x.shape[0]
    assert map.size.min() >= 1  # a survivor stands for itself at least


@given(maps())
@settings(deadline=None, max_examples=100)
def test_pruning_undoes_unmerging_bit_for_bit(case):
    x, map, _ = case
    fused = prune(x, map)
    assert torch.equal(unmerge(fused, map).gather(1, map.kept_idx.unsqueeze(-1).expand(-1, -1, x.shape[-1])), fused)


@given(maps())
@settings(deadline=None, max_examples=100)
def test_nothing_leaving_is_the_identity_up_to_order(case):
    x = case[0]
    map = bipartite_soft_matching(x, partition(1, x.shape[1], 2, 1, CPU), 0)
    for reduction in REDUCTIONS.values():
        # mlerp divides by a norm and multiplies by it again: one rounding each
        assert torch.allclose(unmerge(reduction(x, map), map), x, rtol=1e-6, atol=1e-7)
    assert torch.equal(unmerge(prune(x, map), map), x)


@given(maps(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(deadline=None, max_examples=100)
def test_a_constant_survives_fusion(case, dtype):
    """A flat sky stays flat: fusing equal tokens moves nothing."""
    x, map, _ = case
    flat = x[:, :1].to(dtype).expand_as(x)
    for reduction in REDUCTIONS.values():
        # sums of at most 81 equal float32 numbers, then one rounding to `dtype`
        torch.testing.assert_close(
            unmerge(reduction(flat, map), map), flat, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6
        )


def by_hand(x, map, one_group):
    """Each group reduced by a loop over tokens, the definition read off the paper."""
    B, K = map.kept_idx.shape
    out = torch.empty(B, K, x.shape[-1], dtype=torch.float64)
    for b in range(B):
        for k in range(K):
            out[b, k] = one_group(x[b, map.group_idx[b] == k].double())
    return out


@given(maps())
@settings(deadline=None, max_examples=60)
def test_mean_is_the_group_average_with_the_survivor_in_it(case):
    x, map, _ = case
    expected = by_hand(x, map, lambda group: group.mean(0))
    # float32 sums of at most 81 numbers of order 1: 81 roundings of 6e-8 stay below 1e-5
    assert torch.allclose(mean(x, map).double(), expected, atol=1e-5)


@given(maps())
@settings(deadline=None, max_examples=60)
def test_mlerp_has_the_direction_of_the_mean_and_the_largest_norm_of_the_group(case):
    x, map, _ = case
    y = mlerp(x, map).double()
    largest = by_hand(x, map, lambda group: group.norm(dim=-1).max())[..., 0]
    direction = by_hand(x, map, lambda group: group.mean(0))
    kept = direction.norm(dim=-1) > 1e-3  # where the mean nearly vanishes its direction is rounding
    assert torch.allclose(y.norm(dim=-1)[kept], largest[kept], rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(y, direction, dim=-1)
    assert torch.allclose(cosine[kept], torch.ones_like(cosine[kept]), atol=1e-4)


@pytest.mark.parametrize(("src", "dst"), [(3.0, 1.0), (1.0, 3.0)])
def test_mlerp_keeps_the_largest_norm_whether_source_or_destination_has_it(src, dst):
    """Other implementations of the paper divide by the destination's norm, or leave it out of the maximum."""
    x = torch.tensor([[[dst, 0.0], [0.0, src]]])
    y = mlerp(x, TokenMap(torch.tensor([[0]]), torch.tensor([[0, 0]])))
    assert y.norm().item() == pytest.approx(3.0, rel=1e-6)
    assert (y / y.norm()).flatten().tolist() == pytest.approx([dst / 10**0.5, src / 10**0.5], rel=1e-6)


@pytest.mark.parametrize("norm", [1e-38, 1.0, 5.0, 1e4])
def test_mlerp_of_opposite_tokens_is_zero_and_not_nan(norm):
    """Their mean has no direction, whatever their norm: neither it nor its gradient may blow up."""
    x = torch.tensor([[[norm, 0.0], [-norm, 0.0]]], requires_grad=True)
    y = mlerp(x, TokenMap(torch.tensor([[0]]), torch.tensor([[0, 0]])))
    y.sum().backward()
    assert y.tolist() == [[[0.0, 0.0]]]
    assert x.grad.abs().max() <= norm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_half_precision_is_the_float32_result_rounded(name, dtype):
    """Sums are held in float32, so that a group of 1,000 tokens costs one rounding, not a thousand."""
    x = (torch.randn(1, 1024, 8, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    map = TokenMap(torch.tensor([[0, 1]]), torch.cat((torch.tensor([0, 1]), torch.zeros(1022).long()))[None])
    y, exact = REDUCTIONS[name](x, map), REDUCTIONS[name](x.float(), map)
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_gradients_are_those_of_finite_differences(name):
    parts = partition(3, 3, 2, 2, CPU)
    x = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(1))
    map = bipartite_soft_matching(x, parts, 4)
    reduction = REDUCTIONS[name]
    x = x.requires_grad_()
    weight = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2))
    (reduction(x, map) * weight).sum().backward()
    # reductions sum in float32, so differences are taken over a step of 1e-2 and agree to its square and rounding
    for index in [(0, 0, 0), (0, 4, 1), (1, 8, 2), (1, 3, 0)]:
        step = torch.zeros_like(x)
        step[index] = 1e-2
        with torch.no_grad():
            up, down = (reduction(x + s * step, map) * weight for s in (1, -1))
            slope = (up.sum() - down.sum()) / 2e-2
        assert x.grad[index].item() == pytest.approx(slope.item(), abs=2e-3)


@given(maps(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=60)
def test_the_operator_of_all_reductions_is_each_of_them(case, dtype):
    """Compiled code sees one operator; what it computes must be what eager code computes, for a user's own too."""
    x, map, _ = case
    x = x.to(dtype)

    def double(x, map):
        return 2 * prune(x, map)

    for reduction in (*REDUCTIONS.values(), double):
        assert reduction_id(reduction) >= 2
        assert torch.equal(reduce_by_id(x, *map, reduction_id(reduction)), reduction(x, map))


@given(maps(), st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_two_maps_in_a_row_are_one_map(case, more):
    x, first, _ = case
    y = prune(x, first)
    later = bipartite_soft_matching(y, partition(1, y.shape[1], 2, 1, CPU), min(more, y.shape[1] // 2))
    both = first.compose(later)
    assert torch.equal(prune(y, later), prune(x, both))
    z = prune(y, later)
    assert torch.equal(unmerge(unmerge(z, later), first), unmerge(z, both))


def test_fused_attention_over_identical_tokens_is_full_attention_once_weighted_by_size():
    """log(n_i) on a key's logit makes one key count as n_i (ATM appendix A); without it the result is another."""
    g = torch.Generator().manual_seed(3)
    distinct = torch.randn(1, 4, 8, generator=g)
    home = torch.tensor([[0, 1, 2, 3, 0, 0, 0, 1, 2, 0]])
    map, x = TokenMap(torch.tensor([[0, 1, 2, 3]]), home), distinct.gather(1, home.unsqueeze(-1).expand(-1, -1, 8))
    attention = torch.nn.functional.scaled_dot_product_attention
    full, fused = attention(x, x, x), mean(x, map)
    weighted = unmerge(attention(fused, fused, fused, attn_mask=map.size.log().unsqueeze(1)), map)
    plain = unmerge(attention(fused, fused, fused), map)
    assert torch.allclose(weighted, full, atol=1e-6)  # one float32 softmax apart
    assert (plain - full).abs().max() > 1e-2


def test_a_merge_map_shows_the_groups_and_who_is_alone() -> None:
    home = torch.tensor([[0, 0, 1, 2, 2, 2]])
    picture = draw_merge_map(TokenMap(torch.tensor([[0, 2, 3]]), home), 2, 3)
    assert picture.shape == (1, 3, 2, 3)
    assert 0 <= picture.min() <= picture.max() <= 1
    colours = picture[0].flatten(1).T
    assert torch.equal(colours[0], colours[1])
    assert torch.equal(colours[3], colours[5])
    assert not torch.equal(colours[0], colours[3])
    assert colours[2].unique().numel() == 1  # gray
