"""What a block cannot know: where in the sampling it is, and the map its tokens lie on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import TokenFusionConfig
from ..core.partition import Partition, PartitionTensors, partition, windows
from ..kernels.operators import is_compiling
from .image_parts import ImagePart, ImagePartTracker
from .per_thread import PerThread


@dataclass
class StepState:
    """The step of one forward of the model, and the image part that it goes on with.

    open: whether the step lies in the window. first: whether an image part begins, as far as is known. anew: whether
    maps of earlier calls are out of date. part: None where steps are not followed. layouts: those drawn for this step.
    """

    timestep: Tensor | None = None
    is_active: bool = True
    is_first_step: bool = True
    should_match: bool = True
    part: ImagePart | None = None
    grids: dict[tuple[int, int, torch.device], PartitionTensors] = field(default_factory=dict)


class StepTracker:
    """Knows the step and lays out each map's sources and destinations.

    A model's forward pre-hook calls `tick` with the timestep; each transformer's pre-hook asks for `grid`. Nothing
    here depends on what was generated before: the same timestep and size give the same tensors. Each thread that runs
    the model has a step of its own.

    one_sampling: as of ImagePartTracker.
    """

    def __init__(self, fusion: TokenFusionConfig, train_steps: int = 1000, one_sampling: bool = False):
        self.fusion = fusion
        self.train_steps = train_steps
        self.tracker = ImagePartTracker("match_interval" if fusion.threshold is None else "threshold", one_sampling)
        self._forward = PerThread(StepState)
        self._grids: dict[tuple[int, int, torch.device], PartitionTensors] = {}
        self._lengths: dict[tuple[int, torch.device], Tensor] = {}
        self._expected: tuple[tuple[int, int, PartitionTensors], ...] = ()

    @property
    def now(self) -> StepState:
        """The step of this thread's forward."""
        return self._forward.get()

    @property
    def follows_steps(self) -> bool:
        """Whether one step of an image hands something to the next."""
        return self.fusion.match_interval > 1 or self.fusion.threshold is not None

    def expect(self, h: int, w: int, device: torch.device) -> None:
        """Lays out an h × w map before any call, for compiled code, which would otherwise do it in every call.

        Nothing is laid out where it depends on the step, or no token leaves.
        """
        if self.fusion.seed is None and self.fusion.num_merged(h, w):
            with torch.inference_mode(False):  # else it could not be used in training
                grid = self._make_grid(h, w, device)
            for index in (*grid.parts, *(grid.windows or ())):
                torch._dynamo.mark_static_address(index)  # a CUDA graph reads it where it is
            self._expected = (*self._expected, (h, w, grid))

    def tick(
        self,
        timestep: Any,
        content: Tensor | None = None,
        conditioning: Tensor | None = None,
        identifiers: Hashable = None,
    ) -> StepState:
        """Notes the timestep of this call of the model: a number or a tensor, of which the first value counts.

        content, conditioning, identifiers: by which the steps of an image are followed, as of ImagePartTracker.visit.
        ValueError for a step window and a timestep outside train_steps..0.
        """
        fusion, now = self.fusion, self.now
        if fusion.seed is not None:
            now.timestep = timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep)
            now.grids = {}
        windowed = (fusion.start, fusion.end) != (0.0, 1.0)
        if not windowed and not self.follows_steps:
            return now
        if is_compiling():
            needs = "match_interval needs" if fusion.threshold is None else "threshold needs"
            raise RuntimeError(
                f"{'start and end need' if windowed else needs} the timestep as a number, which a "
                "compiled model cannot read: compile the blocks alone with compile_repeated_blocks()"
            )
        t = float(torch.as_tensor(timestep).flatten()[0])
        if self.follows_steps:
            self._follow(now, t, content, conditioning, identifiers)
        if windowed:
            if not 0 <= t <= self.train_steps:
                raise ValueError(
                    f"timestep {t:g} is outside 0..{self.train_steps}: start and end measure progress by timestep, "
                    "which this scheduler does not count that way"
                )
            progress = 1 - t / self.train_steps
            now.is_active = fusion.start <= progress and (progress < fusion.end or fusion.end == 1)  # many end at t = 0
        return now

    def _follow(
        self, now: StepState, t: float, content: Tensor | None, conditioning: Tensor | None, identifiers: Hashable
    ) -> None:
        """Decides whether maps are out of date: every so many steps of an image part, and whenever another begins."""
        if content is None:
            now.part, now.is_first_step, now.should_match = None, True, True
            return
        now.part, moved = self.tracker.visit(t, content, conditioning, identifiers)
        now.is_first_step = now.part.step == 0
        now.should_match = moved and now.part.step % self.fusion.match_interval == 0

    def grid(self, h: int, w: int, device: torch.device) -> PartitionTensors | None:
        """The layout of an h × w map at this step; None where no token leaves, or outside the step window."""
        now = self.now
        if not now.is_active or self.fusion.num_merged(h, w) == 0:
            return None
        if is_compiling():  # sizes may be symbols, which no dictionary should hold
            for its_h, its_w, grid in self._expected:
                if h == its_h and w == its_w and device == grid.num_merged.device:
                    return grid
            return self._make_grid(h, w, device)
        known = self._grids if self.fusion.seed is None else now.grids
        if (h, w, device) not in known:
            grid = self._make_grid(h, w, device)
            for index in (*grid.parts, grid.num_merged, *(grid.windows or ())):
                # one graph of a compiled block for every size and ratio
                torch._dynamo.maybe_mark_dynamic(index, list(range(index.ndim)))
            if len(known) > 16:  # another thread may be about to read one
                known = self._grids = {}
            known[h, w, device] = grid
        return known[h, w, device]

    def limited(self, grid: PartitionTensors, num_similar: float) -> PartitionTensors:
        """The grid with at most `num_similar` tokens to merge, in one of a few numbers; a length of 0 for none."""
        most, device = len(grid.num_merged), grid.num_merged.device
        return grid._replace(num_merged=self.length(self.fusion.bucket(most, num_similar), device))

    def length(self, n: int, device: torch.device) -> Tensor:
        """A number as the length of a tensor [n], for a block whose graph shall not depend on it."""
        if is_compiling():
            return torch.empty(n, device=device)
        length = self._lengths.get((n, device))
        if length is None:
            length = torch.empty(n, device=device)
            torch._dynamo.maybe_mark_dynamic(length, 0)
            self._lengths[n, device] = length
        return length

    def _make_grid(self, h: int, w: int, device: torch.device) -> PartitionTensors:
        fusion, draw, timestep = self.fusion, None, self.now.timestep
        if fusion.seed is not None and timestep is not None:
            draw = timestep.flatten()[0].float().mul(1000).long() + fusion.seed * 1_000_003
        parts = partition(h, w, fusion.sx, fusion.sy, device, draw)
        near = None
        if fusion.window is not None:
            everyone = Partition(torch.arange(h * w, device=device), parts.dst)
            near = windows(parts if fusion.temperature is None else everyone, h, w, fusion.sx, fusion.sy, fusion.window)
        return PartitionTensors(parts, torch.empty(fusion.num_merged(h, w), device=device), near)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": {}, "_lengths": {}, "_expected": ()}
