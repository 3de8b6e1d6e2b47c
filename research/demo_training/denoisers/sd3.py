"""Stable Diffusion 3's transformer."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from tofu_sd.demo.tokenizer import build_tokenizer

from ..networks import TEXT_WIDTH, build_text_encoder
from ..recipe import SD3_PIXELS, Content
from .flow import FlowDenoiser, zero_modulation
from .t5 import build_t5_encoder, build_t5_tokenizer

STATES = 2 * TEXT_WIDTH  # channels of the text states: those of both CLIP encoders, side by side, and of T5


class SD3Denoiser(FlowDenoiser):
    """Transformer, two CLIP text encoders and a T5 encoder.

    Args:
        content: the images that it learns to generate.
    """

    ids: Tensor  # of all texts, for CLIP
    ids_3: Tensor  # and for T5
    pipeline_name = "StableDiffusion3Pipeline"
    default_length = 256

    def __init__(self, content: Content) -> None:
        super().__init__(content)
        self.tokenizer = build_tokenizer(c.prompt for c in content.classes)
        self.text_encoder = build_text_encoder(self.tokenizer, CLIPTextModelWithProjection)
        self.text_encoder_2 = build_text_encoder(self.tokenizer, CLIPTextModelWithProjection)
        # diffusers loads a folder without a T5 encoder only with the argument text_encoder_3=None
        self.tokenizer_3 = build_t5_tokenizer(self.texts)
        self.text_encoder_3 = build_t5_encoder(self.tokenizer_3, STATES)
        self.transformer = build_sd3_transformer()
        self.register_buffer("ids", self.tokenize(self.tokenizer, 77), persistent=False)
        self.register_buffer("ids_3", self.tokenize(self.tokenizer_3, self.default_length), persistent=False)

    def encode(self, text: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Encodes texts as StableDiffusion3Pipeline.encode_prompt does.

        Args:
            text: positions in `texts`, long [B].
            length: number of T5's tokens.

        Returns:
            (states [B, 77 + length, 256], pooled [B, 256]).
        """
        prompts, which = text.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        encoders = (self.text_encoder, self.text_encoder_2)
        outputs = [encoder(self.ids[prompts], output_hidden_states=True) for encoder in encoders]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        # texts are shorter than any length, so that fewer tokens are less padding; the pipeline masks none
        states = torch.cat([clip, self.text_encoder_3(self.ids_3[prompts, :length])[0]], 1)
        return states[which], pooled[which]

    def forward(self, noisy: Tensor, sigma: Tensor, text: Tensor, length: int) -> Tensor:
        states, pooled = self.encode(text, length)
        return self.transformer(
            hidden_states=noisy, timestep=sigma * 1000, encoder_hidden_states=states, pooled_projections=pooled
        ).sample

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),  # at 256 px Stable Diffusion 3 does not shift noise levels
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer,
            text_encoder_3=self.text_encoder_3,
            tokenizer_3=self.tokenizer_3,
        )


def build_sd3_transformer() -> SD3Transformer2DModel:
    """Builds the transformer: 6 joint blocks of width 192, heads of 64 channels, one token for each latent."""
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=STATES,
        caption_projection_dim=192,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=SD3_PIXELS // 8,
        qk_norm="rms_norm",
    )
    zero_modulation(transformer)
    return transformer
