"""Z-Image: lists of samples, one sequence with the image first, and a mask where prompts differ in length."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline
from sdpa_calls import SDPACalls
from tiny_pipelines import without_encoder
from tiny_transformers import JOINT, LONG_TEXT, images, shifted_vae, z_image
from torch import Tensor

import tofu_sd

Z_IMAGE = JOINT["z-image"]
FORMS: dict[str, dict[str, Any]] = {
    "all": {},
    "keys and values": {"kv_only": True},
    "queries and keys apart": {"kv_early": "mean", "kv_late": "mean"},
}
forms = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
REFINED = 2  # calls of attention in the refiners, before the layers
ONE_LENGTH = {"cap_feats": [tiny.noise(LONG_TEXT, 32, seed=i) for i in range(2)]}


def calls_of(model: Any, **call: Any) -> list[dict[str, Any]]:
    with SDPACalls() as calls:
        Z_IMAGE.predict(model, **call)
    return calls.seen


# --- text, padding and refiners ---------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("call", [{}, ONE_LENGTH], ids=["mask", "no mask"])
def test_text_enters_attention_unchanged(options: dict[str, Any], call: dict[str, Any]) -> None:
    """Bit for bit, with 0 added to its logits; the end of shorter sequences stays hidden."""
    model = z_image()
    plain = calls_of(model, **call)[REFINED]
    merged = calls_of(tofu_sd.apply_patch(model, 0.5, **options), **call)[REFINED]
    for name in ("query", "key", "value"):
        assert torch.equal(plain[name][:, :, 64:], merged[name][:, :, -64:])
    assert plain["key"].shape[2] - merged["key"].shape[2] == 32
    assert plain["query"].shape[2] - merged["query"].shape[2] == (0 if "kv_only" in options else 32)
    bias = merged["attn_mask"][:, 0, 0]
    assert (bias[:, -64:-32] == 0).all()
    assert (bias[:, -32:] == (0 if call else torch.tensor([[-torch.inf], [0.0]]))).all()
    assert torch.allclose(bias[:, :-64].exp().sum(dim=-1), torch.tensor(64.0))


def test_refiners_run_on_all_tokens() -> None:
    model = z_image()
    plain = calls_of(model)[:REFINED]
    merged = calls_of(tofu_sd.apply_patch(model, 0.5))[:REFINED]
    for before, after in zip(plain, merged, strict=True):
        assert torch.equal(before["query"], after["query"])
    assert tofu_sd.summary(model).attention_modules == 3


@forms
def test_padding_of_the_image_is_left_alone(options: dict[str, Any]) -> None:
    """A sequence of 5 x 7 tokens is padded to 64. Its padding is none of the image's."""
    model = z_image()
    with SDPACalls() as plain:
        Z_IMAGE.predict(model, 5, 7)
    tofu_sd.apply_patch(model, 0.5, **options)
    with tofu_sd.record_maps(model) as records, SDPACalls() as merged:
        Z_IMAGE.predict(model, 5, 7)
    kept = 35 - 17
    before, after = (calls.seen[REFINED]["key"] for calls in (plain, merged))
    assert torch.equal(before[:, :, 35:], after[:, :, kept:])
    assert all(record.map.group_idx.shape == (2, 35) for record in records)


@pytest.mark.parametrize("options", [{}, {"kv_only": True}, {"matching": "cells", "ratio": 0.75}], ids=str)
@pytest.mark.parametrize("call", [{}, ONE_LENGTH], ids=["mask", "no mask"])
def test_identical_tokens_are_exact_without_positions(options: dict[str, Any], call: dict[str, Any]) -> None:
    model = z_image()
    call = {**Z_IMAGE.inputs(), **call}
    call["x"] = [x[..., :2, :2].repeat(1, 1, 8, 8) for x in call["x"]]
    for block in (*model.noise_refiner, *model.layers):
        block.register_forward_pre_hook(lambda module, args: (*args[:2], None, *args[3:]))
    plain = Z_IMAGE.predict(model, **call)
    mean = {"ratio": 0.5, "early": "mean", "late": "mean", **options}
    assert torch.allclose(Z_IMAGE.predict(tofu_sd.apply_patch(model, **mean), **call), plain, atol=2e-5)
    without = Z_IMAGE.predict(tofu_sd.apply_patch(model, **mean, proportional=False), **call)
    assert (without - plain).abs().max() > 1e-2


@forms
def test_sample_is_independent_of_the_length_of_another_prompt(options: dict[str, Any]) -> None:
    """A longer prompt in the batch pads the others, behind a mask."""
    model = tofu_sd.apply_patch(z_image(), 0.5, **options)
    call = Z_IMAGE.inputs()
    alone = {name: value[:1] for name, value in call.items()}
    assert torch.allclose(Z_IMAGE.predict(model, **call)[:1], Z_IMAGE.predict(model, **alone), atol=1e-4)


# --- calls ------------------------------------------------------------------------------------------------------------


def test_calls_that_are_no_image_of_one_size_are_refused() -> None:
    model = tofu_sd.apply_patch(z_image(siglip_feat_dim=8), 0.5)
    call = Z_IMAGE.inputs()
    sizes = [call["x"][0], tiny.noise(4, 1, 8, 32)]
    frames = [tiny.noise(4, 2, 16, 8, seed=i) for i in range(2)]
    for x in (sizes, frames):
        with pytest.raises(ValueError, match=r"x has latents of \(frames, height, width\) .* one frame of one size"):
            Z_IMAGE.predict(model, x=x)
    omni = {
        "x": [[each, each] for each in call["x"]],
        "cap_feats": [[each, each] for each in call["cap_feats"]],
        "siglip_feats": [None, None],
        "image_noise_mask": [[0, 1]] * 2,
    }
    with pytest.raises(ValueError, match=r"x has several images for each sample \(Z-Image-Omni\)"):
        Z_IMAGE.predict(model, **omni)


def test_sharing_a_map_between_prompts_needs_equal_latents() -> None:
    """Latents come as a list, whose halves are compared as those of other models."""
    model = tofu_sd.apply_patch(z_image(), 0.5, share_across_cfg=True)
    with pytest.raises(ValueError, match="share_across_cfg needs two equal halves of the batch"):
        Z_IMAGE.predict(model)
    x = Z_IMAGE.inputs()["x"][0]
    with tofu_sd.record_maps(model) as records:
        Z_IMAGE.predict(model, x=[x, x])
    assert all(torch.equal(*record.map.group_idx) for record in records)


def test_controlnet_residuals_are_added_to_all_tokens() -> None:
    model = z_image()
    residuals = {"controlnet_block_samples": {0: tiny.noise(2, 128, 32, seed=1)}}
    plain = Z_IMAGE.predict(model, **residuals)
    merged = Z_IMAGE.predict(tofu_sd.apply_patch(model, 0.5), **residuals)
    assert not torch.allclose(plain, Z_IMAGE.predict(model), atol=1e-2)
    assert (merged - plain).norm() < (Z_IMAGE.predict(model) - plain).norm()
    assert torch.equal(Z_IMAGE.predict(tofu_sd.apply_patch(model, 0.0), **residuals), plain)


# --- pipelines --------------------------------------------------------------------------------------------------------

IMAGE = torch.linspace(0, 1, 3 * 128 * 128).view(1, 3, 128, 128)
MASK = (torch.arange(128) > 64).float().expand(1, 1, 128, 128)
TEXTS = {
    "prompt": None,
    "prompt_embeds": [tiny.noise(9, 32, seed=1)],
    "negative_prompt_embeds": [tiny.noise(LONG_TEXT, 32, seed=2)],
}
PIPELINES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "text-to-image": (ZImagePipeline, {}),
    "without guidance": (ZImagePipeline, {"guidance_scale": 0.0}),
    "not square": (ZImagePipeline, {"height": 96, "width": 160}),
    "odd": (ZImagePipeline, {"height": 80, "width": 112}),
    "img2img": (ZImageImg2ImgPipeline, {"image": IMAGE, "strength": 0.9}),
    "inpaint": (ZImageInpaintPipeline, {"image": IMAGE, "mask_image": MASK, "strength": 0.9}),
}


def _pipe(cls: type[Any] = ZImagePipeline) -> Any:
    return without_encoder(cls, shifted_vae(), z_image())


def _images(pipe: Any, **call: Any) -> Tensor:
    return images(pipe, **{**TEXTS, **call})


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_merge_and_undo(name: str) -> None:
    cls, call = PIPELINES[name]
    pipe = _pipe(cls)
    plain = _images(pipe, **call)
    merged = _images(tofu_sd.apply_patch(pipe, 0.5), **call)
    assert merged.isfinite().all()
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert torch.equal(_images(pipe, **call), merged)
    assert torch.equal(_images(tofu_sd.apply_patch(pipe, 0.0), **call), plain)
    assert torch.equal(_images(tofu_sd.remove_patch(pipe), **call), plain)


def test_step_window_is_measured_by_the_schedulers_timesteps() -> None:
    """The model gets 1 minus the scheduler's timestep / 1000: an image begins at 0."""
    pipe = _pipe()
    progress: list[float] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: progress.append(float(args[1][0])))
    for window in ({"end": 0.4}, {"start": 0.4}):
        progress.clear()
        tofu_sd.apply_patch(pipe, 0.5, **window)
        _images(pipe, num_inference_steps=6)
        expected = sum(t < 0.4 if "end" in window else t >= 0.4 for t in progress)
        assert progress == sorted(progress)
        assert 0 < expected < 6
        assert tofu_sd.summary(pipe).rows[0].counts.merged == expected


def test_maps_are_kept_over_steps_of_one_image() -> None:
    pipe = tofu_sd.apply_patch(_pipe(), 0.5, match_interval=3)
    _images(pipe, num_inference_steps=6)
    counts = tofu_sd.summary(pipe).rows[0].counts
    assert (counts.merged, counts.maps) == (6, 2)
    _images(pipe, num_inference_steps=1, seed=3)  # another image matches again
    assert tofu_sd.summary(pipe).rows[0].counts.maps == 3


def test_threshold_merges_nothing_in_the_first_step() -> None:
    pipe = tofu_sd.apply_patch(_pipe(), 0.5, threshold=0.1)
    _images(pipe, num_inference_steps=3)
    assert tofu_sd.summary(pipe).rows[0].counts.merged == 2
