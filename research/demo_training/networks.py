"""The networks of the embedded models."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 128


def build_text_encoder(tokenizer: CLIPTokenizer, kind: type[Any] = CLIPTextModel) -> Any:
    """Builds a text encoder of 3 layers.

    Args:
        tokenizer: its tokenizer.
        kind: CLIPTextModel, or CLIPTextModelWithProjection, which adds a projection of the pooled state.
    """
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    """Builds the autoencoder: 8-fold downsampling, 4 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,  # trained on crops, used on images of any size
        sample_size=256,
    )


def build_unet(widths: tuple[int, int, int] = (64, 112, 160)) -> UNet2DConditionModel:
    """Builds the upper half of Stable Diffusion 1.5's UNet: 11 transformer blocks, 5 at full latent resolution."""
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=(2, 2, 2),  # heads of each level, as in Stable Diffusion, despite the argument's name
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )
