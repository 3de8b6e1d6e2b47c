"""Flux.2: what differs from Flux.1. Its properties are those of all rotary models."""

from __future__ import annotations

from typing import Any

import PIL.Image
import pytest
import tiny
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from sdpa_calls import SDPACalls
from tiny_transformers import ROTARY, TEXT, flux2, flux2_pipe, images
from torch import Tensor

import tofu_sd

FLUX2 = ROTARY["flux.2"]
CALLS: dict[str, dict[str, Any]] = {
    "guidance by a second call": {"negative_prompt_embeds": tiny.noise(1, TEXT, 32, seed=2)},
    "without guidance": {"guidance_scale": 1.0},
    "not square": {"height": 96, "width": 160},
    "several images": {"num_images_per_prompt": 2},
    "reference image": {"image": PIL.Image.new("RGB", (128, 96), "red")},
}


def _images(pipe: Any, **call: Any) -> Tensor:
    embeddings = {"prompt": None, "prompt_embeds": tiny.noise(1, TEXT, 32, seed=1)}
    return images(pipe, **{**embeddings, "negative_prompt_embeds": tiny.noise(1, TEXT, 32, seed=2), **call})


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_pipeline_merges_and_undoes(call: dict[str, Any]) -> None:
    pipe = flux2_pipe()
    plain = _images(pipe, **call)
    merged = _images(tofu_sd.apply_patch(pipe, 0.5), **call)
    assert merged.isfinite().all()
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert torch.equal(_images(pipe, **call), merged)
    assert torch.equal(_images(tofu_sd.apply_patch(pipe, 0.0), **call), plain)
    assert torch.equal(_images(tofu_sd.remove_patch(pipe), **call), plain)


def test_reference_image_is_left_alone() -> None:
    pipe = flux2_pipe()
    with SDPACalls() as plain:
        _images(pipe, num_inference_steps=1, guidance_scale=1.0, **CALLS["reference image"])
    tofu_sd.apply_patch(pipe, 0.5)
    with SDPACalls() as merged:
        _images(pipe, num_inference_steps=1, guidance_scale=1.0, **CALLS["reference image"])
    lengths = [[call["key"].shape[2] for call in calls.seen if call["key"].shape[1] == 2] for calls in (plain, merged)]
    assert lengths[0]
    assert all(before - after == 32 for before, after in zip(*lengths, strict=True))


def test_kv_processors_are_refused() -> None:
    """They attend over parts of the sequence, with reference images before the image."""
    model = flux2()
    model.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor())
    with pytest.raises(RuntimeError, match="Flux2KVAttnProcessor is not known to run on merged tokens"):
        tofu_sd.apply_patch(model, 0.5)
    model = tofu_sd.apply_patch(flux2(), 0.5)
    model.single_transformer_blocks[0].attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    with pytest.raises(RuntimeError, match="Flux2KVParallelSelfAttnProcessor is not known to run on merged tokens"):
        FLUX2.predict(model)


def test_kv_mode_is_refused_with_any_processor() -> None:
    """Reference images come first in it, and their ids would be taken for those of the image."""
    model = tofu_sd.apply_patch(flux2(), 0.5)
    with pytest.raises(ValueError, match="kv_cache_mode is 'extract': reference images come first"):
        FLUX2.predict(model, kv_cache_mode="extract", num_ref_tokens=16)


def test_feed_forward_of_single_blocks_runs_on_all_tokens() -> None:
    sizes = []
    model = tofu_sd.apply_patch(flux2(), 0.5)
    for block in model.single_transformer_blocks:
        block.attn.to_qkv_mlp_proj.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
        block.attn.to_out.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    FLUX2.predict(model)
    assert sizes == [TEXT + 64] * 4
