"""Tiny diffusion transformers of diffusers' own classes: seeded, offline, random weights, made in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor

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
        return torch.stack(sample) if isinstance(sample, list) else sample


def processors(model: Any) -> dict[str, Any]:
    """The attention processors of a model, by name. Z-Image has no `attn_processors`."""
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def set_processors(model: Any, processors: Any) -> None:
    """Sets one processor, or those of each attention by name."""
    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            module.set_processor(processors[name] if isinstance(processors, dict) else processors)


def sd3(seed: int = 0, **options: Any) -> SD3Transformer2DModel:
    """Stable Diffusion 3: 3 joint blocks, the last of which gives no text back."""
    shape: dict[str, Any] = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16,
        "pooled_projection_dim": 32, "pos_embed_max_size": 24,
    }  # fmt: skip
    return tiny.lively(SD3Transformer2DModel(**{**shape, **options}), seed)


def sd35(seed: int = 0, **options: Any) -> SD3Transformer2DModel:
    """Stable Diffusion 3.5 medium: dual attention in the first blocks, and queries and keys are normalized."""
    return sd3(seed, **{"dual_attention_layers": (0, 1), "qk_norm": "rms_norm", **options})


def sd3_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tiny.noise(batch, 4, 2 * h, 2 * w, seed=seed),
        "encoder_hidden_states": tiny.noise(batch, TEXT, 32, seed=seed + 1),
        "pooled_projections": tiny.noise(batch, 32, seed=seed + 2),
        "timestep": torch.full((batch,), 500.0),
    }


def pixart(seed: int = 0, **options: Any) -> PixArtTransformer2DModel:
    """PixArt-Sigma: 3 blocks with self-attention and cross-attention."""
    shape: dict[str, Any] = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 2, "cross_attention_dim": 16, "caption_channels": 32,
    }  # fmt: skip
    return tiny.lively(PixArtTransformer2DModel(**{**shape, **options}), seed)


def pixart_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tiny.noise(batch, 4, 2 * h, 2 * w, seed=seed),
        "encoder_hidden_states": tiny.noise(batch, TEXT, 32, seed=seed + 1),
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
    return tiny.lively(FluxTransformer2DModel(**{**FLUX, "pooled_projection_dim": 16, **options}), seed)


def chroma(seed: int = 0, **options: Any) -> ChromaTransformer2DModel:
    """Chroma: as Flux.1, with a mask of the text."""
    sizes = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return tiny.lively(ChromaTransformer2DModel(**{**FLUX, **sizes, **options}), seed)


def grid_ids(h: int, w: int, image: int = 0) -> Tensor:
    """Position ids of h x w image tokens: [h w, 3]."""
    return torch.cartesian_prod(torch.tensor([float(image)]), torch.arange(h).float(), torch.arange(w).float())


def flux_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tiny.noise(batch, h * w, 16, seed=seed),
        "encoder_hidden_states": tiny.noise(batch, TEXT, 32, seed=seed + 1),
        "pooled_projections": tiny.noise(batch, 16, seed=seed + 2),
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
    return tiny.lively(Flux2Transformer2DModel(**{**shape, **options}), seed)


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
    return tiny.lively(QwenImageTransformer2DModel(**{**shape, **options}), seed)


def qwen_image_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tiny.noise(batch, h * w, 16, seed=seed),
        "encoder_hidden_states": tiny.noise(batch, TEXT, 32, seed=seed + 1),
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
    return tiny.lively(ZImageTransformer2DModel(**{**shape, **options}), seed)


LONG_TEXT = 40  # tokens of every second prompt of Z-Image, which are padded to 64 where those of others are to 32


def z_image_inputs(h: int = 8, w: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Its samples are lists. Prompts of two lengths make a mask, which hides the end of the shorter sequences."""
    texts = [tiny.noise(LONG_TEXT if i % 2 else TEXT, 32, seed=seed + 1 + i) for i in range(batch)]
    return {
        "x": list(tiny.noise(batch, 4, 1, 2 * h, 2 * w, seed=seed)),
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


def shifted_vae(latent_channels: int = 4) -> AutoencoderKL:
    """An autoencoder whose latents have a mean, as newer models' have."""
    vae = tiny.vae(latent_channels=latent_channels)
    vae.register_to_config(shift_factor=0.1)
    return vae


def sd3_parts(make: Callable[..., Any] = sd3) -> dict[str, Any]:
    """The components that every Stable Diffusion 3 pipeline takes. The third text encoder is left out, as users may."""
    transformer = make()
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": shifted_vae(transformer.config.in_channels),
        "text_encoder": tiny.text_encoder(projection=True),
        "tokenizer": tiny.tokenizer(),
        "text_encoder_2": tiny.text_encoder(projection=True, seed=4),
        "tokenizer_2": tiny.tokenizer(pad="!"),
        "text_encoder_3": None,
        "tokenizer_3": None,
    }


def sd3_pipe(cls: type[Any] = StableDiffusion3Pipeline, make: Callable[..., Any] = sd3, **more: Any) -> Any:
    return tiny.quiet(cls(**sd3_parts(make), **more))


def flux_pipe(cls: type[Any] = FluxPipeline, make: Callable[..., Any] = flux, **more: Any) -> Any:
    """A Flux pipeline without its second text encoder: calls give embeddings, as T5 has no tiny tokenizer."""
    parts = {
        "transformer": make(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": shifted_vae(),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }
    return tiny.quiet(cls(**{**parts, **more}))


def flux2_pipe(cls: type[Any] = Flux2KleinPipeline) -> Any:
    """A Flux.2 pipeline without its text encoder: calls give embeddings."""
    channels = {"block_out_channels": (4,) * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}
    vae = tiny.lively(AutoencoderKLFlux2(**channels), 2)
    parts = {"vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": flux2()}
    return tiny.quiet(cls(**parts, text_encoder=None, tokenizer=None))


def flux_images(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    """The packed latents a Flux pipeline ends with."""
    embeddings = {"prompt_embeds": tiny.noise(1, TEXT, 32, seed=1), "pooled_prompt_embeds": tiny.noise(1, 16, seed=2)}
    return images(pipe, seed, **{"prompt": None, **embeddings, **call})


def images(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    """The latents a pipeline ends with. ControlNet pipelines draw the latent of their image from the global state."""
    torch.manual_seed(0)
    usual = {"height": 128, "width": 128, "max_sequence_length": 16, "guidance_scale": 5.0}
    return tiny.images(pipe, seed, **{**usual, **call})
