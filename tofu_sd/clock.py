"""What a block cannot know: where in the sampling it is, and the map its tokens lie on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .match import Partition, partition
from .policy import TokenFusion


class Layout(NamedTuple):
    """What a block may know of its map, in tensors alone: a compiler would take an int for a constant.

    parts: sources and destinations. leaving: [r], of which the length alone counts.
    """

    parts: Partition
    leaving: Tensor


class Clock:
    """Knows the step and lays out each map's sources and destinations.

    A model's forward pre-hook calls `tick` with the timestep; each transformer's pre-hook asks for `layout`. Nothing
    here depends on what was generated before: the same timestep and size give the same tensors.
    """

    def __init__(self, fusion: TokenFusion, train_steps: int = 1000):
        self.fusion = fusion
        self.train_steps = train_steps
        self.timestep: Tensor | None = None
        self.open = True  # whether the step lies in the window
        self._layouts: dict[tuple[int, int, torch.device], Layout] = {}

    def tick(self, timestep: Any) -> None:
        """Notes the timestep of this call of the model: a number or a tensor, of which the first value counts.

        ValueError for a step window and a timestep outside train_steps..0.
        """
        fusion = self.fusion
        if fusion.seed is not None:
            self.timestep = timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep)
            self._layouts.clear()
        if (fusion.start, fusion.end) != (0.0, 1.0):
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "start and end need the timestep as a number, which a compiled model cannot read: compile the "
                    "blocks alone with compile_repeated_blocks()"
                )
            t = float(torch.as_tensor(timestep).flatten()[0])
            if not 0 <= t <= self.train_steps:
                raise ValueError(
                    f"timestep {t:g} is outside 0..{self.train_steps}: start and end measure progress by timestep, "
                    "which this scheduler does not count that way"
                )
            progress = 1 - t / self.train_steps
            self.open = fusion.start <= progress and (progress < fusion.end or fusion.end == 1)  # many end at t = 0

    def layout(self, h: int, w: int, device: torch.device) -> Layout | None:
        """The layout of an h × w map at this step; None where no token leaves, or outside the step window."""
        if not self.open or self.fusion.leaving(h, w) == 0:
            return None
        if torch.compiler.is_compiling():  # sizes may be symbols, which no dictionary should hold
            return self._lay_out(h, w, device)
        key = (h, w, device)
        if key not in self._layouts:
            if len(self._layouts) > 16:
                self._layouts.clear()
            self._layouts[key] = layout = self._lay_out(h, w, device)
            for index in (*layout.parts, layout.leaving):  # one graph of a compiled block for every size and ratio
                torch._dynamo.maybe_mark_dynamic(index, 0)
        return self._layouts[key]

    def _lay_out(self, h: int, w: int, device: torch.device) -> Layout:
        fusion, draw = self.fusion, None
        if fusion.seed is not None and self.timestep is not None:
            draw = self.timestep.flatten()[0].float().mul(1000).long() + fusion.seed * 1_000_003
        parts = partition(h, w, fusion.sx, fusion.sy, device, draw)
        return Layout(parts, parts.src.new_empty(fusion.leaving(h, w)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "timestep": None, "_layouts": {}}
