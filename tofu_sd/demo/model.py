"""The embedded model's parts: Stable Diffusion's own classes at a size that trains on two cores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

from ..environment import check_torchvision
from .scenes import MATERIALS, SETTINGS, SHAPES

check_torchvision()  # the next two fail without saying why where it does not fit
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

TEXT_WIDTH = 128


def build_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges are learnt from `texts`: each of their words is one token, other text is bytes."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator((text.lower() for text in texts), trainer)
    learnt = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = sorted(alphabet)
    tokens = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in learnt] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=learnt, pad_token="<|endoftext|>", model_max_length=77)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
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
    """Eight-fold autoencoder with 4 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,  # trained on crops, used on whole pictures of any size
        sample_size=256,
    )


def build_unet(widths: tuple[int, int, int] = (64, 112, 160)) -> UNet2DConditionModel:
    """The upper half of Stable Diffusion 1.5's UNet: 11 transformer blocks, 5 of them at full latent resolution."""
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=(2, 2, 2),  # heads a level, as in Stable Diffusion, whatever the argument's name says
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


def perceptual_distance(judge: Any, a: Tensor, b: Tensor, stages: int = 5) -> Tensor:
    """How differently the first stages of a judge see two sets of pictures [B, 3, H, W] in 0..1: [B], at least 0.

    The squared distance of the feature maps, their channels scaled to unit length, averaged over the picture and summed
    over the stages: LPIPS's construction (Zhang et al. 2018) without its learnt weights.
    """
    pairs = zip(judge.maps(a)[:stages], judge.maps(b)[:stages], strict=True)
    parts = [(F.normalize(u, dim=1) - F.normalize(v, dim=1)).square().sum(1).mean((1, 2)) for u, v in pairs]
    return torch.stack(parts).sum(0)


class Judge(nn.Module):
    """A small classifier of renders. It says what a generated picture shows, and its features compare pictures.

    Input: pictures [B, 3, H, W] in 0..1 of any size. labels: how many answers each of its questions has; by default
    shapes, materials and settings.
    """

    WIDTHS = (24, 48, 80, 112, 144)

    def __init__(self, labels: Sequence[int] = (len(SHAPES), len(MATERIALS), len(SETTINGS))) -> None:
        super().__init__()
        stages, width = [], 3
        for out in self.WIDTHS:
            stages.append(
                nn.Sequential(
                    nn.Conv2d(width, out, 3, stride=2, padding=1),
                    nn.GroupNorm(8, out),
                    nn.SiLU(),
                    nn.Conv2d(out, out, 3, padding=1),
                    nn.GroupNorm(8, out),
                    nn.SiLU(),
                )
            )
            width = out
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in labels)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Feature maps of the five stages at the pictures' own size: the first half of it, each next half of that."""
        x, maps = pictures * 2 - 1, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def features(self, pictures: Tensor) -> Tensor:
        """Pooled features [B, 144] of the pictures brought to 128 × 128 by area, the size it was trained at."""
        return self.maps(F.interpolate(pictures, (128, 128), mode="area"))[-1].mean(dim=(2, 3))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Logits for each question; by default shape, material and setting: [B, 6], [B, 4], [B, 4]."""
        features = self.features(pictures)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def classify(self, pictures: Tensor) -> Tensor:
        """Most likely answers for each picture, by default (shape, material, setting): long [B, 3]."""
        return torch.stack([logits.argmax(-1) for logits in self(pictures)], -1)
