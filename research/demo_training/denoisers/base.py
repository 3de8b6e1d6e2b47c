"""What the training needs of a denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..recipe import Content


class Denoiser(nn.Module, ABC):
    """A denoiser and its text encoders, trained together.

    Args:
        content: the images that it learns to generate.
    """

    rates: ClassVar[Mapping[str, float]]  # the largest learning rate of each stage

    def __init__(self, content: Content) -> None:
        super().__init__()
        # the prompt of each class, then its bare name, then no prompt
        self.texts = [c.prompt for c in content.classes] + [c.name for c in content.classes] + [""]

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
        """Returns the token ids of all texts, padded as a pipeline pads them: long [texts, length]."""
        batch = tokenizer(self.texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = batch.input_ids
        return ids

    @abstractmethod
    def loss(self, clean: Tensor, text: Tensor, g: torch.Generator) -> Tensor:
        """Returns the loss of a batch.

        Args:
            clean: latents [B, 4, h, w].
            text: the position of each image's text in `texts`, long [B].
            g: generator of noise and timesteps.
        """

    @abstractmethod
    def pipeline(self, vae: AutoencoderKL) -> Any:
        """Returns the pipeline of the trained parts and an autoencoder."""
