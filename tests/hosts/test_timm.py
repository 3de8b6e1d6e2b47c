"""timm classifiers: each layer merges tokens, but never the class token."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

from tofu_sd.patching.linearity import best_split
from tofu_sd.vit.methods import AdaptiveReduction, TokenReduction

KINDS = {
    "vit": ("VisionTransformer", {"global_pool": "token"}),
    "pooled, as MAE's": ("VisionTransformer", {"global_pool": "avg", "class_token": True}),
    "registers": ("VisionTransformer", {"reg_tokens": 4}),
    "DeiT, distilled": ("VisionTransformerDistilled", {}),
    "scaled, normed keys": ("VisionTransformer", {"init_values": 0.5, "qk_norm": True}),
}
LAYERS, TOKENS = 4, 64


@pytest.fixture(params=KINDS)
def model(request):
    pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
    from timm.models import deit, vision_transformer

    name, options = KINDS[request.param]
    torch.manual_seed(0)
    made = getattr(vision_transformer, name, None) or getattr(deit, name)
    return made(img_size=32, patch_size=4, embed_dim=32, depth=LAYERS, num_heads=4, num_classes=7, **options).eval()


@pytest.fixture
def host():
    return pytest.importorskip("tofu_sd.hosts.timm", reason="timm is not installed", exc_type=ImportError)


def probe():
    return importlib.import_module("tofu_sd.hosts.timm_linearity")


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def predict(model, images):
    with torch.no_grad():
        return model(images)


def state(model):
    return [(type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_patch_changes_the_prediction_and_removal_restores_it(model, host, images):
    before, plain = state(model), predict(model, images)
    assert host.apply_patch(model, 8) is model
    assert (predict(model, images) - plain).abs().max() > 1e-4
    host.remove_patch(host.remove_patch(model))
    assert state(model) == before
    assert torch.equal(predict(model, images), plain)


def test_r_0_changes_nothing(model, host, images):
    plain = predict(model, images)
    assert torch.equal(predict(host.apply_patch(model, 0), images), plain)


def test_each_layer_merges_r_tokens_and_sizes_add_up(model, host, images):
    host.apply_patch(model, 8)
    with host.record_maps(model) as records:
        features = model.forward_features(images)
    assert features.shape[1] == model.num_prefix_tokens + TOKENS - LAYERS * 8
    assert [layer for layer, _ in records] == list(range(LAYERS))
    for layer, map in records:
        assert map.kept_idx.shape[1] == TOKENS - 8 * (layer + 1)
        assert torch.equal(map.size.sum(1), torch.full((3,), float(TOKENS)))
    with host.record_maps(model) as again:  # each image starts with all tokens
        predict(model, images)
    assert torch.equal(again[-1][1].group_idx, records[-1][1].group_idx)


def test_first_layer_merges_by_key_similarity_and_keeps_the_class_token(model, host, images):
    """Computed token by token: the sources most similar to their nearest destination merge into it."""
    block, prefix, r = model.blocks[0], model.num_prefix_tokens, 5
    activations = {}
    handles = [
        block.attn.k_norm.register_forward_hook(lambda m, a, k: activations.update(keys=k)),
        block.ls1.register_forward_hook(lambda m, a, out: activations.update(attended=out)),
        block.register_forward_pre_hook(lambda m, a: activations.update(x=a[0])),
    ]
    predict(model, images)
    for handle in handles:
        handle.remove()
    after = activations["x"] + activations["attended"]
    keys = torch.nn.functional.normalize(activations["keys"].mean(1)[:, prefix:], dim=-1)
    entering = {}
    host.apply_patch(model, r, early="mean", late="mean")
    handle = model.blocks[0].norm2.register_forward_pre_hook(lambda m, a: entering.update(x=a[0]))
    predict(model, images)
    handle.remove()
    for b in range(len(images)):
        sources, destinations = range(1, TOKENS, 2), range(0, TOKENS, 2)
        near = {s: max(destinations, key=lambda d, s=s: (keys[b, s] @ keys[b, d]).item()) for s in sources}
        gone = sorted(sources, key=lambda s: -(keys[b, s] @ keys[b, near[s]]).item())[:r]
        groups = [[n, *(s for s in gone if near[s] == n)] for n in range(TOKENS) if n not in gone]
        expected = torch.stack([after[b, [prefix + n for n in group]].mean(0) for group in groups])
        assert torch.allclose(entering["x"][b, :prefix], after[b, :prefix], atol=1e-6)
        assert torch.allclose(entering["x"][b, prefix:], expected, atol=1e-5)


def test_proportional_attention_is_exact_for_equal_patches(model, host):
    """Proportional attention over identical tokens equals full attention: log(n) counts merged tokens."""
    nn.init.zeros_(model.pos_embed)
    plain_images = torch.ones(2, 3, 32, 32)
    full = predict(model, plain_images)
    for early, late in (("mean", "mean"), ("prune", "mlerp")):
        weighted = predict(host.apply_patch(model, 12, early=early, late=late), plain_images)
        assert torch.allclose(weighted, full, atol=1e-4)
    without = predict(host.apply_patch(model, 12, early="mean", late="mean", proportional=False), plain_images)
    assert (without - full).abs().max() > 10 * (weighted - full).abs().max()


def test_copy_of_a_patched_model_is_patched_independently(model, host, images):
    host.apply_patch(model, 8)
    expected = predict(model, images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(predict(other, images), expected)
        host.remove_patch(other)
        assert torch.equal(predict(model, images), expected)
        assert not torch.equal(predict(other, images), expected)


def test_second_patch_replaces_the_first_and_is_removed(model, host, images):
    before = state(model)
    host.apply_patch(model, 4)
    host.apply_patch(model, TokenReduction(8), late="mean")
    twice = predict(model, images)
    host.remove_patch(model)
    assert state(model) == before
    assert torch.equal(twice, predict(host.apply_patch(model, 8, late="mean"), images))


def test_patched_model_trains(model, host, images):
    host.apply_patch(model, 8).train()
    model(images).square().mean().backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_gradient_checkpointing_raises(model, host, images):
    """A layer that runs again has no token maps, or those of a later call."""
    model.set_grad_checkpointing(True)
    loss = host.apply_patch(model.train(), r=8).forward(images).square().sum()
    with pytest.raises(RuntimeError, match=r"checkpoints run them again; set_grad_checkpointing\(False\)"):
        loss.backward()
    with pytest.raises(RuntimeError, match="its layers must run in order"):
        model.blocks[1](torch.zeros(1, 9, 32))
    model.set_grad_checkpointing(False)
    model(images).square().sum().backward()
    assert model.patch_embed.proj.weight.grad.isfinite().all()


def test_feature_maps_of_merged_tokens_raise(model, host, images):
    """timm would silently put the remaining tokens in wrong positions."""
    before = model.forward_intermediates(images, intermediates_only=True)[-1]
    host.apply_patch(model, r=8)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="too few for maps: output_fmt='NLC' gives them as they are"):
            copied.forward_intermediates(images)
        tokens = copied.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)[-1]
        assert tokens.shape[1] == TOKENS - 8 * LAYERS
    host.remove_patch(model)
    assert torch.equal(model.forward_intermediates(images, intermediates_only=True)[-1], before)


def test_model_name_creates_a_patched_model(host, images, monkeypatch):
    timm = host.timm
    calls = []
    made = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=7)

    def create(name, **options):
        calls.append((name, options))
        return made

    monkeypatch.setattr(timm, "create_model", create)
    assert host.apply_patch("deit_tiny_patch16_224", r=8) is made
    assert calls == [("deit_tiny_patch16_224", {"pretrained": True})]
    with host.record_maps(made) as records:
        predict(made, images)
    assert records[0][1].kept_idx.shape[1] == TOKENS - 8


def test_depth_split_is_measured_on_images(model, host, images):
    """Averaging is better above linearity 1/sqrt 2: all layers before the first such layer prune."""
    d = probe().measured_split(model, images)
    assert d == best_split(dict(enumerate(probe().linearity(model, images).mean(dim=1).tolist())))
    host.apply_patch(model, r=8, depth_split="auto", images=images)
    merged = predict(model, images)
    assert torch.equal(merged, predict(host.apply_patch(model, r=8, depth_split=d), images))


def test_nonlinear_layers_prune_and_linear_layers_average(host, images):
    class Crooked(nn.Module):
        def forward(self, x):
            return (300 * x).sin()

    timm = host.timm
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6)
    for block in model.blocks[:2]:
        block.mlp = Crooked()
    for block in model.blocks[2:]:
        block.norm2, block.mlp = nn.Identity(), nn.Linear(192, 192)
    assert probe().measured_split(model, images) == 2


@pytest.mark.parametrize("r", [0, TOKENS // 2 + 1])
def test_linearity_rejects_invalid_r(model, host, images, r):
    with pytest.raises(
        ValueError, match=f"r is {r}; it must be an integer from 1 to {TOKENS // 2}, half of the patch tokens"
    ):
        probe().linearity(model, images, r)


def test_linearity_rejects_unknown_layers(model, host, images):
    with pytest.raises(ValueError, match="layer is 'norm'; it must be attn or mlp"):
        probe().linearity(model, images, layer="norm")


def test_patch_is_removed_after_a_block_was_replaced(model, host, images):
    before, plain = state(model), predict(model, images)
    host.apply_patch(model, r=8)
    taken, model.blocks[1] = model.blocks[1], nn.Identity()
    host.remove_patch(model)
    assert [type(block).__name__ for block in model.blocks] == ["Block", "Identity", "Block", "Block"]
    assert predict(model, images).isfinite().all()
    model.blocks[1] = taken  # this block is not patched either
    assert torch.equal(predict(model, images), plain)
    assert state(model) == before


def test_failed_split_measurement_leaves_the_model_unchanged(model, host, images):
    plain = predict(host.apply_patch(model, r=8), images)
    with pytest.raises(ValueError, match="give some as images=, or a number"):
        host.apply_patch(model, depth_split="auto")
    with pytest.raises(ValueError, match="images are given, and depth_split is not 'auto'"):
        host.apply_patch(model, images=images)
    with pytest.raises((RuntimeError, AssertionError)):  # timm's error for images of another size
        host.apply_patch(model, depth_split="auto", images=images[:, :, :20, :20])
    assert torch.equal(predict(model, images), plain)


def test_attention_without_keys_raises_and_patches_nothing(model, host, images):
    norm = model.blocks[2].attn.k_norm
    del model.blocks[2].attn.k_norm
    before = state(model)
    with pytest.raises(ValueError, match="no keys to compare tokens by: its attention is Attention, without timm's"):
        host.apply_patch(model, r=8)
    assert state(model) == before
    model.blocks[2].attn.k_norm = norm
    host.apply_patch(model, r=8)


def test_linearity_is_measured_on_the_merged_pairs(model, host, images):
    """Linearity is 1 for a linear MLP and lower otherwise. The first block is computed by hand."""
    before = state(model)
    mlp_linearity = probe().linearity(model, images, r=3)
    assert mlp_linearity.shape == (LAYERS, 3)
    assert ((mlp_linearity > 0) & (mlp_linearity < 1 + 1e-6)).all()
    assert state(model) == before
    block, prefix, activations = model.blocks[0], model.num_prefix_tokens, {}
    handles = [
        block.attn.k_norm.register_forward_hook(lambda m, a, k: activations.update(keys=k)),
        block.norm1.register_forward_pre_hook(lambda m, a: activations.update(begun=a[0])),
        block.norm2.register_forward_pre_hook(lambda m, a: activations.update(x=a[0])),
    ]
    predict(model, images)
    for handle in handles:
        handle.remove()
    keys = torch.nn.functional.normalize(activations["keys"].mean(1)[:, prefix:], dim=-1)
    similarity = keys[0, 1::2] @ keys[0, ::2].mT

    def by_hand(x, layer):
        ways = []
        for s in similarity.amax(1).argsort(descending=True)[:3].tolist():
            x1, x2 = x[0, prefix + 1 + 2 * s], x[0, prefix + 2 * int(similarity[s].argmax())]
            way = layer(torch.stack([x1 + t * (x2 - x1) for t in torch.linspace(0, 1, 11)])).detach()
            ways.append((way[-1] - way[0]).norm() / way.diff(dim=0).norm(dim=-1).sum())
        return torch.stack(ways).mean().item()

    def attention(points):
        """A query's, by its formula, among the keys and values of the whole image."""
        attn, (q, _, _), (_, k, v) = (
            block.attn,
            *(
                block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(-3)
                for x in (points, activations["begun"][0])
            ),
        )
        weights = (torch.einsum("phd,nhd->hpn", attn.q_norm(q), attn.k_norm(k)) * attn.scale).softmax(-1)
        return attn.proj(torch.einsum("hpn,nhd->phd", weights, v).flatten(1))

    assert mlp_linearity[0, 0].item() == pytest.approx(
        by_hand(activations["x"], lambda x: block.mlp(block.norm2(x))), abs=1e-4
    )
    attention_linearity = probe().linearity(model, images, r=3, layer="attn")
    assert attention_linearity[0, 0].item() == pytest.approx(by_hand(activations["begun"], attention), abs=1e-4)
    block.mlp.act, block.norm2 = nn.Identity(), nn.Identity()
    linear = probe().linearity(model, images, r=3)
    assert torch.allclose(linear[0], torch.ones(3), atol=1e-4)
    host.apply_patch(model, 4)
    with pytest.raises(ValueError, match="is patched; linearity is measured without a patch"):
        probe().linearity(model, images)


def adaptive(model, **options):
    return AdaptiveReduction(class_only=model.global_pool == "token", **options)


def test_adaptive_merging_merges_tokens_above_the_threshold(model, host, images):
    """At threshold 1 nothing merges, at -1 all sources. In between the batch merges its average number."""
    plain = predict(model, images)
    none = predict(host.apply_patch(model, adaptive(model, alpha=2, beta=0)), images)
    assert torch.allclose(none, plain, atol=1e-5)
    block, prefix, activations = model.blocks[0], model.num_prefix_tokens, {}
    handle = block.attn.k_norm.register_forward_hook(lambda m, a, k: activations.update(keys=k))
    predict(model, images)
    handle.remove()
    keys = torch.nn.functional.normalize(activations["keys"].mean(1)[:, prefix:], dim=-1)
    nearest = (keys[:, 1::2] @ keys[:, ::2].mT).amax(-1)
    threshold = nearest.quantile(0.6).item()
    host.apply_patch(model, adaptive(model, alpha=threshold, beta=0, least=-1))
    with host.record_maps(model) as maps:
        predict(model, images)
    similarity = (nearest > threshold).sum(1).float()
    assert TOKENS - maps[0][1].kept_idx.shape[1] == round(similarity.mean().item())
    assert similarity.unique().numel() > 1  # images differ, but merge the same number
    host.apply_patch(model, adaptive(model, alpha=-1, beta=0, least=-1))
    with host.record_maps(model) as maps:
        predict(model, images)
    num_kept = [map.kept_idx.shape[1] for _, map in maps]
    assert num_kept[:2] == [TOKENS // 2, TOKENS // 4]


def test_last_layer_can_keep_only_the_class_token(model, host, images):
    if model.global_pool != "token":
        with pytest.raises(ValueError, match=r"classifies by its patch tokens .*set class_only=False"):
            host.apply_patch(model, AdaptiveReduction())
        return
    plain = predict(model, images)
    host.apply_patch(model, AdaptiveReduction(alpha=2, beta=0))
    assert model.forward_features(images).shape[1] == model.num_prefix_tokens
    assert torch.allclose(predict(model, images), plain, atol=1e-5)  # the other tokens do not affect the prediction


def test_late_layers_merge_small_tokens_into_large_ones(model, host, images):
    """One of each pair is in the larger half by size, so two large tokens never merge (ATM section 3.3)."""
    host.apply_patch(model, adaptive(model, alpha=-1, beta=0, least=-1, split=0.25))
    with host.record_maps(model) as maps:
        predict(model, images)
    (_, first), (_, second) = maps[:2]
    size, n = first.size, first.kept_idx.shape[1]
    position = first.kept_idx
    for b in range(len(images)):
        of = {int(token): i for i, token in enumerate(position[b])}
        ranks = size[b].argsort(stable=True).argsort()
        for k in range(second.kept_idx.shape[1]):
            members = [of[int(t)] for t in position[b] if second.group_idx[b, t] == k]
            assert sum(ranks[m] >= n // 2 for m in members) <= 1
        assert torch.equal(second.kept_idx[b], second.kept_idx[b].sort().values)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 33}, ValueError, "r is 33; of 64 patch tokens at most 32 can be merged in a layer"),
        ({"r": -1}, ValueError, "r is -1; it must be an integer >= 0"),
        ({"r": 2.5}, ValueError, "r is 2.5; it must be an integer"),
        ({"schedule": "sloping"}, ValueError, "schedule is 'sloping'; it must be 'constant' or 'decreasing'"),
        ({"late": "median"}, ValueError, "unknown reduction 'median'"),
        ({"depth_split": None}, ValueError, "depth_split is None"),
        ({"ratio": 0.5}, TypeError, "ratio"),
    ],
)
def test_invalid_options_raise_and_change_nothing(host, images, options, error, message):
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=7).eval()
    host.apply_patch(model, 4)
    before, structure = predict(model, images), state(model)
    with pytest.raises(error, match=message):
        host.apply_patch(model, **{"r": 8, **options})
    assert state(model) == structure
    assert torch.equal(predict(model, images), before)


def test_model_without_transformer_blocks_raises(host):
    with pytest.raises(ValueError, match=r"Linear has no blocks to merge tokens in: none found; looked for timm"):
        host.apply_patch(nn.Linear(2, 2))
    swin = pytest.importorskip("timm").create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match="SwinTransformer has no blocks"):
        host.apply_patch(swin)
    with pytest.raises(ValueError, match="is not patched"), host.record_maps(nn.Linear(2, 2)):
        pass


def test_interrupt_while_the_split_is_measured_keeps_the_earlier_patch(model, host, images, monkeypatch):
    """Ctrl-C during the measurement must not leave a model that was patched without its patch."""
    host.apply_patch(model, r=4)
    before = predict(model, images)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe(), "measured_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        host.apply_patch(model, r=8, depth_split="auto", images=images)
    assert torch.equal(predict(model, images), before)
