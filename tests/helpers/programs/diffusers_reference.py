"""Compares a program's UNet with diffusers' at the same weights: predictions have to match, unpatched and merged.

The program saves its predictions in an environment of its own. The tests predict them again with diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMMON = {
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "norm_num_groups": 32,
}  # in diffusers, attention_head_dim is the number of heads
UNETS = {
    "sd15": {**COMMON, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32},
    "sdxl": {**COMMON, "block_out_channels": (32, 64, 64), "cross_attention_dim": 64, "use_linear_projection": True,
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
             "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 32 + 6 * 256},
}  # fmt: skip


def methods() -> list[Any]:
    from tofu_sd import TokenFusionConfig  # imported here, as ComfyUI has to load the package first

    mean = {"early": "mean", "late": "mean", "proportional": True}
    some = [{}, {"ratio": 0.75}, {"window": 8, **mean}, {"ratio": 0.75, "kv_only": True, **mean}, {"levels": 2}]
    return [TokenFusionConfig(**{"min_tokens": 0, **options}) for options in some]  # merges whether it pays or not


def inputs(kind: str) -> dict[str, Tensor]:
    """Returns the inputs of one call: two different prompts and a map that is not square."""
    g = torch.Generator().manual_seed(5)
    call = {"x": torch.randn(2, 4, 16, 24, generator=g), "t": torch.tensor([500.0, 500.0])}
    call["context"] = torch.randn(2, 7, UNETS[kind]["cross_attention_dim"], generator=g)
    if kind == "sdxl":  # the pooled text embedding, and sizes as sines and cosines
        frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
        sizes = torch.full((2, 6), 128.0)[..., None] * frequencies
        sizes = torch.cat([sizes.cos(), sizes.sin()], dim=-1).flatten(1)
        call["y"] = torch.cat([torch.randn(2, 32, generator=g), sizes], dim=1)
    return call


def randomize(unet: Any) -> Any:
    """Sets random weights that keep the scale of the output. By default the last layers of blocks are zero."""
    g = torch.Generator().manual_seed(0)
    for name, weight in unet.named_parameters():
        if weight.ndim > 1:
            weight.data = torch.randn(weight.shape, generator=g) / weight[0].numel() ** 0.5
        else:
            weight.data = torch.full_like(weight, float(name.endswith("weight")))
    return unet.eval()


def distances(kind: str, weights: dict[str, Tensor], predictions: dict[str, Tensor], match_on: str) -> dict[str, Any]:
    """Returns the largest differences between a program's predictions and diffusers', and the smallest merging effect.

    Args:
        weights: by the program's names.
        predictions: tensors by "plain" and the slug of every method.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = UNet2DConditionModel(**UNETS[kind]).eval()
    named = {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(named, dict(unet.config)))
    call = inputs(kind)
    added = {"text_embeds": call["y"][:, :32], "time_ids": torch.full((2, 6), 128.0)} if kind == "sdxl" else None

    def predict() -> Tensor:
        with torch.no_grad():
            return unet(call["x"], 500.0, encoder_hidden_states=call["context"], added_cond_kwargs=added).sample

    return compare(unet, predict, predictions, match_on)


def read(kind: str, file: Path, match_on: str) -> dict[str, Any]:
    """Returns `distances` for a file with a program's weights and predictions."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    weights = {
        name.removeprefix("weights."): tensors.pop(name) for name in list(tensors) if name.startswith("weights.")
    }
    return distances(kind, weights, tensors, match_on)


def compare(unet: Any, predict: Callable[[], Tensor], predictions: dict[str, Tensor], match_on: str) -> dict[str, Any]:
    """Returns `distances` for a diffusers UNet with those weights; predict() is one call of it."""
    import tofu_sd

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    base, merged, effects = predict(), {}, []
    for config in methods():
        if config.levels > 1 and unet.config.get("addition_embed_type"):
            continue  # diffusers merges the middle block too, which lies on SDXL's second level
        with tofu_sd.patched(unet, config, match_on=match_on):
            expected = predict()
        merged[config.slug] = distance(predictions[config.slug], expected)
        effects.append(distance(expected, base))
    return {"plain": distance(predictions["plain"], base), "merged": merged, "effect": min(effects)}
