"""Tiny diffusion transformers of diffusers' own classes: seeded, offline, random weights, made in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor

from .random_weights import lively, noise

TEXT = 7  # tokens of a prompt in direct calls of a model


@dataclass(frozen=True)
class Tiny:
    """A tiny model of one family.

    Args:
        make: the model.
        inputs: keyword arguments for one call, by height and width of the map in tokens, batch and seed.
    """

    make: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]

    def predict(self, model: Any, h: int = 8, w: int = 8, batch: int = 2, seed: int = 0, **call: Any) -> Tensor:
        """One prediction of the model: all its image tokens."""
        with torch.no_grad():
            return self.run(model, h, w, batch, seed, **call)

    def run(self, model: Any, h: int = 8, w: int = 8, batch: int = 2, seed: int = 0, **call: Any) -> Tensor:
        """The same with gradients."""
        sample = model(**{**self.inputs(h, w, batch, seed), **call}).sample
        if not isinstance(sample, list):
            return sample
        same = all(x.shape == sample[0].shape for x in sample)
        return torch.stack(sample) if same else torch.cat([x.flatten() for x in sample])


def sd3(seed: int = 0, **options: Any) -> SD3Transformer2DModel:
    """Stable Diffusion 3: 3 joint blocks, the last of which gives no text back."""
    shape: dict[str, Any] = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16,
        "pooled_projection_dim": 32, "pos_embed_max_size": 24,
    }  # fmt: skip
    return lively(SD3Transformer2DModel(**{**shape, **options}), seed)


def sd35(seed: int = 0, **options: Any) -> SD3Transformer2DModel:
    """Stable Diffusion 3.5 medium: dual attention in the first blocks, and queries and keys are normalized."""
    return sd3(seed, **{"dual_attention_layers": (0, 1), "qk_norm": "rms_norm", **options})


def sd3_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 2 * h, 2 * w, seed=seed),
        "encoder_hidden_states": noise(batch, TEXT, 32, seed=seed + 1),
        "pooled_projections": noise(batch, 32, seed=seed + 2),
        "timestep": torch.full((batch,), 500.0),
    }


def pixart(seed: int = 0, **options: Any) -> PixArtTransformer2DModel:
    """PixArt-Sigma: 3 blocks with self-attention and cross-attention."""
    shape: dict[str, Any] = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 2, "cross_attention_dim": 16, "caption_channels": 32,
    }  # fmt: skip
    return lively(PixArtTransformer2DModel(**{**shape, **options}), seed)


def pixart_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 2 * h, 2 * w, seed=seed),
        "encoder_hidden_states": noise(batch, TEXT, 32, seed=seed + 1),
        "encoder_attention_mask": (torch.arange(TEXT) < 5).float().repeat(batch, 1),
        "timestep": torch.full((batch,), 500.0),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def flux(seed: int = 0, **options: Any) -> FluxTransformer2DModel:
    """Flux.1: 2 double blocks, which get text and image apart, and 2 single blocks, which get one sequence."""
    return lively(FluxTransformer2DModel(**{**FLUX, "pooled_projection_dim": 16, **options}), seed)


def chroma(seed: int = 0, **options: Any) -> ChromaTransformer2DModel:
    """Chroma: as Flux.1, with a mask of the text."""
    sizes = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return lively(ChromaTransformer2DModel(**{**FLUX, **sizes, **options}), seed)


def grid_ids(h: int, w: int, image: int = 0) -> Tensor:
    """Position ids of h x w image tokens: [h w, 3]."""
    return torch.cartesian_prod(torch.tensor([float(image)]), torch.arange(h).float(), torch.arange(w).float())


def flux_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, h * w, 16, seed=seed),
        "encoder_hidden_states": noise(batch, TEXT, 32, seed=seed + 1),
        "pooled_projections": noise(batch, 16, seed=seed + 2),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": grid_ids(h, w),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def chroma_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    call = flux_inputs(h, w, batch, seed)
    del call["pooled_projections"]
    n = torch.arange(TEXT + h * w)
    return {**call, "attention_mask": ((n < 5) | (n >= TEXT)).repeat(batch, 1)}


def flux2(seed: int = 0, **options: Any) -> Flux2Transformer2DModel:
    """Flux.2: single blocks project attention and feed-forward together."""
    shape = {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16, "guidance_embeds": False}
    return lively(Flux2Transformer2DModel(**{**shape, **options}), seed)


def flux2_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Its ids are (image, row, column, token of the text), one set for each sample."""
    call = flux_inputs(h, w, batch, seed)
    del call["pooled_projections"]
    ids = torch.nn.functional.pad(grid_ids(h, w), (0, 1))
    text = torch.nn.functional.pad(torch.arange(TEXT).float()[:, None], (3, 0))
    return {**call, "img_ids": ids.expand(batch, -1, -1), "txt_ids": text.expand(batch, -1, -1)}


ROTARY = {
    "flux": Tiny(flux, flux_inputs),
    "chroma": Tiny(chroma, chroma_inputs),
    "flux.2": Tiny(flux2, flux2_inputs),
}
"""Models whose positions are applied in attention."""


def qwen_image(seed: int = 0, **options: Any) -> QwenImageTransformer2DModel:
    """Qwen-Image: 3 double blocks."""
    shape: dict[str, Any] = {
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return lively(QwenImageTransformer2DModel(**{**shape, **options}), seed)


def qwen_image_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, h * w, 16, seed=seed),
        "encoder_hidden_states": noise(batch, TEXT, 32, seed=seed + 1),
        "encoder_hidden_states_mask": (torch.arange(TEXT) < 5).repeat(batch, 1),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, h, w)]] * batch,
    }


def z_image(seed: int = 0, **options: Any) -> ZImageTransformer2DModel:
    """Z-Image: 3 layers after its refiners, one of each kind."""
    shape: dict[str, Any] = {
        "in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 32, "axes_dims": [4, 6, 6], "axes_lens": [128, 64, 64],
    }  # fmt: skip
    return lively(ZImageTransformer2DModel(**{**shape, **options}), seed)


LONG_TEXT = 40  # tokens of every second prompt of Z-Image, which are padded to 64 where those of others are to 32


def z_image_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Its samples are lists. Prompts of two lengths make a mask, which hides the end of the shorter sequences."""
    texts = [noise(LONG_TEXT if i % 2 else TEXT, 32, seed=seed + 1 + i) for i in range(batch)]
    return {
        "x": list(noise(batch, 4, 1, 2 * h, 2 * w, seed=seed)),
        "t": torch.full((batch,), 0.5),
        "cap_feats": texts,
    }


JOINT = {
    "sd3": Tiny(sd3, sd3_inputs),
    "sd3.5": Tiny(sd35, sd3_inputs),
    **ROTARY,
    "qwen-image": Tiny(qwen_image, qwen_image_inputs),
    "z-image": Tiny(z_image, z_image_inputs),
}
"""Models in which text and image share one attention."""

MODELS = {**JOINT, "pixart": Tiny(pixart, pixart_inputs)}

FAMILIES = {
    "sd3": MODELS["sd3"],
    "sd3.5": MODELS["sd3.5"],
    "pixart": MODELS["pixart"],
    "flux.1": MODELS["flux"],
    "chroma": MODELS["chroma"],
    "flux.2": MODELS["flux.2"],
    "qwen-image": MODELS["qwen-image"],
    "z-image": MODELS["z-image"],
}
"""The same by the names that people use, in the order of their publication."""
