"""What a block cannot know: the step of the sampling, and the map on which its tokens lie."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import TokenFusionConfig
from ..core.cells import make_cells
from ..core.partition import Partition, PartitionTensors, partition, windows
from ..kernels.operators import is_compiling
from .image_parts import ImagePart, ImagePartTracker
from .threads import PerThread


@dataclass
class StepState:
    """The step of one forward of the model, and the image part that it belongs to.

    Args:
        timestep: of the call, where destinations are drawn.
        is_active: whether the step lies between start and end.
        is_first_step: whether the call starts a new image part.
        should_match: whether maps of earlier calls are out of date.
        part: the image part; None where steps are not followed.
        grids: the grids that were drawn for this step.
    """

    timestep: Tensor | None = None
    is_active: bool = True
    is_first_step: bool = True
    should_match: bool = True
    part: ImagePart | None = None
    grids: dict[tuple[int, int, torch.device], PartitionTensors] = field(default_factory=dict)


class StepTracker:
    """Keeps the step, and makes the grid of each map: its sources and destinations.

    A model's forward pre-hook calls `start_step` with the timestep; each spatial module's pre-hook calls `grid`. The
    same timestep and size give the same tensors, whatever ran before. Each thread that runs the model has its own step.

    Args:
        config: how tokens are merged.
        train_steps: the timestep at which the schedule starts.
        one_sampling: see ImagePartTracker.
    """

    def __init__(self, config: TokenFusionConfig, train_steps: float = 1000, one_sampling: bool = False):
        self.config = config
        self.train_steps = train_steps
        self.tracker = ImagePartTracker("match_interval" if config.threshold is None else "threshold", one_sampling)
        self._forward = PerThread(StepState)
        self._grids: dict[tuple[int, int, torch.device], PartitionTensors] = {}
        self._lengths: dict[tuple[int, torch.device], Tensor] = {}
        self._prepared: tuple[tuple[int, int, PartitionTensors], ...] = ()

    @property
    def now(self) -> StepState:
        """The step of this thread's forward."""
        return self._forward.get()

    @property
    def follows_steps(self) -> bool:
        """Whether one step of an image stores something for the next."""
        return self.config.match_interval > 1 or self.config.threshold is not None

    def prepare_grid(self, h: int, w: int, device: torch.device) -> None:
        """Makes the grid of an h x w map before any call, for compiled code, which would make it in every call.

        Makes none where the grid depends on the step, or where no token is merged.
        """
        if self.config.seed is None and self.config.num_merged(h, w):
            with torch.inference_mode(False):  # inference tensors cannot be used in training
                grid = self._make_grid(h, w, device)
            for index in grid.indices:
                torch._dynamo.mark_static_address(index)  # CUDA graphs read it in place
            self._prepared = (*self._prepared, (h, w, grid))

    def start_step(
        self,
        timestep: Any,
        content: Tensor | None = None,
        conditioning: Tensor | None = None,
        identifiers: Hashable = None,
    ) -> StepState:
        """Sets the step of this call of the model.

        Args:
            timestep: a number or a tensor, of which the first value counts.
            content, conditioning, identifiers: see ImagePartTracker.visit.

        Raises:
            ValueError: a step window is set and the timestep is outside 0..train_steps.
            RuntimeError: the step matters, and the whole model is compiled.
        """
        config, now = self.config, self.now
        if config.seed is not None:
            now.timestep = timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep)
            now.grids = {}
        windowed = (config.start, config.end) != (0.0, 1.0)
        if not windowed and not self.follows_steps:
            return now
        if is_compiling():
            needs = "match_interval needs" if config.threshold is None else "threshold needs"
            raise RuntimeError(
                f"{'start and end need' if windowed else needs} the timestep as a number, which a "
                "compiled model cannot read: compile only the blocks, with compile_repeated_blocks()"
            )
        t = float(torch.as_tensor(timestep).flatten()[0])
        if self.follows_steps:
            self._follow(now, t, content, conditioning, identifiers)
        if windowed:
            now.is_active = self._in_window(t)
        return now

    def _in_window(self, t: float) -> bool:
        if not 0 <= t <= self.train_steps:
            raise ValueError(
                f"timestep {t:g} is outside 0..{self.train_steps:g}: start and end measure progress by timestep, "
                "which this scheduler does not count that way"
            )
        progress = 1 - t / self.train_steps
        return self.config.start <= progress and (progress < self.config.end or self.config.end == 1)  # t = 0 counts

    def _follow(
        self, now: StepState, t: float, content: Tensor | None, conditioning: Tensor | None, identifiers: Hashable
    ) -> None:
        """Sets whether to match again: every `match_interval` steps of an image part, and in the first of each."""
        if content is None:
            now.part, now.is_first_step, now.should_match = None, True, True
            return
        now.part, moved = self.tracker.visit(t, content, conditioning, identifiers)
        now.is_first_step = now.part.step == 0
        now.should_match = moved and now.part.step % self.config.match_interval == 0

    def grid(self, h: int, w: int, device: torch.device) -> PartitionTensors | None:
        """Returns the grid of an h x w map in this step; None where no token is merged or outside the step window."""
        now = self.now
        if not now.is_active or self.config.num_merged(h, w) == 0:
            return None
        if is_compiling():  # sizes may be symbols, which cannot be keys
            for grid_h, grid_w, grid in self._prepared:
                if h == grid_h and w == grid_w and device == grid.num_merged.device:
                    return grid
            return self._make_grid(h, w, device)
        grids = self._grids if self.config.seed is None else now.grids
        if (h, w, device) not in grids:
            grid = self._make_grid(h, w, device)
            for index in (*grid.indices, grid.num_merged):
                # one graph of a compiled block for every size and ratio
                torch._dynamo.maybe_mark_dynamic(index, list(range(index.ndim)))
            if len(grids) > 16:  # a new dictionary: another thread may be reading this one
                grids = self._grids = {}
            grids[h, w, device] = grid
        return grids[h, w, device]

    def limited(self, grid: PartitionTensors, num_similar: float) -> PartitionTensors:
        """Returns the grid with at most `num_similar` tokens to merge, rounded down to a bucket; length 0 for none."""
        most, device = len(grid.num_merged), grid.num_merged.device
        return grid._replace(num_merged=self.length(self.config.bucket(most, num_similar), device))

    def length(self, n: int, device: torch.device) -> Tensor:
        """Returns a tensor [n], whose length carries a number into a block without its graph depending on it."""
        if is_compiling():
            return torch.empty(n, device=device)
        length = self._lengths.get((n, device))
        if length is None:
            length = torch.empty(n, device=device)
            torch._dynamo.maybe_mark_dynamic(length, 0)
            self._lengths[n, device] = length
        return length

    def _make_grid(self, h: int, w: int, device: torch.device) -> PartitionTensors:
        config, draw, timestep = self.config, None, self.now.timestep
        if config.seed is not None and timestep is not None:
            draw = timestep.flatten()[0].float().mul(1000).long() + config.seed * 1_000_003
        parts = partition(h, w, config.sx, config.sy, device, draw)
        near = None
        if config.window is not None:
            everyone = Partition(torch.arange(h * w, device=device), parts.dst)
            near = windows(parts if config.temperature is None else everyone, h, w, config.sx, config.sy, config.window)
        cells = make_cells(h, w, device) if config.in_cells else None
        return PartitionTensors(parts, torch.empty(config.num_merged(h, w), device=device), near, cells)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_grids": {}, "_lengths": {}, "_prepared": ()}
