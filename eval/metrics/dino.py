"""DINO distance: one minus the cosine of two images' class tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Metric, Pairwise, Skipped, full_precision
from .transformers_net import describe_net, load_net

DINO = "facebook/dinov2-base"


def dino(model_id: str, device: torch.device) -> Metric:
    """One minus the cosine of two images' class tokens, as ToMA reports it."""
    found = load_net(model_id, device)
    if isinstance(found, str):
        return Skipped("DINO", found)
    model, processor = found

    def embed(images: Tensor) -> Tensor:
        inputs = processor(images=list(images), return_tensors="pt").to(device)
        with full_precision(), torch.no_grad():
            return model(**inputs).last_hidden_state[:, 0].cpu().double()

    def compute(a: Tensor, b: Tensor) -> Tensor:
        return 1 - torch.nn.functional.cosine_similarity(embed(a), embed(b))

    return Pairwise("DINO", describe_net(model_id, model, processor), True, compute)
