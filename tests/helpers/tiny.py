"""Tiny models of diffusers' own classes: seeded, offline, random weights, made in milliseconds.

The topologies are Stable Diffusion's, so that a patch finds what it would find there; the widths are the smallest that
run. Their images are noise: they serve to compare one run with another.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from eval.families.random_weights import lively, noise

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15 = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "block_out_channels": (16, 16, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}


def sd15_unet(sample_size: int = 16, seed: int = 0, **options: Any) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's topology: 16 transformer blocks, 5 of them at the latent's own size."""
    ups = {"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3}
    return lively(UNet2DConditionModel(**{"sample_size": sample_size, **SD15, **ups, **options}), seed)


SHALLOW = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
}


def shallow_unet(sample_size: int = 16, seed: int = 0, **options: Any) -> UNet2DConditionModel:
    """Two levels, 4 transformer blocks: 3 at the latent's own size, one in the middle. Quick to run and to compile."""
    return sd15_unet(sample_size, seed, **{**SHALLOW, **options})


def sdxl_unet(
    sample_size: int = 16, seed: int = 0, layers: tuple[int, int, int] = (1, 2, 10), **options: Any
) -> UNet2DConditionModel:
    """SDXL's topology: 70 transformer blocks, no attention at the latent's own size, 10 blocks at half of it."""
    return lively(
        UNet2DConditionModel(
            sample_size=sample_size,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 16, 16),
            layers_per_block=2,
            norm_num_groups=4,
            cross_attention_dim=32,
            attention_head_dim=(2, 2, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
            transformer_layers_per_block=layers,
            **options,
        ),
        seed,
    )


def controlnet(seed: int = 3) -> ControlNetModel:
    """A ControlNet for `sd15_unet`: 7 transformer blocks, 2 of them at the latent's own size."""
    return lively(ControlNetModel(**SD15, conditioning_embedding_out_channels=(4, 8, 8, 8)), seed)


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer without a single learnt merge: bytes, bytes at a word's end, start and end of text."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    bytes_ = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*bytes_, *(b + "</w>" for b in bytes_), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=77)


def text_encoder(projection: bool = False, seed: int = 1) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=16,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return lively((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def vae(seed: int = 2, latent_channels: int = 4) -> AutoencoderKL:
    """Four levels, so that a latent's side is an eighth of the image's."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return lively(
        AutoencoderKL(
            **blocks,
            block_out_channels=(4,) * 4,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=2,
        ),
        seed,
    )


def sd15_parts(**unet_options: Any) -> dict[str, Any]:
    """The components that every Stable Diffusion 1.5 pipeline takes."""
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": sd15_unet(**unet_options),
        "scheduler": DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def sd15_pipe(cls: type[Any] = StableDiffusionPipeline, *, with_unet: dict[str, Any] | None = None, **more: Any) -> Any:
    """A Stable Diffusion 1.5 pipeline of class `cls`; `more` are components it takes beside the usual ones."""
    return quiet(cls(**sd15_parts(**(with_unet or {})), **more))


def sdxl_pipe(cls: type[Any] = StableDiffusionXLPipeline, **more: Any) -> Any:
    """An SDXL pipeline with 19 transformer blocks, 10 of them at the highest resolution that has attention."""
    return quiet(
        cls(
            vae=vae(),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder(projection=True, seed=4),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(pad="!"),
            unet=sdxl_unet(layers=(1, 2, 1)),
            scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
            add_watermarker=False,
            **more,
        )
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ip_adapter_weights(unet: Any) -> dict[str, Any]:
    """What an IP-Adapter's file holds: a projection of the image's features and keys and values for every attn2."""
    dim = unet.config.cross_attention_dim
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    layers = {f"{2 * i + 1}.to_{kv}_ip.weight": noise(16, dim, seed=i) for i in range(len(names)) for kv in ("k", "v")}
    projection = {
        "proj.weight": noise(4 * dim, 8),
        "proj.bias": torch.zeros(4 * dim),
        "norm.weight": torch.ones(dim),
        "norm.bias": torch.zeros(dim),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def with_ip_adapter(pipe: Any, *names: str, **more: str) -> None:
    """pipe.load_ip_adapter, from no file: an encoder of images, and what its features are read by."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=8))
    prepare = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipe.register_modules(image_encoder=encoder.eval(), feature_extractor=prepare)
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])


def images(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    """The latents a pipeline ends with: every difference in the UNet shows in them, and the decoder need not run."""
    usual = {"prompt": "a red fox", "num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}
    with torch.no_grad():
        return pipe(**{**usual, **call}, generator=torch.Generator().manual_seed(seed))[0]


def inputs(unet: Any, h: int = 16, w: int = 16, batch: int = 2, t: float = 500, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one call of a UNet, with what SDXL needs beside the rest."""
    config = unet.config
    call: dict[str, Any] = {
        "sample": noise(batch, config.in_channels, h, w, seed=seed),
        "timestep": torch.tensor(t),
        "encoder_hidden_states": noise(batch, 7, config.cross_attention_dim, seed=seed + 1),
    }
    if config.get("addition_embed_type") == "text_time":
        call["added_cond_kwargs"] = {"text_embeds": noise(batch, 16, seed=seed + 2), "time_ids": torch.ones(batch, 6)}
    return call


def guided(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the same latents in both halves of the batch, as pipelines with guidance give them."""
    sample = call["sample"]
    return {**call, "sample": sample[: len(sample) // 2].repeat(2, 1, 1, 1)}


def predict(unet: Any, h: int = 16, w: int = 16, batch: int = 2, t: float = 500, seed: int = 0, **call: Any) -> Tensor:
    """One noise prediction."""
    with torch.no_grad():
        return unet(**{**inputs(getattr(unet, "_orig_mod", unet), h, w, batch, t, seed), **call}).sample
