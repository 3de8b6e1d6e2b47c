"""Flux.1's transformer."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from tofu_sd.demo.tokenizer import build_tokenizer

from ..networks import TEXT_WIDTH, build_text_encoder
from ..recipe import Content
from .flow import FlowDenoiser, zero_modulation
from .t5 import build_t5_encoder, build_t5_tokenizer


class FluxDenoiser(FlowDenoiser):
    """Transformer, CLIP text encoder, of which only the pooled state is used, and T5 encoder.

    Args:
        content: the images that it learns to generate.
    """

    ids: Tensor  # of all texts, for CLIP
    ids_2: Tensor  # and for T5
    pipeline_name = "FluxPipeline"
    default_length = 512

    def __init__(self, content: Content) -> None:
        super().__init__(content)
        self.tokenizer = build_tokenizer(c.prompt for c in content.classes)
        self.tokenizer_2 = build_t5_tokenizer(self.texts)
        self.text_encoder = build_text_encoder(self.tokenizer)
        self.text_encoder_2 = build_t5_encoder(self.tokenizer_2, TEXT_WIDTH)
        self.transformer = build_flux_transformer()
        self.register_buffer("ids", self.tokenize(self.tokenizer, 77), persistent=False)
        self.register_buffer("ids_2", self.tokenize(self.tokenizer_2, self.default_length), persistent=False)

    def encode(self, text: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Encodes texts as FluxPipeline.encode_prompt does.

        Args:
            text: positions in `texts`, long [B].
            length: number of T5's tokens.

        Returns:
            (states [B, length, width], pooled [B, width]).
        """
        prompts, which = text.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        pooled = self.text_encoder(self.ids[prompts]).pooler_output
        # texts are shorter than any length, so that fewer tokens are less padding; the pipeline masks none
        states = self.text_encoder_2(self.ids_2[prompts, :length])[0]
        return states[which], pooled[which]

    def forward(self, noisy: Tensor, sigma: Tensor, text: Tensor, length: int) -> Tensor:
        states, pooled = self.encode(text, length)
        B, C, h, w = noisy.shape
        velocity = self.transformer(
            hidden_states=FluxPipeline._pack_latents(noisy, B, C, h, w),
            timestep=sigma,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            img_ids=FluxPipeline._prepare_latent_image_ids(B, h // 2, w // 2, noisy.device, torch.float32),
            txt_ids=torch.zeros(length, 3, device=noisy.device),
        ).sample
        return FluxPipeline._unpack_latents(velocity, 8 * h, 8 * w, 8)

    def pipeline(self, vae: AutoencoderKL) -> FluxPipeline:
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            transformer=self.transformer,
        )


def build_flux_transformer() -> FluxTransformer2DModel:
    """Builds the transformer: 3 double and 6 single blocks of width 192, heads of 64 channels.

    The rotary axes are Flux.1's, halved as its heads are. There is no guidance embedding, which is for distilled
    models; guidance is the pipeline's `true_cfg_scale`.
    """
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    zero_modulation(transformer)
    return transformer
