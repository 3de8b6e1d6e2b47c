"""The demo classifier, which names what a generated image shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scene_classes import MATERIALS, SETTINGS, SHAPES


def perceptual_distance(judge: Any, a: Tensor, b: Tensor, stages: int = 5) -> Tensor:
    """How differently the first stages of a judge see two sets of pictures [B, 3, H, W] in 0..1: [B], at least 0.

    The squared distance of the feature maps, their channels scaled to unit length, averaged over the picture and summed
    over the stages: LPIPS's construction (Zhang et al. 2018) without its learnt weights.
    """
    pairs = zip(judge.maps(a)[:stages], judge.maps(b)[:stages], strict=True)
    parts = [(F.normalize(u, dim=1) - F.normalize(v, dim=1)).square().sum(1).mean((1, 2)) for u, v in pairs]
    return torch.stack(parts).sum(0)


class DemoClassifier(nn.Module):
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
