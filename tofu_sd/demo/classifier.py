"""The demo classifier: predicts the labels of a generated image, such as shape, material and setting."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import SCENES, DemoModel


def perceptual_distance(classifier: Any, a: Tensor, b: Tensor, stages: int = 5) -> Tensor:
    """Perceptual distance of two batches of images by the feature maps of a classifier: [B], >= 0.

    It is LPIPS's construction (Zhang et al. 2018) without its learned weights: the squared distance of the feature
    maps, with channels normalized, averaged over the image and summed over the stages.

    Args:
        classifier: a DemoClassifier.
        a, b: [B, 3, H, W], images in 0..1.
        stages: how many stages are used, from the first.
    """
    pairs = zip(classifier.maps(a)[:stages], classifier.maps(b)[:stages], strict=True)
    parts = [(F.normalize(u, dim=1) - F.normalize(v, dim=1)).square().sum(1).mean((1, 2)) for u, v in pairs]
    return torch.stack(parts).sum(0)


class DemoClassifier(nn.Module):
    """A small classifier of renders, for images [B, 3, H, W] in 0..1 of any size. Its features compare images.

    Args:
        model: the embedded model whose images it classifies; it says which labels there are.
    """

    WIDTHS = (24, 48, 80, 112, 144)

    def __init__(self, model: DemoModel = SCENES) -> None:
        super().__init__()
        self.labels_of_prompts = model.labels_of_prompts
        self.size = model.classifier_size
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
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in model.label_counts)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Returns the feature maps of the five stages; each has half the size of the one before."""
        x, maps = images * 2 - 1, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def features(self, images: Tensor) -> Tensor:
        """Returns pooled features [B, 144] of the images, resized to the classifier's size."""
        return self.pooled(F.interpolate(images, (self.size, self.size), mode="area"))

    def pooled(self, images: Tensor) -> Tensor:
        """Returns pooled features [B, 144] of the images at their own size."""
        return self.maps(images)[-1].mean(dim=(2, 3))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Returns the logits of each label; by default shape, material and setting: [B, 6], [B, 4], [B, 4]."""
        return self.logits(self.features(images))

    def logits(self, features: Tensor) -> list[Tensor]:
        """Returns the logits of each label from pooled features."""
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Returns the predicted labels of each image, by default (shape, material, setting): long [B, 3]."""
        return torch.stack([logits.argmax(-1) for logits in self(images)], -1)
