"""Flux.1 and Chroma: merging after the rotation, inside of attention, and the pipelines of Flux."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import (
    ChromaPipeline,
    FirstBlockCacheConfig,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    attention_backend,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from sdpa_calls import SDPACalls
from tiny_transformers import ROTARY, TEXT, Tiny, chroma, flux, flux_images, flux_pipe, grid_ids, images

import tofu_sd

FLUX, CHROMA = ROTARY["flux"], ROTARY["chroma"]
CELLS = {"matching": "cells", "ratio": 0.75}
families = pytest.mark.parametrize("family", ROTARY.values(), ids=ROTARY)
FORMS: dict[str, dict[str, Any]] = {
    "all": {},
    "keys and values": {"kv_only": True},
    "queries and keys apart": {"kv_early": "mean", "kv_late": "mean"},
}
forms = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


def calls_of(family: Tiny, model: Any, **call: Any) -> list[dict[str, Any]]:
    with SDPACalls() as calls:
        family.predict(model, **call)
    return calls.seen


# --- text and positions -----------------------------------------------------------------------------------------------


@families
@forms
def test_text_enters_attention_unchanged(family: Tiny, options: dict[str, Any]) -> None:
    """Bit for bit, with 0 added to its logits: in the first block, as later ones get what that made of the image."""
    model = family.make()
    call = {**family.inputs(), "attention_mask": None} if family is CHROMA else {}
    plain = calls_of(family, model, **call)[0]
    merged = calls_of(family, tofu_sd.apply_patch(model, 0.5, **options), **call)[0]
    for name in ("query", "key", "value"):
        assert torch.equal(plain[name][:, :, :TEXT], merged[name][:, :, :TEXT])
    assert plain["key"].shape[2] - merged["key"].shape[2] == 32
    assert plain["query"].shape[2] - merged["query"].shape[2] == (0 if "kv_only" in options else 32)
    assert (merged["attn_mask"][..., :TEXT] == 0).all()
    size = merged["attn_mask"][:, 0, 0, TEXT:].exp()
    assert torch.allclose(size.sum(dim=-1), torch.tensor(64.0))


@families
@pytest.mark.parametrize("options", [{}, {"kv_only": True}, CELLS, {**CELLS, "kv_only": True}], ids=str)
def test_identical_tokens_are_exact_without_positions(family: Tiny, options: dict[str, Any]) -> None:
    """With positions identical tokens have keys that are rotated apart, and their average is shorter."""
    model = family.make()
    call = family.inputs()
    call["hidden_states"] = call["hidden_states"][:, :1].repeat(1, 64, 1)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):  # as if all positions were 0
        block.register_forward_pre_hook(_without_rotation, with_kwargs=True)
    plain = family.predict(model, **call)
    mean = {"ratio": 0.5, "early": "mean", "late": "mean", **options}
    assert torch.allclose(family.predict(tofu_sd.apply_patch(model, **mean), **call), plain, atol=2e-5)
    without = family.predict(tofu_sd.apply_patch(model, **mean, proportional=False), **call)
    assert (without - plain).abs().max() > 1e-2


def _without_rotation(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "image_rotary_emb": None}


@families
def test_keys_are_merged_after_the_rotation(family: Tiny) -> None:
    """The keys of a cell are averaged as attention gets them: with their positions."""
    model = family.make()
    plain = calls_of(family, model)[0]["key"][:, :, TEXT:]
    cells = {"matching": "cells", "ratio": 0.75, "kv_only": True, "early": "mean", "late": "mean"}
    merged = calls_of(family, tofu_sd.apply_patch(model, **cells))[0]["key"][:, :, TEXT:]
    expected = F.avg_pool2d(plain.mT.reshape(4, -1, 8, 8), 2).reshape(2, 2, -1, 16).mT
    assert torch.allclose(merged.sort(dim=2).values, expected.sort(dim=2).values, atol=1e-5)


@families
def test_single_blocks_match_the_image_alone(family: Tiny) -> None:
    """A map that contained text would have other positions: all maps are of the image, and differ between blocks."""
    model = tofu_sd.apply_patch(family.make(), 0.5)
    with tofu_sd.record_maps(model) as records:
        family.predict(model)
    assert [record.block.split(".")[0] for record in records] == [
        *["transformer_blocks"] * 2, *["single_transformer_blocks"] * 2,
    ]  # fmt: skip
    assert all(record.map.group_idx.shape == (2, 64) for record in records)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [(8, 8), (4, 6)])
@forms
def test_reference_images_are_left_alone(side: tuple[int, int], options: dict[str, Any]) -> None:
    """Kontext's reference follows the image, with 1 in the first column of its ids."""
    model = flux()
    call = FLUX.inputs()
    n = side[0] * side[1]
    call["hidden_states"] = torch.cat([call["hidden_states"], tiny.noise(2, n, 16, seed=5)], dim=1)
    call["img_ids"] = torch.cat([grid_ids(8, 8), grid_ids(*side, image=1)])
    plain = calls_of(FLUX, model, **call)[0]
    baseline = FLUX.predict(model, **call)
    merged = calls_of(FLUX, tofu_sd.apply_patch(model, 0.5, **options), **call)
    assert [seen["key"].shape[2] for seen in merged] == [TEXT + 32 + n] * 4
    assert torch.equal(plain["key"][:, :, -n:], merged[0]["key"][:, :, -n:])
    assert (merged[0]["attn_mask"][..., -n:] == 0).all()
    assert FLUX.predict(model, **call).shape == baseline.shape
    assert torch.equal(FLUX.predict(tofu_sd.apply_patch(model, 0.0, **options), **call), baseline)


@families
def test_tokens_that_are_no_grid_are_refused(family: Tiny) -> None:
    model = tofu_sd.apply_patch(family.make(), 0.5)
    call = family.inputs()
    for ids in (grid_ids(8, 8).roll(1, 0), grid_ids(8, 8)[:, [0, 2, 1]], torch.zeros(64, 3)):
        with pytest.raises(ValueError, match="position ids of 64 image tokens are no grid of height x width"):
            family.predict(model, **{**call, "img_ids": ids})
    with pytest.raises(ValueError, match=r"img_ids has positions for 8 x 9 tokens .* there are 64 image tokens"):
        family.predict(model, **{**call, "img_ids": grid_ids(8, 9)})


def test_ids_that_are_changed_in_place_are_read_again() -> None:
    model = tofu_sd.apply_patch(flux(), 0.5, window=1)
    call = FLUX.inputs(4, 16)
    FLUX.predict(model, **call)
    call["img_ids"].copy_(grid_ids(16, 4))
    with tofu_sd.record_maps(model) as records:
        FLUX.predict(model, **call)
    assert (records[0].h, records[0].w) == (16, 4)


def test_inference_tensors_are_read_in_each_call() -> None:
    """They have no version that would tell that they were changed in place."""
    model = tofu_sd.apply_patch(flux(), 0.5, window=1)
    with torch.inference_mode():
        call = FLUX.inputs(4, 16)
        model(**call)
        call["img_ids"].copy_(grid_ids(16, 4))
        with tofu_sd.record_maps(model) as records:
            model(**call)
    assert (records[0].h, records[0].w) == (16, 4)


@pytest.mark.parametrize("before_compiling", [True, False])
def test_compiled_model_takes_its_own_layout(before_compiling: bool) -> None:
    """Another model that ran at a size of as many tokens has no effect, and compiles nothing again."""
    torch._dynamo.reset()
    model, other = (tofu_sd.apply_patch(flux(seed), 0.5, min_tokens=0) for seed in range(2))
    expected = FLUX.predict(model)
    if before_compiling:
        FLUX.predict(other, 4, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(FLUX.predict(compiled), expected, atol=1e-6)
    with torch.compiler.set_stance("fail_on_recompile"):
        FLUX.predict(other, 4, 16)
        assert torch.allclose(FLUX.predict(compiled), expected, atol=1e-6)


def test_compiled_model_checks_the_layout_that_it_was_made_for() -> None:
    """Two sizes with equally many tokens share a graph, which cannot read the ids but compares them."""
    torch._dynamo.reset()
    model = tofu_sd.apply_patch(flux(), 0.5, min_tokens=0)
    FLUX.predict(model, 4, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    FLUX.predict(compiled, 4, 16)
    with pytest.raises(RuntimeError, match="made for an image of 4 x 16 tokens"):
        FLUX.predict(compiled, 8, 8)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="run it once at this size before"):
        FLUX.predict(torch.compile(model, fullgraph=True, backend="eager"), 3, 37)


def test_repeated_blocks_compile() -> None:
    torch._dynamo.reset()
    model = tofu_sd.apply_patch(flux(), 0.5)
    expected = FLUX.predict(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.allclose(FLUX.predict(model), expected, atol=1e-6)
    other = FLUX.predict(model, 6, 10)
    assert torch.allclose(other, FLUX.predict(tofu_sd.apply_patch(flux(), 0.5), 6, 10), atol=1e-5)


# --- masks and kernels ------------------------------------------------------------------------------------------------


@forms
def test_hidden_text_stays_hidden_in_chroma(options: dict[str, Any]) -> None:
    """Padding of the text has no influence on the image, with its mask; without it, it has."""
    model = tofu_sd.apply_patch(chroma(), 0.5, **options)
    call = CHROMA.inputs()
    padded = {**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()}
    padded["encoder_hidden_states"][:, 5:] += 3
    assert torch.allclose(CHROMA.predict(model, **call), CHROMA.predict(model, **padded), atol=1e-5)
    without = {"attention_mask": None}
    assert not torch.allclose(
        CHROMA.predict(model, **{**call, **without}), CHROMA.predict(model, **{**padded, **without}), atol=1e-2
    )


@pytest.mark.parametrize("proportional", [True, False])
@forms
def test_mask_that_hides_nothing_changes_nothing(options: dict[str, Any], proportional: bool) -> None:
    model = tofu_sd.apply_patch(chroma(), 0.5, proportional=proportional, **options)
    ones = torch.ones(2, TEXT + 64)
    expected = CHROMA.predict(model, attention_mask=None)
    for mask in (ones.bool(),):
        assert torch.allclose(CHROMA.predict(model, attention_mask=mask), expected, atol=1e-5)


def test_masks_that_hide_image_tokens_are_refused() -> None:
    call = CHROMA.inputs()
    call["attention_mask"][0, TEXT + 3] = False
    with pytest.raises(ValueError, match="attention_mask hides image tokens of Chroma's attention"):
        CHROMA.predict(tofu_sd.apply_patch(chroma(), 0.5), **call)
    model = tofu_sd.apply_patch(chroma(), 0.5)
    call = CHROMA.inputs()
    CHROMA.predict(model, **call)
    call["attention_mask"][0, TEXT + 3] = False  # a mask that is changed is read again
    with pytest.raises(ValueError, match="attention_mask hides image tokens of Chroma's attention"):
        CHROMA.predict(model, **call)
    model = tofu_sd.apply_patch(flux(), 0.5)
    with pytest.raises(ValueError, match="attention_mask hides tokens of joint attention by their position"):
        FLUX.predict(model, joint_attention_kwargs={"attention_mask": torch.ones(1, 1, 1, TEXT + 64).bool()})


@families
def test_other_attention_backends_are_refused(family: Tiny) -> None:
    model = tofu_sd.apply_patch(family.make(), 0.5)
    message = "the attention backend '_native_math' does not call torch's scaled_dot_product_attention"
    with attention_backend("_native_math"), pytest.raises(RuntimeError, match=message):
        family.predict(model)
    model.set_attention_backend("_native_math")
    with pytest.raises(RuntimeError, match=message):
        family.predict(model)
    with pytest.raises(RuntimeError, match=message):
        tofu_sd.apply_patch(model, 0.25)
    model.set_attention_backend("native")
    assert family.predict(model).isfinite().all()


@families
def test_parallelism_is_refused(family: Tiny) -> None:
    model = tofu_sd.apply_patch(family.make(), 0.5)
    model.transformer_blocks[1].attn.processor._parallel_config = object()
    with pytest.raises(RuntimeError, match=r"parallelism .* splits the sequence over devices"):
        family.predict(model)


# --- features ---------------------------------------------------------------------------------------------------------


@families
def test_fused_projections_give_the_same(family: Tiny) -> None:
    model = tofu_sd.apply_patch(family.make(), 0.5)
    plain, share = family.predict(model), tofu_sd.summary(model).attention_share
    model.fuse_qkv_projections()
    assert torch.allclose(family.predict(model), plain, atol=1e-4)
    assert tofu_sd.summary(model).attention_share == share


@pytest.mark.parametrize("family", [FLUX, CHROMA], ids=["flux", "chroma"])
@forms
def test_controlnet_residuals_are_added_to_all_tokens(family: Tiny, options: dict[str, Any]) -> None:
    model = family.make()
    residuals = {
        "controlnet_block_samples": [tiny.noise(2, 64, 32, seed=1)],
        "controlnet_single_block_samples": [tiny.noise(2, 64, 32, seed=2)],
    }
    plain = family.predict(model, **residuals)
    merged = family.predict(tofu_sd.apply_patch(model, 0.5, **options), **residuals)
    assert (merged - plain).norm() < (family.predict(model) - plain).norm()
    assert torch.equal(family.predict(tofu_sd.apply_patch(model, 0.0, **options), **residuals), plain)


@pytest.mark.parametrize("family", [FLUX, CHROMA], ids=["flux", "chroma"])
@pytest.mark.parametrize("patch_first", [True, False])
@forms
def test_ip_adapter_attends_with_all_queries(family: Tiny, patch_first: bool, options: dict[str, Any]) -> None:
    """Its own attention has keys of its features alone, and stays as it is."""
    model = family.make()
    own = model.attn_processors
    with_adapter = {
        name: tiny.lively(FluxIPAdapterAttnProcessor(32, 16, num_tokens=(5,), scale=0.8), 6)
        for name in own
        if name.startswith("transformer_blocks")
    }
    model.set_attn_processor({**own, **with_adapter})
    call = {"joint_attention_kwargs": {"ip_hidden_states": [tiny.noise(2, 5, 16)]}}
    plain = calls_of(family, model, **call)[1]
    baseline = family.predict(model, **call)
    if patch_first:
        model.set_attn_processor({**own})
        tofu_sd.apply_patch(model, 0.5, **options)
        model.set_attn_processor({**own, **with_adapter})
    else:
        tofu_sd.apply_patch(model, 0.5, **options)
    seen = calls_of(family, model, **call)
    assert [s["key"].shape[2] for s in seen] == [TEXT + 32, 5] * 2 + [TEXT + 32] * 2
    assert torch.equal(seen[1]["query"], plain["query"])
    assert not torch.equal(family.predict(model, **call), baseline)
    assert torch.equal(family.predict(tofu_sd.remove_patch(model), **call), baseline)


def test_first_block_cache_works_after_the_patch() -> None:
    """On Flux; the cache of diffusers does not know Chroma's blocks."""
    model = tofu_sd.apply_patch(flux(), 0.5)
    first, other = FLUX.predict(model), FLUX.predict(model, seed=9)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with model.cache_context("cond"):
        assert torch.equal(FLUX.predict(model), first)
        assert not torch.equal(FLUX.predict(model, seed=9), other)  # the rest of the blocks was skipped
    model.disable_cache()
    assert torch.equal(FLUX.predict(model), first)


# --- pipelines --------------------------------------------------------------------------------------------------------

IMAGE = torch.linspace(0, 1, 3 * 128 * 128).view(1, 3, 128, 128)
MASK = (torch.arange(128) > 64).float().expand(1, 1, 128, 128)
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "text-to-image": (flux_pipe, {}),
    "embedded guidance": (lambda: flux_pipe(make=lambda: flux(guidance_embeds=True)), {}),
    "not square": (flux_pipe, {"height": 96, "width": 160}),
    "several images": (flux_pipe, {"num_images_per_prompt": 2}),
    "true guidance": (
        flux_pipe,
        {
            "true_cfg_scale": 3.0,
            "negative_prompt_embeds": tiny.noise(1, TEXT, 32, seed=3),
            "negative_pooled_prompt_embeds": tiny.noise(1, 16, seed=4),
        },
    ),
    "img2img": (lambda: flux_pipe(FluxImg2ImgPipeline), {"image": IMAGE, "strength": 0.9}),
    "inpaint": (
        lambda: flux_pipe(FluxInpaintPipeline),
        {"image": IMAGE, "mask_image": MASK, "strength": 0.9},
    ),
    "Fill": (
        lambda: flux_pipe(FluxFillPipeline, make=lambda: flux(in_channels=16 + 16 + 256, out_channels=16)),
        {"image": IMAGE, "mask_image": MASK},
    ),
    "Kontext": (
        lambda: flux_pipe(FluxKontextPipeline),
        {"image": IMAGE, "_auto_resize": False, "max_area": 128 * 128},
    ),
    "Control": (
        lambda: flux_pipe(FluxControlPipeline, make=lambda: flux(in_channels=32, out_channels=16)),
        {"control_image": IMAGE},
    ),
    "Kontext inpaint": (
        lambda: flux_pipe(FluxKontextInpaintPipeline),
        {"image": IMAGE, "mask_image": MASK, "strength": 0.9, "_auto_resize": False, "max_area": 128 * 128},
    ),
    "ControlNet": (
        lambda: flux_pipe(FluxControlNetPipeline, controlnet=_controlnet()),
        {"control_image": IMAGE, "controlnet_conditioning_scale": 0.7},
    ),
}


def _controlnet() -> FluxControlNetModel:
    from tiny_transformers import FLUX as SHAPE

    shape = {**SHAPE, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 16}
    return tiny.lively(FluxControlNetModel(**shape), 7)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_merge_and_undo(name: str) -> None:
    make, call = PIPELINES[name]
    pipe = make()
    plain = flux_images(pipe, **call)
    merged = flux_images(tofu_sd.apply_patch(pipe, 0.5), **call)
    assert merged.shape == plain.shape
    assert merged.isfinite().all()
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert torch.equal(flux_images(pipe, **call), merged)
    assert torch.equal(flux_images(tofu_sd.apply_patch(pipe, 0.0), **call), plain)
    assert torch.equal(flux_images(tofu_sd.remove_patch(pipe), **call), plain)


def test_chroma_pipeline_merges_and_undoes() -> None:
    pipe = tiny.quiet(
        ChromaPipeline(
            scheduler=flux_pipe().scheduler,
            vae=flux_pipe().vae,
            text_encoder=None,
            tokenizer=None,
            transformer=chroma(),
        )
    )
    mask = torch.arange(TEXT)[None] < 5
    call: dict[str, Any] = {
        "prompt": None,
        "prompt_embeds": tiny.noise(1, TEXT, 32, seed=1), "prompt_attention_mask": mask,
        "negative_prompt_embeds": tiny.noise(1, TEXT, 32, seed=2), "negative_prompt_attention_mask": mask,
    }  # fmt: skip
    plain = images(pipe, **call)
    merged = images(tofu_sd.apply_patch(pipe, 0.5), **call)
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert torch.equal(images(tofu_sd.remove_patch(pipe), **call), plain)


def _timesteps(pipe: Any) -> list[float]:
    seen: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    return seen


def test_step_window_is_measured_by_the_models_timesteps() -> None:
    """Flux gets the scheduler's timestep divided by 1000."""
    pipe = flux_pipe()
    timesteps = _timesteps(pipe)
    tofu_sd.apply_patch(pipe, 0.5, end=0.5)
    flux_images(pipe, num_inference_steps=6)
    expected = sum(1 - t < 0.5 for t in timesteps)
    assert 0 < expected < 6
    assert tofu_sd.summary(pipe).rows[0].counts.merged == expected


def test_maps_are_kept_over_steps_of_one_image() -> None:
    pipe = tofu_sd.apply_patch(flux_pipe(), 0.5, match_interval=3)
    flux_images(pipe, num_inference_steps=6)
    counts = tofu_sd.summary(pipe).rows[0].counts
    assert counts.maps < counts.merged == 6


def test_sharing_a_map_between_prompts_needs_one_batch() -> None:
    with pytest.raises(ValueError, match="share_across_cfg needs two equal halves of the batch"):
        flux_images(tofu_sd.apply_patch(flux_pipe(), 0.5, share_across_cfg=True))
