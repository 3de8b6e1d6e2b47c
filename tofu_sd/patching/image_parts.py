"""Recognizes the steps of one image among the calls of a model, so that later steps can use maps of earlier ones.

A sampler may call a model several times a step: for areas with separate prompts, tiles, context windows, a second
guidance call, or a second evaluation (Heun). Each image part is followed independently. A call continues a part if its
shape, device and identifiers are equal, its conditioning is the same, its timestep continues in the part's direction or
repeats, and its content is correlated with the part's last content. Any other call starts a new part.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SAME = 0.5  # correlation of the contents of two steps of one image part; steps of two images are near 0
TIE = 0.01  # among parts whose correlations differ by less, the order of the calls decides
REMADE = 3  # how often equal conditioning must be another tensor before it counts as the same
PARTS = 128  # at most; the least recently visited is dropped first
PATIENCE = 64  # calls of other parts after which a part may have ended
SAMPLE = 16384  # values of the content that are compared
LATENT_CHANNELS = 4  # further channels (masks, masked images) do not change between steps
logger = logging.getLogger("tofu_sd")


@dataclass
class ImagePart:
    """An image part and its calls so far.

    Args:
        key: what the calls of a part have in common.
        t, content, conditioning: of its last call.
        step: from 0, counted by changes of the timestep.
        maps, best, counts: what the blocks store from one call to the next.
    """

    key: Hashable
    t: float
    content: Tensor
    conditioning: Tensor | None
    step: int = 0
    direction: int = 0  # -1 where timesteps fall, 1 where they rise, 0 after one
    same_object: bool = False  # whether the conditioning has been one object in several calls
    equal_objects: int = 0  # how often it was another object of equal content
    visited: int = 0  # index of its last call, among those of the tracker
    gap: int = 0  # most calls of the tracker between two visits
    maps: dict[Any, Any] = field(default_factory=dict)
    best: dict[Any, Tensor] = field(default_factory=dict)
    counts: dict[Any, float] = field(default_factory=dict)


class ImagePartTracker:
    """Finds the image part that a call of the model continues.

    Args:
        option: the option that needs it, for messages.
        one_sampling: whether the tracker lives for the sampling of one batch only. Then conditioning of equal content
            belongs to it, even if the host makes the tensor again in each call.
    """

    def __init__(self, option: str = "match_interval", one_sampling: bool = False):
        self.option = option
        self.one_sampling = one_sampling
        self._parts: list[ImagePart] = []
        self._calls = 0
        self._lost = 0  # successive calls that matched a part in everything but their content
        self._reported = False
        self._lock = threading.Lock()

    def visit(
        self, t: float, content: Tensor, conditioning: Tensor | None, identifiers: Hashable = None
    ) -> tuple[ImagePart, bool]:
        """Returns (the part of a call, whether this is its first call at this timestep).

        Args:
            t: the timestep or noise level.
            content: the latent [B, C, h, w] or tokens [B, N, C] of the call.
            conditioning: the text embedding; None where a host does not provide it.
            identifiers: identifiers of the part, where a host provides them.
        """
        key = (content.shape, content.device, content.dtype, torch.is_inference_mode_enabled(), identifiers)
        now = standardized(content)
        with self._lock:
            self._calls += 1
            part = self._continued(key, t, now, conditioning)
            if part is None:
                part = ImagePart(key, t, now, conditioning, visited=self._calls)
                self._keep(part)
                return part, True
            moved = t != part.t
            if moved:
                part.direction = 1 if t > part.t else -1
                part.step += 1
            part.gap = max(part.gap, self._calls - part.visited)
            part.t, part.content, part.visited = t, now, self._calls
            return part, moved

    def _continued(self, key: Hashable, t: float, now: Tensor, conditioning: Tensor | None) -> ImagePart | None:
        if conditioning is None and not self.one_sampling and key[-1] is None:  # type: ignore[index]
            return None  # nothing connects two calls
        candidates = [p for p in self._parts if p.key == key and _moves_on(p, t) and self._same_prompt(p, conditioning)]
        if not candidates:
            return None
        correlations = torch.stack([(now * p.content).mean() for p in candidates]).tolist()
        largest = max(correlations)
        if not largest > SAME:
            self._report_lost(candidates, t)
            return None
        self._lost = 0
        ties = [p for p, value in zip(candidates, correlations, strict=True) if value > largest - TIE]
        # prefer parts not yet called at this timestep, then the closest timestep, then the earliest call
        return min(ties, key=lambda p: (p.t == t, abs(p.t - t), p.visited))

    def _same_prompt(self, part: ImagePart, conditioning: Tensor | None) -> bool:
        known = part.conditioning
        if known is None or conditioning is None:
            return known is conditioning
        if known is conditioning:
            part.same_object = True
            return True
        if (
            part.same_object and not self.one_sampling
        ):  # this pipeline keeps the tensor, so another tensor is another image's
            return False
        if known.shape != conditioning.shape or not torch.equal(known, conditioning):
            return False
        part.equal_objects += 1
        # a few may be other images with the same prompt; with more, the pipeline makes the tensor again in each call
        return part.equal_objects > REMADE or self.one_sampling

    def _report_lost(self, candidates: list[ImagePart], t: float) -> None:
        if any(p.t == t for p in candidates):
            return  # another part in the first step
        self._lost += 1
        if self._lost == 3 and not self._reported:
            self._reported = True
            logger.warning(
                f"{self.option}: successive steps are not of the same image part (new noise in every step, or moving "
                "tiles), so every call is a first step: tokens are matched again in each, and a threshold merges none"
            )

    def _keep(self, part: ImagePart) -> None:
        """Adds a part, and drops those that have ended: unvisited much longer than ever before."""
        live = [p for p in self._parts if self._calls - p.visited <= PATIENCE + 8 * (p.gap or 8)]
        self._parts = [*sorted(live, key=lambda p: p.visited)[1 - PARTS :], part]

    def __getstate__(self) -> dict[str, Any]:
        return {"option": self.option, "one_sampling": self.one_sampling}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _moves_on(part: ImagePart, t: float) -> bool:
    """Whether a call at t can continue the part. A second call at a part's first timestep is another part."""
    if t == part.t:
        return part.step > 0
    return part.direction in (0, 1 if t > part.t else -1)


def standardized(content: Tensor) -> Tensor:
    """Returns up to SAMPLE values of a latent [B, C, h, w] or tokens [B, N, C], standardized.

    Each channel's mean is subtracted and the mean square is 1, so that the mean product of two of them is their
    correlation.
    """
    x = content.detach()
    x = x[:, :LATENT_CHANNELS].flatten(2) if x.ndim == 4 else x[..., :: max(1, x.shape[-1] // 8)].mT
    x = x[..., :: max(1, x.numel() // SAMPLE)].float()
    x = x - x.mean(dim=-1, keepdim=True)
    return x / x.square().mean().sqrt().clamp_min(1e-12)
