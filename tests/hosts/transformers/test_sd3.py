"""Stable Diffusion 3 and 3.5: joint attention of merged image tokens with untouched text, and its pipelines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import (
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGPipeline,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from sdpa_calls import SDPACalls
from tiny_transformers import MODELS, TEXT, images, sd3, sd3_pipe, sd35
from torch import Tensor

import tofu_sd

SD3 = MODELS["sd3"]
FORMS: dict[str, dict[str, Any]] = {
    "states": {},
    "keys and values": {"kv_only": True},
    "queries and keys apart": {"kv_early": "mean", "kv_late": "mean"},
}
forms = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


def calls_of(model: Any, **call: Any) -> list[dict[str, Any]]:
    with SDPACalls() as calls:
        SD3.predict(model, **call)
    return calls.seen


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sd3, sd35])
@forms
def test_text_enters_attention_unchanged(make: Callable[..., Any], options: dict[str, Any]) -> None:
    """Bit for bit, with 0 added to its logits: in the first block, as later ones get what that made of the image."""
    model = make()
    plain = calls_of(model)[0]
    merged = calls_of(tofu_sd.apply_patch(model, 0.5, **options))[0]
    for name in ("query", "key", "value"):
        assert torch.equal(plain[name][:, :, -TEXT:], merged[name][:, :, -TEXT:])
    assert plain["key"].shape[2] - merged["key"].shape[2] == 32
    assert plain["query"].shape[2] - merged["query"].shape[2] == (0 if "kv_only" in options else 32)
    assert (merged["attn_mask"][..., -TEXT:] == 0).all()
    size = merged["attn_mask"][:, 0, 0, :-TEXT].exp()
    assert torch.allclose(size.sum(dim=-1), torch.tensor(64.0))


def test_equal_groups_have_one_number_against_the_text_and_none_without_text() -> None:
    """In the second attention of the image alone softmax cancels it."""
    seen = calls_of(tofu_sd.apply_patch(sd35(), 0.5, matching="pairs"))
    joint, alone = seen[0], seen[1]
    assert torch.allclose(joint["attn_mask"][..., :-TEXT].exp(), torch.tensor(2.0))
    assert alone.get("attn_mask") is None
    assert alone["key"].shape[2] == 32


def _flat(model: Any) -> dict[str, Any]:
    """Arguments of a call in which all image tokens are identical."""
    model.pos_embed.pos_embed.zero_()
    call = SD3.inputs()
    return {**call, "hidden_states": call["hidden_states"][:, :, :2, :2].repeat(1, 1, 8, 8)}


@pytest.mark.parametrize("make", [sd3, sd35])
@pytest.mark.parametrize(
    "options",
    [{}, {"kv_only": True}, {"matching": "cells", "ratio": 0.75}, {"matching": "pairs"}, {"window": 2, "ratio": 0.75}],
    ids=str,
)
def test_identical_tokens_are_exact_with_proportional_attention(
    make: Callable[..., Any], options: dict[str, Any]
) -> None:
    """A key that stands for n identical tokens and weighs n is all of them. Without log(n) the text gains weight."""
    model = make()
    call = _flat(model)
    plain = SD3.predict(model, **call)
    mean = {"ratio": 0.5, "early": "mean", "late": "mean", **options}
    assert torch.allclose(SD3.predict(tofu_sd.apply_patch(model, **mean), **call), plain, atol=2e-5)
    without = SD3.predict(tofu_sd.apply_patch(model, **mean, proportional=False), **call)
    assert (without - plain).abs().max() > 1e-2


@pytest.mark.parametrize("make", [sd3, sd35])
@forms
def test_projections_run_on_merged_tokens(make: Callable[..., Any], options: dict[str, Any]) -> None:
    """In every form, and the output's too where queries are merged: that is a third of what merging can save."""
    model = tofu_sd.apply_patch(make(), 0.5, **options)
    sizes: dict[str, list[int]] = {name: [] for name in ("to_q", "to_k", "to_v", "to_out.0")}
    for name, module in model.named_modules():
        for layer, seen in sizes.items():
            if name.endswith(f".{layer}"):
                module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[1]))
    SD3.predict(model)
    queries = 64 if "kv_only" in options else 32
    number = tofu_sd.summary(model).attention_modules
    assert sizes["to_q"] == sizes["to_out.0"] == [queries] * number
    assert sizes["to_k"] == sizes["to_v"] == [32] * number


@pytest.mark.parametrize("make", [sd3, sd35])
def test_keys_are_those_of_their_own_reduction(make: Callable[..., Any]) -> None:
    """Pruned keys are keys of the model; the same reduction for both, said twice, is said once."""
    plain = calls_of(make())[0]
    for options in ({"kv_only": True, "early": "prune"}, {"early": "mlerp", "kv_early": "prune"}):
        merged = calls_of(tofu_sd.apply_patch(make(), 0.5, **options))[0]
        for name in ("key", "value"):
            same = (merged[name][:, 0, :32, None] - plain[name][:, 0, None, :64]).abs().amax(-1) < 1e-5
            assert (same.sum(dim=-1) == 1).all()
    mean = {"early": "mean", "late": "mean"}
    once, twice = (
        tofu_sd.apply_patch(make(), 0.5, **mean, **kv) for kv in ({}, {"kv_early": "mean", "kv_late": "mean"})
    )
    assert torch.equal(SD3.predict(once), SD3.predict(twice))


@forms
def test_compiled_blocks_project_the_same_keys_in_one_graph(options: dict[str, Any]) -> None:
    model = tofu_sd.apply_patch(sd3(num_layers=1), 0.5, **options)
    before, graphs = SD3.predict(model), list[Any]()

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.transformer_blocks[0].compile(backend=count, fullgraph=True)
    assert torch.allclose(SD3.predict(model), before, atol=1e-5)
    assert len(graphs) == 1


def test_layers_of_the_projections_are_found_and_replaced_as_without_a_patch() -> None:
    """A library that wraps them, as peft does, reads and sets them by name."""
    model = tofu_sd.apply_patch(sd3(), 0.5, kv_only=True)
    attention = model.transformer_blocks[0].attn
    before = SD3.predict(model)
    assert attention.to_k is dict(attention.named_children())["to_k"]
    attention.to_k = torch.nn.Sequential(attention.to_k)
    assert isinstance(attention.to_k, torch.nn.Sequential)
    assert torch.equal(SD3.predict(model), before)
    assert isinstance(tofu_sd.remove_patch(model).transformer_blocks[0].attn.to_k, torch.nn.Sequential)


def test_fused_projections_merge_keys_after_them() -> None:
    """One layer projects queries, keys and values. The mean commutes with it, but not with a norm of the keys."""
    for norm, same in ((None, True), ("rms_norm", False)):
        model = tofu_sd.apply_patch(sd3(qk_norm=norm), 0.5, kv_only=True, early="mean", late="mean")
        before = SD3.predict(model)
        model.fuse_qkv_projections()
        assert torch.allclose(SD3.predict(model), before, atol=1e-4) == same


def test_default_has_proportional_attention_and_a_configuration_is_taken_literally() -> None:
    model = sd3()
    assert tofu_sd.summary(tofu_sd.apply_patch(model)).config.proportional
    assert not tofu_sd.summary(tofu_sd.apply_patch(model, proportional=False)).config.proportional
    assert not tofu_sd.summary(tofu_sd.apply_patch(model, tofu_sd.TokenFusionConfig(0.5))).config.proportional


# --- what its blocks have ---------------------------------------------------------------------------------------------


def test_dual_attention_uses_the_map_of_its_block() -> None:
    model = tofu_sd.apply_patch(sd35(), 0.5)
    with tofu_sd.record_maps(model) as records:
        seen = calls_of(model)
    assert [call["key"].shape[2] for call in seen] == [32 + TEXT, 32, 32 + TEXT, 32, 32 + TEXT]
    assert len(records) == 3
    assert tofu_sd.summary(model).attention_modules == 5


def test_merged_feed_forward_runs_after_dual_attention() -> None:
    sizes = []
    model = tofu_sd.apply_patch(sd35(), 0.5, merge_mlp=True)
    for block in model.transformer_blocks:
        block.ff.net[0].register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    SD3.predict(model)
    assert sizes == [32, 32, 32]
    only = tofu_sd.apply_patch(sd35(), 0.5, merge_attn=False, merge_mlp=True)
    assert [call["key"].shape[2] for call in calls_of(only)] == [64 + TEXT, 64, 64 + TEXT, 64, 64 + TEXT]
    assert tofu_sd.summary(only).attention_modules == 0


def test_early_and_late_reductions_split_at_half_of_the_blocks() -> None:
    rows = tofu_sd.summary(tofu_sd.apply_patch(sd3(num_layers=4), 0.5)).rows
    assert [row.reduction for row in rows] == ["prune", "prune", "mlerp", "mlerp"]


def test_skipped_layers_are_skipped() -> None:
    model = tofu_sd.apply_patch(sd3(), 0.5, share_across_blocks=True)
    assert len(calls_of(model, skip_layers=[0])) == 2
    assert SD3.predict(model, skip_layers=[0]).isfinite().all()


def test_fused_projections_give_the_same() -> None:
    plain = SD3.predict(tofu_sd.apply_patch(sd3(), 0.5))
    model = tofu_sd.apply_patch(sd3(), 0.5)
    model.fuse_qkv_projections()
    assert torch.allclose(SD3.predict(model), plain, atol=1e-4)


@forms
def test_controlnet_residuals_are_added_to_all_tokens(options: dict[str, Any]) -> None:
    model = sd3()
    residuals = [tiny.noise(2, 64, 16, seed=i) for i in range(2)]
    plain = SD3.predict(model, block_controlnet_hidden_states=residuals)
    tofu_sd.apply_patch(model, 0.5, **options)
    merged = SD3.predict(model, block_controlnet_hidden_states=residuals)
    assert (merged - plain).norm() < (SD3.predict(model) - plain).norm()
    assert torch.equal(
        SD3.predict(tofu_sd.apply_patch(model, 0.0, **options), block_controlnet_hidden_states=residuals), plain
    )


def _with_ip_adapter(model: Any) -> dict[str, Any]:
    """Sets IP-Adapter processors; returns the arguments of a call that gives them image features."""
    processors = {
        name: tiny.lively(SD3IPAdapterJointAttnProcessor2_0(16, 16, 8, timesteps_emb_dim=8, scale=0.8), 6)
        for name in model.attn_processors
    }
    model.set_attn_processor(processors)
    return {"joint_attention_kwargs": {"ip_hidden_states": tiny.noise(2, 5, 16), "temb": tiny.noise(2, 8)}}


@pytest.mark.parametrize("make", [sd3, sd35])
@forms
def test_ip_adapter_attends_to_merged_image_tokens(make: Callable[..., Any], options: dict[str, Any]) -> None:
    """Its own attention joins the image's keys with those of its features, which must not gain weight either."""
    model = make()
    call = _with_ip_adapter(model)
    plain = SD3.predict(model, **call)
    assert not torch.allclose(plain, SD3.predict(model), atol=1e-2)
    tofu_sd.apply_patch(model, 0.5, **options)
    seen = calls_of(model, **call)[1]
    assert seen["key"].shape[2] == 32 + 5
    assert torch.allclose(seen["attn_mask"].exp()[:, 0, 0].sum(-1), torch.tensor(64.0 + 5))
    assert not torch.equal(SD3.predict(model, **call), plain)
    assert torch.equal(SD3.predict(tofu_sd.remove_patch(model), **call), plain)
    flat = {**_flat(model), **call}
    exact = SD3.predict(model, **flat)
    mean = {**options, "early": "mean", "late": "mean"}
    assert torch.allclose(SD3.predict(tofu_sd.apply_patch(model, 0.5, **mean), **flat), exact, atol=5e-5)


# --- pipelines --------------------------------------------------------------------------------------------------------

IMAGE = torch.linspace(0, 1, 3 * 128 * 128).view(1, 3, 128, 128)
MASK = (torch.arange(128) > 64).float().expand(1, 1, 128, 128)
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "text-to-image": (sd3_pipe, {}),
    "dual attention": (lambda: sd3_pipe(make=sd35), {}),
    "not square": (sd3_pipe, {"height": 96, "width": 160}),
    "without guidance": (sd3_pipe, {"guidance_scale": 1.0}),
    "several images": (sd3_pipe, {"num_images_per_prompt": 2, "prompt": ["a fox", "a long red hat on a table"]}),
    "skip-layer guidance": (
        sd3_pipe,
        {"skip_guidance_layers": [1], "num_inference_steps": 4, "skip_layer_guidance_stop": 0.9},
    ),
    "img2img": (lambda: sd3_pipe(StableDiffusion3Img2ImgPipeline), {"image": IMAGE, "strength": 0.9}),
    "inpaint": (
        lambda: sd3_pipe(StableDiffusion3InpaintPipeline, make=partial(sd3, in_channels=16, out_channels=16)),
        {"image": IMAGE, "mask_image": MASK, "strength": 0.9},
    ),
    "ControlNet": (
        lambda: sd3_pipe(StableDiffusion3ControlNetPipeline, controlnet=_controlnet()),
        {"control_image": IMAGE, "controlnet_conditioning_scale": 0.7},
    ),
}


def _controlnet() -> SD3ControlNetModel:
    config = dict(sd3().config)
    wanted = {name: config[name] for name in config if name in SD3ControlNetModel.__init__.__wrapped__.__annotations__}
    return tiny.lively(SD3ControlNetModel(**{**wanted, "num_layers": 2}), 7)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_merge_and_undo(name: str) -> None:
    make, call = PIPELINES[name]
    pipe = make()
    plain = images(pipe, **call)
    assert tofu_sd.apply_patch(pipe, 0.5) is pipe
    merged = images(pipe, **call)
    assert merged.shape == plain.shape
    assert merged.isfinite().all()
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert torch.equal(images(pipe, **call), merged)  # the same seed gives the same image
    assert torch.equal(images(tofu_sd.apply_patch(pipe, 0.0), **call), plain)
    assert torch.equal(images(tofu_sd.remove_patch(pipe), **call), plain)


def test_step_window_is_measured_by_the_schedulers_timesteps() -> None:
    pipe = sd3_pipe()
    timesteps: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: timesteps.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    tofu_sd.apply_patch(pipe, 0.5, end=0.4)
    images(pipe, num_inference_steps=6)
    expected = sum(1 - t / 1000 < 0.4 for t in timesteps)
    assert 0 < expected < 6
    assert tofu_sd.summary(pipe).rows[0].counts.merged == expected


def test_maps_are_kept_over_steps_of_one_image() -> None:
    pipe = tofu_sd.apply_patch(sd3_pipe(), 0.5, match_interval=3)
    images(pipe, num_inference_steps=6)
    counts = tofu_sd.summary(pipe).rows[0].counts
    assert (counts.merged, counts.maps) == (6, 2)
    images(pipe, num_inference_steps=1, seed=3)  # another image matches again
    assert tofu_sd.summary(pipe).rows[0].counts.maps == 3


def test_threshold_merges_nothing_in_the_first_step() -> None:
    pipe = tofu_sd.apply_patch(sd3_pipe(), 0.5, threshold=0.1)
    images(pipe, num_inference_steps=3)
    assert tofu_sd.summary(pipe).rows[0].counts.merged == 2


def test_map_of_one_prompt_serves_both_halves_of_the_batch() -> None:
    pipe = tofu_sd.apply_patch(sd3_pipe(), 0.5, share_across_cfg=True)
    with tofu_sd.record_maps(pipe) as records:
        images(pipe, num_inference_steps=1)
    assert all(torch.equal(*record.map.group_idx) for record in records)
    with pytest.raises(ValueError, match="share_across_cfg needs two equal halves of the batch"):
        images(pipe, guidance_scale=1.0)


def test_perturbed_attention_guidance_is_refused() -> None:
    """Its processors split the batch, and attend with a mask over all image tokens."""
    pipe = tofu_sd.apply_patch(sd3_pipe(StableDiffusion3PAGPipeline, pag_applied_layers="blocks.1"), 0.5)
    with pytest.raises(RuntimeError, match=r"PAG.*AttnProcessor2_0 is not known to run on merged tokens"):
        images(pipe, pag_scale=3.0)


def test_attention_by_size_of_groups_equals_the_bias() -> None:
    """Where groups have one size, two attentions are merged by their log-sum-exp. It needs no bias."""
    from tofu_sd.core.attention_by_size import attend_by_size
    from tofu_sd.core.joint_attention import joint_classes, joint_log_size
    from tofu_sd.core.proportional import weighted_attention

    query, key, value = (tiny.noise(2, 2, n, 8, seed=n) for n in (40, 16 + TEXT, 16 + TEXT))
    value = tiny.noise(2, 2, 16 + TEXT, 8, seed=1)
    for start in (0, TEXT):
        classes = joint_classes(((16, 4),), start, 16 + TEXT)
        log_size = joint_log_size(torch.full((2, 16), 4.0).log(), start, 16 + TEXT)
        biased = weighted_attention(query, key, value, log_size)
        assert torch.allclose(attend_by_size(query, key, value, classes), biased, atol=1e-5)
        repeats = log_size[0].exp().round().long()
        repeated: list[Tensor] = [x.repeat_interleave(repeats, dim=2) for x in (key, value)]
        assert torch.allclose(F.scaled_dot_product_attention(query, *repeated), biased, atol=1e-5)
