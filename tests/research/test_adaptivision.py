"""AdaptiVision's parts: clusters, modulated attention, the gate, the losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.adaptivision.model import (
    AdaptiveFocusAttention,
    AdaptiVision,
    CrossModalTokenFusion,
    DynamicTokenClustering,
    Size,
    TokenSelection,
    alignment_loss,
    pool,
)
from tofu_sd.core.matching import soft_assignment


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 5), st.floats(0.05, 500))
def test_each_token_is_shared_out_whole(seed, n, k, temperature):
    z, centroids = tokens(2, n, 4, seed=seed), tokens(2, k, 4, seed=seed + 1)
    weights = soft_assignment(z, centroids, temperature)
    assert weights.shape == (2, n, k)
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(2, n, dtype=torch.float64))


def test_cold_each_token_goes_to_its_nearest_centroid_alone():
    z, centroids = tokens(2, 9, 4), tokens(2, 3, 4, seed=1)
    hard = torch.nn.functional.one_hot(torch.cdist(z, centroids).argmin(-1), 3)
    assert torch.allclose(soft_assignment(z, centroids, 1e-6), hard.double())


def test_hot_each_token_goes_everywhere_alike():
    weights = soft_assignment(tokens(2, 9, 4), tokens(2, 3, 4, seed=1), 1e9)
    assert torch.allclose(weights, torch.full_like(weights, 1 / 3), atol=1e-6)


def test_what_is_not_used_gets_nothing():
    used = torch.tensor([[True, False, True], [True, True, False]])
    weights = soft_assignment(tokens(2, 9, 4), tokens(2, 3, 4, seed=1), 5.0, used)
    assert (weights.sum(1) > 0).tolist() == used.tolist()
    assert torch.allclose(weights.sum(-1), torch.ones(2, 9, dtype=torch.float64))


def test_super_tokens_are_the_weighted_sums_and_the_distance_that_of_eq_14():
    clustering = DynamicTokenClustering(4, 3, 3, temperature=2.0, iterations=0).double()
    z = tokens(1, 7, 4)
    found = clustering(z)
    order = soft_assignment(z, clustering.centroids[None], 2.0).sum(1).argsort(descending=True)[0]
    mu = clustering.centroids[order].detach()
    a = soft_assignment(z, mu[None], 2.0)[0]
    by_hand = torch.stack([sum(a[i, k] * z[0, i] for i in range(7)) for k in range(3)])
    assert torch.allclose(found.tokens[0], by_hand)
    apart = sum(a[i, k] * (z[0, i] - mu[k]).square().sum() for i in range(7) for k in range(3)) / 7
    assert torch.allclose(found.distance, apart)


def test_a_plain_picture_gets_few_clusters_and_a_rich_one_many():
    clustering = DynamicTokenClustering(8, 2, 12, temperature=0.1).double()
    plain = clustering.centroids[3].detach().expand(40, -1)
    rich = clustering.centroids.detach().repeat(4, 1)[:40]
    found = clustering(torch.stack([plain, rich]))
    counts = found.used.sum(1).tolist()
    assert counts[0] == 2
    assert counts[1] >= 11
    assert found.tokens.shape[1] == max(counts)  # no more than the richest picture needs
    alone = clustering(plain[None])
    assert torch.allclose(alone.tokens[0], found.tokens[0, :2])  # whoever is beside it


def test_iterations_bring_centroids_nearer_to_the_tokens():
    z = tokens(3, 50, 4)
    apart = []
    for iterations in (0, 1, 4):
        torch.manual_seed(0)
        apart.append(DynamicTokenClustering(4, 5, 5, 0.5, iterations).double()(z).distance.item())
    assert apart == sorted(apart, reverse=True)


def test_attention_begins_as_ordinary_attention_and_is_then_modulated():
    layer = AdaptiveFocusAttention(8, 2, most=6).double()
    s, used = tokens(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    q, k, v = layer.qkv(s).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(s, used), layer.norm(s + layer.out(plain)))
    torch.nn.init.normal_(layer.rows.weight)
    m = layer.modulation(s, used)
    assert m.shape == (2, 5, 5)
    assert not torch.allclose(m[0], m[1])  # of each picture's own
    scores = q @ k.mT / 2 * m.unsqueeze(1)
    assert torch.allclose(
        layer(s, used), layer.norm(s + layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
    )


def test_what_is_masked_changes_nothing():
    layer = AdaptiveFocusAttention(8, 2, most=6).double()
    torch.nn.init.normal_(layer.rows.weight)
    s = tokens(1, 5, 8)
    used = torch.tensor([[True, True, True, False, False]])
    other = torch.cat([s[:, :3], tokens(1, 2, 8, seed=9)], dim=1)
    assert torch.allclose(layer(s, used)[:, :3], layer(other, used)[:, :3])
    assert torch.allclose(layer(s, used)[:, :3], layer(s[:, :3], used[:, :3]))
    assert torch.allclose(pool(s, used), s[:, :3].mean(1))


def test_the_gate_lets_guidance_in_or_keeps_it_out():
    fusion = CrossModalTokenFusion(8, 2).double()
    s, guidance = tokens(2, 5, 8), tokens(2, 3, 8, seed=1)
    assert torch.equal(fusion(s, None), s)
    attended, _ = fusion.attention(s, guidance, guidance)
    torch.nn.init.zeros_(fusion.gate.weight)
    for bias, share in ((-40.0, 0.0), (40.0, 1.0), (0.0, 0.5)):
        torch.nn.init.constant_(fusion.gate.bias, bias)
        assert torch.allclose(fusion(s, guidance), s + share * attended)


def test_alignment_is_least_where_each_picture_is_likest_to_its_own():
    """Two pairs at right angles, by hand; turned round it is the other way."""
    pictures = torch.eye(2)
    good, bad = alignment_loss(pictures, pictures, 0.5), alignment_loss(pictures, pictures.flip(0), 0.5)
    assert good.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    assert bad.item() == pytest.approx(math.log(1 + math.exp(2)), abs=1e-6)


def model(**options):
    torch.manual_seed(0)
    sizes = {"side": 16, "patch": 4, "width": 8, "depth": 2, "heads": 2, "classes": 3}
    size = Size(**{name: options.pop(name, value) for name, value in sizes.items()})
    return AdaptiVision(size, **{"clusters": (2, 6), **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"clusters": None}, {"focus": False}, {"guided": 5}, {"strategy": "random"}, {"strategy": "importance"}],
)
def test_it_learns_to_tell_colours(options):
    """All parts that take part get gradients, and forty steps tell three colours of pictures apart."""
    net = model(**options)
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (48,), generator=g)
    pictures = 0.3 * torch.randn(48, 3, 16, 16, generator=g)
    pictures[torch.arange(48), labels] += 1
    guidance = torch.randn(48, 2, 5, generator=g) if options.get("guided") else None
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    for step in range(40):
        loss = net.loss(pictures, labels, guidance)
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            idle = [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
            assert idle == []
        optimizer.step()
    assert (net(pictures, guidance).argmax(-1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("kind", TokenSelection.KINDS)
def test_a_selection_keeps_tokens_in_their_order_and_the_same_of_the_same_picture(kind):
    torch.manual_seed(0)
    selection = TokenSelection(8, 5, kind).double()
    z = tokens(3, 20, 8)
    found = selection(z)
    assert found.used.all()
    kept = found.weights.argmax(1)  # [B, K] their places
    assert (kept.diff(dim=1) > 0).all()
    plain = z.gather(1, kept.unsqueeze(-1).expand(-1, -1, 8))
    factor = (found.tokens / plain)[..., 0]
    assert torch.allclose(found.tokens, plain * factor.unsqueeze(-1))
    assert torch.equal(selection(z[1:2]).weights[0], found.weights[1])
    assert not torch.equal(kept[0], kept[1])
    if kind == "importance":
        score = selection.score(z).squeeze(-1)
        assert torch.equal(kept, score.topk(5).indices.sort().values)
        assert torch.allclose(factor, score.gather(1, kept).sigmoid())
    else:
        assert torch.equal(factor, torch.ones_like(factor))


def test_without_guidance_a_guided_model_does_what_it_can():
    net = model(guided=5)
    pictures = torch.rand(2, 3, 16, 16)
    told = torch.randn(2, 4, 5)
    assert net(pictures).shape == net(pictures, told).shape == (2, 3)
    assert not torch.allclose(net(pictures), net(pictures, told))


def test_gradients_are_right():
    clustering = DynamicTokenClustering(3, 2, 2, temperature=2.0).double()
    z = tokens(1, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: clustering(z).tokens, z)
    layer = AdaptiveFocusAttention(4, 2, most=3).double()
    torch.nn.init.normal_(layer.rows.weight)
    s = tokens(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: layer(s, torch.ones(1, 3, dtype=torch.bool)), s)
    assert torch.autograd.gradcheck(lambda z: clustering(z).distance, z)
    fusion = CrossModalTokenFusion(4, 2).double()
    guidance = tokens(1, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, e: fusion(s, e), (s, guidance))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clusters": (8, 4)}, r"clusters is \(8, 4\); it must be the fewest and the most"),
        ({"clusters": (2, 17)}, r"clusters is \(2, 17\); an image has 16 patches"),
        ({"side": 18}, "side is 18; it must be a multiple of the patch's 4 pixels"),
        ({"heads": 3}, "width is 8; it must be a multiple of the 3 heads"),
        ({"clusters": (8, 4), "strategy": "random"}, r"clusters is \(8, 4\); it must be the fewest and the most"),
        ({"clusters": (0, 0), "strategy": "importance"}, r"clusters is \(0, 0\); it must be the fewest and the most"),
        ({"strategy": "luck"}, "strategy is 'luck'; it must be one of clusters, random, importance"),
        ({"temperature": 0}, "temperature is 0; it must be above 0"),
    ],
)
def test_bad_sizes_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        model(**options)
