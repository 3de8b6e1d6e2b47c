"""PixArt: its layers are merged as those of UNets are, on the map of the model's own latent."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from tiny_pipelines import without_encoder
from tiny_transformers import MODELS, TEXT, pixart
from torch import Tensor

import tofu_sd

PIXART = MODELS["pixart"]


def _pipe(cls: type[Any] = PixArtSigmaPipeline) -> Any:
    return without_encoder(cls, tiny.vae(), pixart(), DPMSolverMultistepScheduler())


def _images(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    mask = torch.ones(1, TEXT)
    usual = {
        "prompt": None, "negative_prompt": None, "height": 128, "width": 128, "use_resolution_binning": False,
        "prompt_embeds": tiny.noise(1, TEXT, 32, seed=1), "prompt_attention_mask": mask,
        "negative_prompt_embeds": tiny.noise(1, TEXT, 32, seed=2), "negative_prompt_attention_mask": mask,
    }  # fmt: skip
    return tiny.images(pipe, seed, **{**usual, **call})


CALLS: dict[str, dict[str, Any]] = {
    "with guidance": {},
    "without guidance": {"guidance_scale": 1.0},
    "not square": {"height": 96, "width": 160},
    "several images": {"num_images_per_prompt": 2},
}


@pytest.mark.parametrize("cls", [PixArtAlphaPipeline, PixArtSigmaPipeline])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_pipelines_merge_and_undo(cls: type[Any], call: dict[str, Any]) -> None:
    pipe = _pipe(cls)
    plain = _images(pipe, **call)
    merged = _images(tofu_sd.apply_patch(pipe, 0.5), **call)
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert torch.equal(_images(pipe, **call), merged)
    assert torch.equal(_images(tofu_sd.apply_patch(pipe, 0.0), **call), plain)
    assert torch.equal(_images(tofu_sd.remove_patch(pipe), **call), plain)


@pytest.mark.parametrize(
    "options", [{}, {"kv_only": True}, {"merge_crossattn": True, "merge_mlp": True}, {"matching": "pairs"}], ids=str
)
def test_identical_tokens_are_exact(options: dict[str, Any]) -> None:
    """Attention over identical tokens does not depend on their number, as no text is among the keys."""
    model = pixart()
    model.pos_embed.pos_embed.zero_()
    call = PIXART.inputs()
    call["hidden_states"] = call["hidden_states"][:, :, :2, :2].repeat(1, 1, 8, 8)
    plain = PIXART.predict(model, **call)
    for proportional in (False, True):
        tofu_sd.apply_patch(model, 0.5, early="mean", late="mean", proportional=proportional, **options)
        assert torch.allclose(PIXART.predict(model, **call), plain, atol=1e-5)


def test_all_layers_run_on_merged_tokens() -> None:
    model = tofu_sd.apply_patch(pixart(), 0.5, merge_crossattn=True, merge_mlp=True)
    sizes = []
    for block in model.transformer_blocks:
        for layer in (block.attn1.to_q, block.attn2.to_q, block.ff.net[0]):
            layer.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    PIXART.predict(model)
    assert sizes == [32] * 9


def test_mask_of_image_tokens_is_refused() -> None:
    model = tofu_sd.apply_patch(pixart(), 0.5)
    with pytest.raises(ValueError, match="attention_mask hides image tokens of PixArt's self-attention"):
        PIXART.predict(model, attention_mask=torch.ones(2, 64))


def test_fused_projections_give_the_same() -> None:
    plain = PIXART.predict(tofu_sd.apply_patch(pixart(), 0.5))
    model = tofu_sd.apply_patch(pixart(), 0.5)
    model.fuse_qkv_projections()
    assert torch.allclose(PIXART.predict(model), plain, atol=1e-5)
    with pytest.raises(RuntimeError, match="kv_only gives keys and values other tokens than queries"):
        tofu_sd.apply_patch(model, 0.5, kv_only=True)


def test_map_of_one_prompt_serves_both_halves_of_the_batch() -> None:
    pipe = tofu_sd.apply_patch(_pipe(), 0.5, share_across_cfg=True)
    with tofu_sd.record_maps(pipe) as records:
        _images(pipe, num_inference_steps=1)
    assert all(torch.equal(*record.map.group_idx) for record in records)


def test_maps_are_kept_over_steps_of_one_image() -> None:
    pipe = tofu_sd.apply_patch(_pipe(), 0.5, match_interval=2)
    _images(pipe, num_inference_steps=6)
    counts = tofu_sd.summary(pipe).rows[0].counts
    assert counts.maps < counts.merged == 6  # the first steps of a random model have unlike latents, and match again
