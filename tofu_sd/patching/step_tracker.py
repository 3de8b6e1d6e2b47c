"""What a block cannot know: where in the sampling it is, and the map its tokens lie on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import TokenFusion
from ..core.partition import Partition, Windows, partition, windows
from ..kernels.operators import is_compiling
from .image_parts import ImagePart, StepTracker
from .per_thread import PerThread


class Layout(NamedTuple):
    """What a block may know of its map, in tensors alone: a compiler would take an int for a constant.

    parts: sources and destinations. leaving: [r], of which the length alone counts. windows: where a source looks for
    destinations, None for the whole map.
    """

    parts: Partition
    leaving: Tensor
    windows: Windows | None


@dataclass
class Forward:
    """The step of one forward of the model, and the image part that it goes on with.

    open: whether the step lies in the window. first: whether an image part begins, as far as is known. anew: whether
    maps of earlier calls are out of date. part: None where steps are not followed. layouts: those drawn for this step.
    """

    timestep: Tensor | None = None
    open: bool = True
    first: bool = True
    anew: bool = True
    part: ImagePart | None = None
    layouts: dict[tuple[int, int, torch.device], Layout] = field(default_factory=dict)


class Clock:
    """Knows the step and lays out each map's sources and destinations.

    A model's forward pre-hook calls `tick` with the timestep; each transformer's pre-hook asks for `layout`. Nothing
    here depends on what was generated before: the same timestep and size give the same tensors. Each thread that runs
    the model has a step of its own.

    one_sampling: as of StepTracker.
    """

    def __init__(self, fusion: TokenFusion, train_steps: int = 1000, one_sampling: bool = False):
        self.fusion = fusion
        self.train_steps = train_steps
        self.tracker = StepTracker("match_every" if fusion.threshold is None else "threshold", one_sampling)
        self._forward = PerThread(Forward)
        self._layouts: dict[tuple[int, int, torch.device], Layout] = {}
        self._lengths: dict[tuple[int, torch.device], Tensor] = {}
        self._expected: tuple[tuple[int, int, Layout], ...] = ()

    @property
    def now(self) -> Forward:
        """The step of this thread's forward."""
        return self._forward.get()

    @property
    def follows_steps(self) -> bool:
        """Whether one step of an image hands something to the next."""
        return self.fusion.match_every > 1 or self.fusion.threshold is not None

    def expect(self, h: int, w: int, device: torch.device) -> None:
        """Lays out an h × w map before any call, for compiled code, which would otherwise do it in every call.

        Nothing is laid out where it depends on the step, or no token leaves.
        """
        if self.fusion.seed is None and self.fusion.leaving(h, w):
            with torch.inference_mode(False):  # else it could not be used in training
                layout = self._lay_out(h, w, device)
            for index in (*layout.parts, *(layout.windows or ())):
                torch._dynamo.mark_static_address(index)  # a CUDA graph reads it where it is
            self._expected = (*self._expected, (h, w, layout))

    def tick(
        self,
        timestep: Any,
        content: Tensor | None = None,
        conditioning: Tensor | None = None,
        identifiers: Hashable = None,
    ) -> Forward:
        """Notes the timestep of this call of the model: a number or a tensor, of which the first value counts.

        content, conditioning, identifiers: by which the steps of an image are followed, as of StepTracker.visit.
        ValueError for a step window and a timestep outside train_steps..0.
        """
        fusion, now = self.fusion, self.now
        if fusion.seed is not None:
            now.timestep = timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep)
            now.layouts = {}
        windowed = (fusion.start, fusion.end) != (0.0, 1.0)
        if not windowed and not self.follows_steps:
            return now
        if is_compiling():
            needs = "match_every needs" if fusion.threshold is None else "threshold needs"
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
            now.open = fusion.start <= progress and (progress < fusion.end or fusion.end == 1)  # many end at t = 0
        return now

    def _follow(
        self, now: Forward, t: float, content: Tensor | None, conditioning: Tensor | None, identifiers: Hashable
    ) -> None:
        """Decides whether maps are out of date: every so many steps of an image part, and whenever another begins."""
        if content is None:
            now.part, now.first, now.anew = None, True, True
            return
        now.part, moved = self.tracker.visit(t, content, conditioning, identifiers)
        now.first = now.part.step == 0
        now.anew = moved and now.part.step % self.fusion.match_every == 0

    def layout(self, h: int, w: int, device: torch.device) -> Layout | None:
        """The layout of an h × w map at this step; None where no token leaves, or outside the step window."""
        now = self.now
        if not now.open or self.fusion.leaving(h, w) == 0:
            return None
        if is_compiling():  # sizes may be symbols, which no dictionary should hold
            for its_h, its_w, layout in self._expected:
                if h == its_h and w == its_w and device == layout.leaving.device:
                    return layout
            return self._lay_out(h, w, device)
        known = self._layouts if self.fusion.seed is None else now.layouts
        if (h, w, device) not in known:
            layout = self._lay_out(h, w, device)
            for index in (*layout.parts, layout.leaving, *(layout.windows or ())):
                # one graph of a compiled block for every size and ratio
                torch._dynamo.maybe_mark_dynamic(index, list(range(index.ndim)))
            if len(known) > 16:  # another thread may be about to read one
                known = self._layouts = {}
            known[h, w, device] = layout
        return known[h, w, device]

    def thinned(self, layout: Layout, alike: float) -> Layout:
        """A layout by which no more leave than are `alike`, in one of a few numbers; none of them is a length of 0."""
        most, device = len(layout.leaving), layout.leaving.device
        return layout._replace(leaving=self.length(self.fusion.bucket(most, alike), device))

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

    def _lay_out(self, h: int, w: int, device: torch.device) -> Layout:
        fusion, draw, timestep = self.fusion, None, self.now.timestep
        if fusion.seed is not None and timestep is not None:
            draw = timestep.flatten()[0].float().mul(1000).long() + fusion.seed * 1_000_003
        parts = partition(h, w, fusion.sx, fusion.sy, device, draw)
        near = None
        if fusion.window is not None:
            everyone = Partition(torch.arange(h * w, device=device), parts.dst)
            near = windows(parts if fusion.temperature is None else everyone, h, w, fusion.sx, fusion.sy, fusion.window)
        return Layout(parts, torch.empty(fusion.leaving(h, w), device=device), near)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": {}, "_lengths": {}, "_expected": ()}
