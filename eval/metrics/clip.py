"""CLIP score: how well an image fits its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Metric, PerImageMetric, Skipped, full_precision
from .transformers_net import describe_net, load_net

CLIP = "openai/clip-vit-large-patch14"


def clip(model_id: str, device: torch.device) -> Metric:
    """CLIP score (Hessel et al. 2021, at torchmetrics' scale): 100 · max(0, cosine of an image and its prompt)."""
    found = load_net(model_id, device)
    if isinstance(found, str):
        return Skipped("CLIP score", found)
    model, processor = found

    def compute(images: Tensor, prompts: Sequence[str]) -> Tensor:
        inputs = processor(text=list(prompts), images=list(images), return_tensors="pt", padding=True, truncation=True)
        with full_precision(), torch.no_grad():
            output = model(**inputs.to(device))
        cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        return (100 * cosine.clamp_min(0)).cpu().double()

    return PerImageMetric("CLIP score", describe_net(model_id, model, processor), False, compute)
