"""A program's UNet and diffusers' with the same weights: what is drawn is to be the same, plain and fused.

The program writes down what it drew, in an environment of its own; the tests draw it again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMMON = {"layers_per_block": 2, "attention_head_dim": 4, "norm_num_groups": 32}  # which is the number of heads
UNETS = {
    "sd15": {**COMMON, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32},
    "sdxl": {**COMMON, "block_out_channels": (32, 64, 64), "cross_attention_dim": 64, "use_linear_projection": True,
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
             "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 32 + 6 * 256},
}  # fmt: skip


def methods() -> list[Any]:
    from tofu_sd import TokenFusionConfig  # here, as ComfyUI itself is to load it first

    mean = {"early": "mean", "late": "mean", "proportional": True}
    return [TokenFusionConfig(0.5), TokenFusionConfig(0.75), TokenFusionConfig(0.5, window=8, **mean),
            TokenFusionConfig(0.75, kv_only=True, **mean), TokenFusionConfig(0.5, levels=2)]  # fmt: skip


def inputs(kind: str) -> dict[str, Tensor]:
    """What one call of such a model is given. Two different prompts, a map that is no square."""
    g = torch.Generator().manual_seed(5)
    given = {"x": torch.randn(2, 4, 16, 24, generator=g), "t": torch.tensor([500.0, 500.0])}
    given["context"] = torch.randn(2, 7, UNETS[kind]["cross_attention_dim"], generator=g)
    if kind == "sdxl":  # the words' summary, and sizes as sines and cosines
        frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
        sizes = torch.full((2, 6), 128.0)[..., None] * frequencies
        sizes = torch.cat([sizes.cos(), sizes.sin()], dim=-1).flatten(1)
        given["y"] = torch.cat([torch.randn(2, 32, generator=g), sizes], dim=1)
    return given


def randomize(unet: Any) -> Any:
    """Weights of a size that keeps what is drawn of the same size; as they come, the last layers of blocks are zero."""
    g = torch.Generator().manual_seed(0)
    for name, weight in unet.named_parameters():
        if weight.ndim > 1:
            weight.data = torch.randn(weight.shape, generator=g) / weight[0].numel() ** 0.5
        else:
            weight.data = torch.full_like(weight, float(name.endswith("weight")))
    return unet.eval()


def distances(kind: str, weights: dict[str, Tensor], drawn: dict[str, Tensor], match_on: str) -> dict[str, Any]:
    """The largest differences between what a program drew and what diffusers draws; and the least effect of fusing.

    weights: by the program's names. drawn: "plain" and the key of every method.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = UNet2DConditionModel(**UNETS[kind]).eval()
    named = {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(named, dict(unet.config)))
    given = inputs(kind)
    added = {"text_embeds": given["y"][:, :32], "time_ids": torch.full((2, 6), 128.0)} if kind == "sdxl" else None

    def draw() -> Tensor:
        with torch.no_grad():
            return unet(given["x"], 500.0, encoder_hidden_states=given["context"], added_cond_kwargs=added).sample

    return compared(unet, draw, drawn, match_on)


def read(kind: str, file: Path, match_on: str) -> dict[str, Any]:
    """`distances` of what a program has written down: its weights and what it drew."""
    from safetensors.torch import load_file

    there = load_file(file)
    weights = {name.removeprefix("weights."): there.pop(name) for name in list(there) if name.startswith("weights.")}
    return distances(kind, weights, there, match_on)


def compared(unet: Any, draw: Callable[[], Tensor], drawn: dict[str, Tensor], match_on: str) -> dict[str, Any]:
    """The same for a diffusers UNet with those weights; draw() is one call of it."""
    import tofu_sd

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    base, fused, effects = draw(), {}, []
    for fusion in methods():
        if fusion.levels > 1 and unet.config.get("addition_embed_type"):
            continue  # diffusers merges the middle block too, which lies on SDXL's second level
        with tofu_sd.patched(unet, fusion, match_on=match_on):
            expected = draw()
        fused[fusion.slug] = distance(drawn[fusion.slug], expected)
        effects.append(distance(expected, base))
    return {"plain": distance(drawn["plain"], base), "fused": fused, "effect": min(effects)}
