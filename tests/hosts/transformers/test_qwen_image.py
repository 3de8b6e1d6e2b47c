"""Qwen-Image: a mask of the text alone, and the size of the image as numbers."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import QwenImageImg2ImgPipeline, QwenImageInpaintPipeline, QwenImagePipeline
from sdpa_calls import SDPACalls
from tiny_pipelines import qwen_vae, without_encoder
from tiny_transformers import JOINT, TEXT, images, qwen_image
from torch import Tensor

import tofu_sd

QWEN = JOINT["qwen-image"]
FORMS: dict[str, dict[str, Any]] = {
    "all": {},
    "keys and values": {"kv_only": True},
    "queries and keys apart": {"kv_early": "mean", "kv_late": "mean"},
}
forms = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
NO_MASK = {"encoder_hidden_states_mask": None}


def calls_of(model: Any, **call: Any) -> list[dict[str, Any]]:
    with SDPACalls() as calls:
        QWEN.predict(model, **call)
    return calls.seen


@pytest.mark.parametrize("call", [{}, NO_MASK], ids=["mask", "no mask"])
@forms
def test_text_enters_attention_unchanged(call: dict[str, Any], options: dict[str, Any]) -> None:
    """Bit for bit; hidden tokens stay hidden, and 0 is added to the others."""
    model = qwen_image()
    plain = calls_of(model, **call)[0]
    merged = calls_of(tofu_sd.apply_patch(model, 0.5, **options), **call)[0]
    for name in ("query", "key", "value"):
        assert torch.equal(plain[name][:, :, :TEXT], merged[name][:, :, :TEXT])
    assert plain["key"].shape[2] - merged["key"].shape[2] == 32
    visible = TEXT if call else 5
    assert (merged["attn_mask"][..., :visible] == 0).all()
    assert (merged["attn_mask"][..., visible:TEXT] == -torch.inf).all()
    assert torch.allclose(merged["attn_mask"][:, 0, 0, TEXT:].exp().sum(dim=-1), torch.tensor(64.0))


@forms
def test_hidden_text_has_no_influence(options: dict[str, Any]) -> None:
    model = tofu_sd.apply_patch(qwen_image(), 0.5, **options)
    call = QWEN.inputs()
    padded = {**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()}
    padded["encoder_hidden_states"][:, 5:] += 3
    assert torch.allclose(QWEN.predict(model, **call), QWEN.predict(model, **padded), atol=1e-5)
    shown, other = ({**each, **NO_MASK} for each in (call, padded))
    assert not torch.allclose(QWEN.predict(model, **shown), QWEN.predict(model, **other), atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"kv_only": True}, {"matching": "cells", "ratio": 0.75}], ids=str)
def test_identical_tokens_are_exact_without_positions(options: dict[str, Any]) -> None:
    model = qwen_image()
    call = QWEN.inputs()
    call["hidden_states"] = call["hidden_states"][:, :1].repeat(1, 64, 1)
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "image_rotary_emb": None}), with_kwargs=True
        )
    plain = QWEN.predict(model, **call)
    mean = {"ratio": 0.5, "early": "mean", "late": "mean", **options}
    assert torch.allclose(QWEN.predict(tofu_sd.apply_patch(model, **mean), **call), plain, atol=2e-5)
    without = QWEN.predict(tofu_sd.apply_patch(model, **mean, proportional=False), **call)
    assert (without - plain).abs().max() > 1e-2


@forms
def test_reference_images_are_left_alone(options: dict[str, Any]) -> None:
    """Edit pipelines append them to the image."""
    model = qwen_image()
    call = QWEN.inputs()
    call["hidden_states"] = torch.cat([call["hidden_states"], tiny.noise(2, 24, 16, seed=5)], dim=1)
    call["img_shapes"] = [[(1, 8, 8), (1, 4, 6)]] * 2
    plain, baseline = calls_of(model, **call)[0], QWEN.predict(model, **call)
    merged = calls_of(tofu_sd.apply_patch(model, 0.5, **options), **call)
    assert [seen["key"].shape[2] for seen in merged] == [TEXT + 32 + 24] * 3
    assert torch.equal(plain["key"][:, :, -24:], merged[0]["key"][:, :, -24:])
    assert torch.equal(QWEN.predict(tofu_sd.apply_patch(model, 0.0, **options), **call), baseline)


@pytest.mark.parametrize("shapes", [[[(1, 8, 7)]] * 2, [[(1, 8, 8)], [(1, 4, 16)]], [[(2, 8, 4)]] * 2], ids=str)
def test_shapes_that_are_no_common_grid_are_refused(shapes: Any) -> None:
    model = tofu_sd.apply_patch(qwen_image(), 0.5)
    with pytest.raises(ValueError, match=r"img_shapes is .* there are 64 image tokens: tokens are merged where"):
        QWEN.predict(model, img_shapes=shapes)


def test_several_layers_of_an_image_are_refused() -> None:
    """All of them are generated. Only the first would be merged, and the others be taken for reference images."""
    model = tofu_sd.apply_patch(qwen_image(use_layer3d_rope=True), 0.5)
    with pytest.raises(ValueError, match="Qwen-Image-Layered generates several layers of an image at once"):
        QWEN.predict(model, img_shapes=[[(1, 4, 8), (1, 4, 8)]] * 2)


def test_controlnet_residuals_are_added_to_all_tokens() -> None:
    model = qwen_image()
    residuals = {"controlnet_block_samples": [tiny.noise(2, 64, 32, seed=1)]}
    plain = QWEN.predict(model, **residuals)
    merged = QWEN.predict(tofu_sd.apply_patch(model, 0.5), **residuals)
    assert (merged - plain).norm() < (QWEN.predict(model) - plain).norm()


def _images(pipe: Any, **call: Any) -> Tensor:
    mask = torch.arange(TEXT)[None] < 5
    texts = {
        "prompt": None,
        "prompt_embeds": tiny.noise(1, TEXT, 32, seed=1), "prompt_embeds_mask": mask,
        "negative_prompt_embeds": tiny.noise(1, TEXT, 32, seed=2), "negative_prompt_embeds_mask": mask,
        "guidance_scale": None,
    }  # fmt: skip
    return images(pipe, **{**texts, **call})


IMAGE = torch.linspace(0, 1, 3 * 128 * 128).view(1, 3, 128, 128)
MASK = (torch.arange(128) > 64).float().expand(1, 1, 128, 128)
PIPELINES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "text-to-image": (QwenImagePipeline, {}),
    "without guidance": (QwenImagePipeline, {"true_cfg_scale": 1.0}),
    "not square": (QwenImagePipeline, {"height": 96, "width": 160}),
    "several images": (QwenImagePipeline, {"num_images_per_prompt": 2}),
    "img2img": (QwenImageImg2ImgPipeline, {"image": IMAGE, "strength": 0.9}),
    "inpaint": (QwenImageInpaintPipeline, {"image": IMAGE, "mask_image": MASK, "strength": 0.9}),
}


def _pipe(cls: type[Any] = QwenImagePipeline) -> Any:
    return without_encoder(cls, qwen_vae(), qwen_image())


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_merge_and_undo(name: str) -> None:
    cls, call = PIPELINES[name]
    pipe = _pipe(cls)
    plain = _images(pipe, **call)
    merged = _images(tofu_sd.apply_patch(pipe, 0.5), **call)
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert torch.equal(_images(pipe, **call), merged)
    assert torch.equal(_images(tofu_sd.remove_patch(pipe), **call), plain)


def test_maps_are_kept_over_steps_of_one_image() -> None:
    pipe = tofu_sd.apply_patch(_pipe(), 0.5, match_interval=3)
    _images(pipe, num_inference_steps=6)
    counts = tofu_sd.summary(pipe).rows[0].counts
    assert (counts.merged, counts.maps) == (12, 4)  # guidance is a second call of each step
