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
def test_soft_assignment_sums_to_one_per_token(seed, n, k, temperature):
    z, centroids = tokens(2, n, 4, seed=seed), tokens(2, k, 4, seed=seed + 1)
    weights = soft_assignment(z, centroids, temperature)
    assert weights.shape == (2, n, k)
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(2, n, dtype=torch.float64))


def test_low_temperature_assigns_to_the_nearest_centroid():
    z, centroids = tokens(2, 9, 4), tokens(2, 3, 4, seed=1)
    hard = torch.nn.functional.one_hot(torch.cdist(z, centroids).argmin(-1), 3)
    assert torch.allclose(soft_assignment(z, centroids, 1e-6), hard.double())


def test_high_temperature_assigns_uniformly():
    weights = soft_assignment(tokens(2, 9, 4), tokens(2, 3, 4, seed=1), 1e9)
    assert torch.allclose(weights, torch.full_like(weights, 1 / 3), atol=1e-6)


def test_unused_centroids_get_no_weight():
    used = torch.tensor([[True, False, True], [True, True, False]])
    weights = soft_assignment(tokens(2, 9, 4), tokens(2, 3, 4, seed=1), 5.0, used)
    assert (weights.sum(1) > 0).tolist() == used.tolist()
    assert torch.allclose(weights.sum(-1), torch.ones(2, 9, dtype=torch.float64))


def test_super_tokens_and_distance_match_eq_14():
    clustering = DynamicTokenClustering(4, 3, 3, temperature=2.0, iterations=0).double()
    z = tokens(1, 7, 4)
    result = clustering(z)
    order = soft_assignment(z, clustering.centroids[None], 2.0).sum(1).argsort(descending=True)[0]
    mu = clustering.centroids[order].detach()
    a = soft_assignment(z, mu[None], 2.0)[0]
    by_hand = torch.stack([sum(a[i, k] * z[0, i] for i in range(7)) for k in range(3)])
    assert torch.allclose(result.tokens[0], by_hand)
    apart = sum(a[i, k] * (z[0, i] - mu[k]).square().sum() for i in range(7) for k in range(3)) / 7
    assert torch.allclose(result.distance, apart)


def test_number_of_clusters_grows_with_image_variety():
    clustering = DynamicTokenClustering(8, 2, 12, temperature=0.1).double()
    plain = clustering.centroids[3].detach().expand(40, -1)
    rich = clustering.centroids.detach().repeat(4, 1)[:40]
    result = clustering(torch.stack([plain, rich]))
    counts = result.used.sum(1).tolist()
    assert counts[0] == 2
    assert counts[1] >= 11
    assert result.tokens.shape[1] == max(counts)  # the largest number that an image needs
    alone = clustering(plain[None])
    assert torch.allclose(alone.tokens[0], result.tokens[0, :2])  # whatever else is in the batch


def test_iterations_reduce_the_distance_to_centroids():
    z = tokens(3, 50, 4)
    apart = []
    for iterations in (0, 1, 4):
        torch.manual_seed(0)
        apart.append(DynamicTokenClustering(4, 5, 5, 0.5, iterations).double()(z).distance.item())
    assert apart == sorted(apart, reverse=True)


def test_attention_is_unmodulated_at_initialization():
    layer = AdaptiveFocusAttention(8, 2, most=6).double()
    s, used = tokens(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    q, k, v = layer.qkv(s).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(s, used), layer.norm(s + layer.out(plain)))
    torch.nn.init.normal_(layer.rows.weight)
    m = layer.modulation(s, used)
    assert m.shape == (2, 5, 5)
    assert not torch.allclose(m[0], m[1])  # each image has its own
    scores = q @ k.mT / 2 * m.unsqueeze(1)
    assert torch.allclose(
        layer(s, used), layer.norm(s + layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
    )


def test_masked_tokens_do_not_affect_the_output():
    layer = AdaptiveFocusAttention(8, 2, most=6).double()
    torch.nn.init.normal_(layer.rows.weight)
    s = tokens(1, 5, 8)
    used = torch.tensor([[True, True, True, False, False]])
    other = torch.cat([s[:, :3], tokens(1, 2, 8, seed=9)], dim=1)
    assert torch.allclose(layer(s, used)[:, :3], layer(other, used)[:, :3])
    assert torch.allclose(layer(s, used)[:, :3], layer(s[:, :3], used[:, :3]))
    assert torch.allclose(pool(s, used), s[:, :3].mean(1))


def test_gate_scales_the_guidance():
    fusion = CrossModalTokenFusion(8, 2).double()
    s, guidance = tokens(2, 5, 8), tokens(2, 3, 8, seed=1)
    assert torch.equal(fusion(s, None), s)
    attended, _ = fusion.attention(s, guidance, guidance)
    torch.nn.init.zeros_(fusion.gate.weight)
    for bias, share in ((-40.0, 0.0), (40.0, 1.0), (0.0, 0.5)):
        torch.nn.init.constant_(fusion.gate.bias, bias)
        assert torch.allclose(fusion(s, guidance), s + share * attended)


def test_alignment_loss_is_smallest_for_matching_pairs():
    """Computed by hand for two orthogonal pairs, and for the swapped pairs."""
    images = torch.eye(2)
    good, bad = alignment_loss(images, images, 0.5), alignment_loss(images, images.flip(0), 0.5)
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
def test_model_learns_to_classify_colours(options):
    """All parts in use get gradients, and forty steps separate three colours of images."""
    net = model(**options)
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (48,), generator=g)
    images = 0.3 * torch.randn(48, 3, 16, 16, generator=g)
    images[torch.arange(48), labels] += 1
    guidance = torch.randn(48, 2, 5, generator=g) if options.get("guided") else None
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    for step in range(40):
        loss = net.loss(images, labels, guidance)
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            idle = [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
            assert idle == []
        optimizer.step()
    assert (net(images, guidance).argmax(-1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("kind", TokenSelection.KINDS)
def test_token_selection_keeps_order_and_is_deterministic_per_image(kind):
    torch.manual_seed(0)
    selection = TokenSelection(8, 5, kind).double()
    z = tokens(3, 20, 8)
    result = selection(z)
    assert result.used.all()
    kept = result.weights.argmax(1)  # [B, K] token indices
    assert (kept.diff(dim=1) > 0).all()
    plain = z.gather(1, kept.unsqueeze(-1).expand(-1, -1, 8))
    factor = (result.tokens / plain)[..., 0]
    assert torch.allclose(result.tokens, plain * factor.unsqueeze(-1))
    assert torch.equal(selection(z[1:2]).weights[0], result.weights[1])
    assert not torch.equal(kept[0], kept[1])
    if kind == "importance":
        score = selection.score(z).squeeze(-1)
        assert torch.equal(kept, score.topk(5).indices.sort().values)
        assert torch.allclose(factor, score.gather(1, kept).sigmoid())
    else:
        assert torch.equal(factor, torch.ones_like(factor))


def test_guided_model_also_runs_without_guidance():
    net = model(guided=5)
    images = torch.rand(2, 3, 16, 16)
    guidance = torch.randn(2, 4, 5)
    assert net(images).shape == net(images, guidance).shape == (2, 3)
    assert not torch.allclose(net(images), net(images, guidance))


def test_gradients_match_numerical_ones():
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
    ("options", "message"),
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
def test_invalid_sizes_raise(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)
