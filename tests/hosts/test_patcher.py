"""ComfyUI, Forge and reForge: patches match the diffusers adapter and stay on their clone."""

from __future__ import annotations

import copy
import itertools

import pytest
import tiny
import torch
from patcher_host import ForgePatcher, Patcher, UNetModel, attention
from torch import nn

import tofu_sd
from tofu_sd import TokenFusionConfig, timing_cache
from tofu_sd.hosts import ldm
from tofu_sd.hosts.programs.base_patches import SLOWER
from tofu_sd.hosts.programs.call_state import map_size
from tofu_sd.hosts.programs.model_patcher import patch_model, patches_of
from tofu_sd.patching import autotune
from tofu_sd.timing_cache import Timing

# in these programs a patch gets only normed tokens, so both adapters match on them
OPTIONS = [
    {},
    {"ratio": 0.75},
    {"early": "mean", "late": "mean", "proportional": True},
    {"early": "mlerp", "kv_early": "mean", "kv_late": "prune"},
    {"early": "mlerp", "kv_early": "mean", "kv_late": "mean", "proportional": True},
    {"kv_only": True},
    {"kv_only": True, "proportional": True, "ratio": 0.75},
    {"levels": 2},
    {"depth_split": 0},
    {"window": 2},
    {"share_across_blocks": True},
    {"min_tokens": 10_000},
    {"sx": 4, "sy": 2, "ratio": 0.8},
    {"temperature": 0.1, "early": "mean", "late": "mean", "window": 3, "sy": 1, "proportional": True},
]


def options_id(options):
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "default"


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def unets(request):
    """Returns a diffusers UNet, and a model patcher with the same weights."""
    unet = tiny.sd15_unet() if request.param == "sd15" else tiny.sdxl_unet(layers=(1, 2, 1))
    return unet, Patcher(UNetModel(copy.deepcopy(unet)))


def call(unet, patcher, h=16, w=16, **more):
    inputs = tiny.inputs(unet, h, w)
    return patcher.predict(
        inputs["sample"], 500, inputs["encoder_hidden_states"], inputs.get("added_cond_kwargs"), **more
    )


def merged(patcher, ratio=0.5, **options):
    return patch_model(
        patcher, TokenFusionConfig.of(ratio, **options), attention, percent_to_sigma=lambda p: 10 * (1 - p)
    )[0]


def test_unpatched_stand_in_matches_diffusers(unets):
    unet, patcher = unets
    assert torch.allclose(call(unet, patcher), tiny.predict(unet), atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (18, 14)])
@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
def test_patcher_matches_the_diffusers_adapter(unets, options, size):
    """Up to rounding: the two blocks add and multiply in a different order."""
    unet, patcher = unets
    if "levels" in options and unet.config.get("addition_embed_type"):
        pytest.skip("diffusers merges the middle block too, which lies on SDXL's second level")
    with tofu_sd.patched(unet, **{"ratio": 0.5, **options, "match_on": "normed"}):
        expected = tiny.predict(unet, *size)
    result = call(unet, merged(patcher, **options), *size)
    assert torch.allclose(result, expected, atol=1e-4)
    if options.get("min_tokens", 0) == 0:
        assert (result - call(unet, patcher, *size)).abs().max() > 1e-3  # merging changes the prediction


@pytest.mark.parametrize(("seconds", "skipped"), [(1.0, False), (3.0, True)])
def test_maps_on_which_merging_is_not_faster_are_not_merged(unets, monkeypatch, seconds, skipped):
    unet, patcher = unets
    monkeypatch.setattr(autotune.MergeRule, "_measure", lambda *_: Timing(full=2.0, merged=seconds))
    clone = merged(patcher)
    assert torch.equal(call(unet, clone), call(unet, patcher)) == skipped
    assert (SLOWER in patches_of(clone).reasons) == skipped
    assert not torch.equal(call(unet, merged(patcher, min_tokens=0)), call(unet, patcher))


@pytest.mark.parametrize("options", [{}, {"kv_only": True}, {"kv_early": "mean"}], ids=options_id)
def test_the_programs_own_attention_is_timed_and_left_as_it_was(unets, monkeypatch, options):
    unet, patcher = unets
    monkeypatch.setattr(autotune.MergeRule, "_measure", autotune.MergeRule._measure_for_real)
    kinds = [(type(module), {*vars(module)}) for module in patcher.model.diffusion_model.modules()]
    call(unet, merged(patcher, **options))
    assert len(timing_cache.cache._timings) == 2  # of two reductions
    assert all(timing.full > 0 and timing.merged > 0 for timing in timing_cache.cache._timings.values())
    assert [(type(module), {*vars(module)}) for module in patcher.model.diffusion_model.modules()] == kinds


@pytest.mark.parametrize("size", [(15, 13), (17, 23)])
def test_odd_latent_sizes_are_merged(unets, size):
    unet, patcher = unets
    plain = call(unet, patcher, *size)
    result = call(unet, merged(patcher), *size)
    assert result.shape == plain.shape
    assert not torch.equal(result, plain)


def test_ratio_zero_and_the_original_model_are_bit_equal_to_unpatched(unets):
    unet, patcher = unets
    plain = call(unet, patcher)
    assert torch.equal(call(unet, merged(patcher, 0, proportional=True)), plain)
    call(unet, merged(patcher))
    assert torch.equal(call(unet, patcher), plain)
    assert patcher.model_options == {"transformer_options": {}}


def test_clones_with_different_configs_are_independent(unets):
    unet, patcher = unets
    settings = [(0.5, {}), (0.75, {"kv_only": True}), (0.25, {"proportional": True})]
    clones = [merged(patcher, ratio, **options) for ratio, options in settings]
    first = [call(unet, clone) for clone in clones]
    again = [call(unet, clone.clone()) for clone in reversed(clones)][::-1]  # a clone of a clone keeps its config
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({float(out.sum()) for out in first}) == 3


def test_deepcopy_of_patches_copies_no_weights(unets):
    """Programs deep-copy patches: a weight that a patch holds would be copied for every node."""
    clone = merged(unets[1]).clone()
    patches = clone.model_options["transformer_options"]["patches"]
    owners = {id(patch[0].__self__) for patch in patches.values()}
    assert len(owners) == 1
    memo = {}
    copy.deepcopy(patches, memo)
    assert not any(isinstance(value, nn.Module) for value in memo.values())


def test_only_steps_between_start_and_end_are_merged(unets):
    """start and end are fractions of the sampling. percent_to_sigma is 10 (1 - fraction), and sigma is 5."""
    unet, patcher = unets
    plain, whole = call(unet, patcher), call(unet, merged(patcher))
    for start, end, inside in ((0.4, 0.6, True), (0.0, 0.4, False), (0.6, 1.0, False), (0.5, 1.0, True)):
        result = call(unet, merged(patcher, start=start, end=end))
        assert torch.equal(result, whole if inside else plain), (start, end)


def test_random_destinations_are_seeded_and_keep_the_global_generator(unets):
    unet, patcher = unets
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, two, other = (call(unet, merged(patcher, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_match_interval_reuses_maps_within_one_sampling(unets):
    unet, patcher = unets
    inputs = tiny.inputs(unet)
    added = inputs.get("added_cond_kwargs")
    clone, schedule, maps = merged(patcher, match_interval=2), torch.tensor([9.0, 5.0, 1.0]), []
    owner = patches_of(clone)
    owner.on_map = lambda place, map, h, w: maps.append(map) if place == owner.places[0] else None
    for t, sampling in ((900, schedule), (500, schedule), (100, schedule), (50, schedule.clone())):
        clone.predict(inputs["sample"] + t, t, inputs["encoder_hidden_states"], added, sample_sigmas=sampling)
    reused = [a.group_idx is b.group_idx for a, b in itertools.pairwise(maps)]
    assert reused == [True, False, False]  # step 2 reuses the map of step 1; step 4 belongs to another sampling


def test_map_size_is_computed_from_the_latent_size(unets):
    """Older programs pass only the latent's size."""
    unet, patcher = unets
    clone = merged(patcher)
    assert torch.equal(call(unet, clone, silent=True), call(unet, clone))


def test_forge_map_size_is_recorded_by_a_block_modifier(unets):
    """A map that another node has shrunk is not a halved latent."""
    unet, patcher = unets
    forge = ForgePatcher(patcher.model.diffusion_model)
    sizes = {}
    clone = merged(forge)
    owner = patches_of(clone)
    owner.on_map = lambda place, map, h, w: sizes.setdefault(place, (h, w))
    assert torch.equal(call(unet, clone, 18, 14), call(unet, merged(patcher), 18, 14))
    down = ldm.find_places(patcher.model.diffusion_model)[next(iter(sizes))].downsample
    assert set(sizes.values()) == {(18 // down, 14 // down)}
    owner.store_size(
        torch.zeros(1, 4, 5, 7), "before", patcher.model.diffusion_model.input_blocks[0][0], 0, None, stored := {}
    )
    assert stored == {}  # sizes are stored only for transformers
    assert torch.equal(call(unet, clone.clone(), 18, 14), call(unet, clone, 18, 14))


@pytest.mark.parametrize(
    ("options", "tokens", "size"),
    [
        ({"activations_shape": [2, 4, 3, 5]}, 15, (3, 5)),
        ({"activations_shape": [2, 4, 3, 5]}, 16, None),  # another patch has changed the tokens
        ({"original_shape": [2, 4, 17, 23]}, 17 * 23, (17, 23)),
        ({"original_shape": [2, 4, 17, 23]}, 9 * 12, (9, 12)),  # convolutions of stride two round up
        ({"original_shape": [2, 4, 17, 23]}, 100, None),
        ({}, 64, None),
    ],
)
def test_map_size_is_none_if_tokens_do_not_fit_a_map(options, tokens, size):
    assert map_size(options, tokens) == size


def test_tokens_changed_by_another_patch_are_not_merged(unets):
    """HyperTile's tiles are not a map, so the result equals HyperTile without the patch."""
    unet, patcher = unets

    def halve(q, k, v, options):
        return q, k[:, ::2], v[:, ::2]

    alone = patcher.clone()
    alone.set_model_attn1_patch(halve)
    expected = call(unet, alone)
    assert torch.equal(call(unet, merged(alone)), expected)


def test_split_batch_equals_the_whole_batch(unets):
    """Programs split the batch if memory is low."""
    unet, patcher = unets
    inputs, clone = tiny.inputs(unet), merged(patcher, proportional=True)
    added = inputs.get("added_cond_kwargs")
    whole = call(unet, clone)
    for i, which in enumerate(([1], [0])):
        half = {name: value[i : i + 1] for name, value in added.items()} if added else None
        part = clone.predict(
            inputs["sample"][i : i + 1], 500, inputs["encoder_hidden_states"][i : i + 1], half, cond_or_uncond=which
        )
        assert torch.allclose(part, whole[i : i + 1], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_mlp": True}, "merge_mlp is unavailable here: these programs let patches change only self-attention"),
        ({"merge_crossattn": True}, "merge_crossattn is unavailable here"),
        ({"share_across_cfg": True}, "share_across_cfg is unavailable here: these programs decide"),
        ({"threshold": 0.0}, "threshold is unavailable here: it counts in one call for the next"),
    ],
)
def test_unavailable_options_raise(unets, options, message):
    with pytest.raises(ValueError, match=message):
        merged(unets[1], **options)
    assert unets[1].model_options == {"transformer_options": {}}


@pytest.mark.parametrize("options", [{}, {"proportional": True, "early": "mean", "late": "mean"}])
@pytest.mark.parametrize("kind", [Patcher, ForgePatcher])
def test_second_patch_replaces_the_first_on_its_clone_only(unets, kind, options):
    model = kind(unets[1].model.diffusion_model)
    first, _ = patch_model(model, TokenFusionConfig.of(0.25, **options), attention)
    second, _ = patch_model(first, TokenFusionConfig.of(0.5, **options), attention)
    alone, _ = patch_model(model, TokenFusionConfig.of(0.5, **options), attention)
    before, once = call(unets[0], first), call(unets[0], alone)
    assert torch.equal(call(unets[0], second), once)
    assert not torch.equal(before, once)
    assert torch.equal(call(unets[0], first), before)


def test_summary_names_min_tokens(unets):
    _, summary = patch_model(unets[1], TokenFusionConfig(0.5, min_tokens=10_000), attention)
    assert "maps of fewer than 10000 tokens skipped" in summary.headline


def test_start_and_end_need_noise_levels(unets):
    with pytest.raises(ValueError, match=r"start is 0\.2 and end is 1: this model has no noise levels"):
        patch_model(unets[1], TokenFusionConfig(0.5, start=0.2), attention)


def test_diffusion_transformer_raises():
    class Flux(nn.Module):
        pass

    with pytest.raises(ValueError, match="no eligible block in Flux: looked in input_blocks, middle_block"):
        patch_model(Patcher(Flux()), TokenFusionConfig(0.5), attention)


def test_find_places_matches_the_published_layouts(unets):
    """In the published layouts SD 1.5 has attention at the latent's size, SDXL only from half of it."""
    unet, patcher = unets
    sites = ldm.find_places(patcher.model.diffusion_model)
    top = [place for place, site in sites.items() if site.level == 0]
    sd15 = [("input", 1, 0), ("input", 2, 0), ("output", 9, 0), ("output", 10, 0), ("output", 11, 0)]
    sdxl = [(side, n, i) for side, ns in (("input", (4, 5)), ("output", (3, 4, 5))) for n in ns for i in (0, 1)]
    assert top == (sd15 if unet.config.get("addition_embed_type") is None else sdxl)
    with tofu_sd.patched(unet, 0.5):
        rows = tofu_sd.summary(unet).rows
    assert [(s.depth, s.downsample) for s in sites.values() if s.level == 0] == [
        (row.depth, 16 // row.size[0]) for row in rows
    ]
    assert sum(site.path == "down" for site in sites.values()) == 6  # in both models, as this SDXL has fewer layers
