"""What a block cannot know: where in the sampling it is, and the map its tokens lie on."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.operators import is_compiling
from .match import Partition, Windows, partition, windows
from .policy import TokenFusion


class Layout(NamedTuple):
    """What a block may know of its map, in tensors alone: a compiler would take an int for a constant.

    parts: sources and destinations. leaving: [r], of which the length alone counts. windows: where a source looks for
    destinations, None for the whole map.
    """

    parts: Partition
    leaving: Tensor
    windows: Windows | None


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
        self.anew = True  # whether maps of earlier calls are out of date
        self.begins = True  # whether a picture begins, as far as is known
        self._step = 0
        self._last: tuple[float, weakref.ref[Tensor], bool] | None = None
        self._layouts: dict[tuple[int, int, torch.device], Layout] = {}
        self._lengths: dict[tuple[int, torch.device], Tensor] = {}
        self._expected: tuple[tuple[int, int, Layout], ...] = ()

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

    def tick(self, timestep: Any, conditioning: Tensor | None = None) -> None:
        """Notes the timestep of this call of the model: a number or a tensor, of which the first value counts.

        conditioning: what the model is told to draw, the same tensor in all steps of a picture.
        ValueError for a step window and a timestep outside train_steps..0.
        """
        fusion = self.fusion
        if fusion.seed is not None:
            self.timestep = timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep)
            self._layouts.clear()
        windowed = (fusion.start, fusion.end) != (0.0, 1.0)
        if not windowed and fusion.match_every == 1 and fusion.threshold is None:
            return
        if is_compiling():
            needs = "match_every needs" if fusion.threshold is None else "threshold needs"
            raise RuntimeError(
                f"{'start and end need' if windowed else needs} the timestep as a number, which a "
                "compiled model cannot read: compile the blocks alone with compile_repeated_blocks()"
            )
        t = float(torch.as_tensor(timestep).flatten()[0])
        self._count(t, conditioning)
        if windowed:
            if not 0 <= t <= self.train_steps:
                raise ValueError(
                    f"timestep {t:g} is outside 0..{self.train_steps}: start and end measure progress by timestep, "
                    "which this scheduler does not count that way"
                )
            progress = 1 - t / self.train_steps
            self.open = fusion.start <= progress and (progress < fusion.end or fusion.end == 1)  # many end at t = 0

    def _count(self, t: float, conditioning: Tensor | None) -> None:
        """Decides whether maps are out of date: every so many steps, and whenever this may be another picture.

        Steps of one picture fall in time and show the model the same tensor of conditioning. Pipelines make that tensor
        anew for each picture, which therefore starts with maps of its own whatever was drawn before it.
        """
        mode = torch.is_inference_mode_enabled()  # whose tensors cannot be used outside it
        goes_on = False
        if self._last is not None and conditioning is not None:
            before, shown, made_in = self._last
            goes_on = t < before and shown() is conditioning and made_in == mode
        self._step = self._step + 1 if goes_on else 0
        self.begins = self._step == 0
        self.anew = self._step % self.fusion.match_every == 0
        self._last = None if conditioning is None else (t, weakref.ref(conditioning), mode)

    def layout(self, h: int, w: int, device: torch.device) -> Layout | None:
        """The layout of an h × w map at this step; None where no token leaves, or outside the step window."""
        if not self.open or self.fusion.leaving(h, w) == 0:
            return None
        if is_compiling():  # sizes may be symbols, which no dictionary should hold
            for its_h, its_w, layout in self._expected:
                if h == its_h and w == its_w and device == layout.leaving.device:
                    return layout
            return self._lay_out(h, w, device)
        key = (h, w, device)
        if key not in self._layouts:
            if len(self._layouts) > 16:
                self._layouts.clear()
            self._layouts[key] = layout = self._lay_out(h, w, device)
            for index in (*layout.parts, layout.leaving, *(layout.windows or ())):
                # one graph of a compiled block for every size and ratio
                torch._dynamo.maybe_mark_dynamic(index, list(range(index.ndim)))
        return self._layouts[key]

    def thinned(self, layout: Layout, alike: float) -> Layout:
        """A layout by which no more leave than are `alike`, in one of a few numbers; none of them is a length of 0."""
        most, device = len(layout.leaving), layout.leaving.device
        return layout._replace(leaving=self.length(self.fusion.bucket(most, alike), device))

    def length(self, n: int, device: torch.device) -> Tensor:
        """A number as the length of a tensor [n], for a block whose graph shall not depend on it."""
        if is_compiling():
            return torch.empty(n, device=device)
        if (n, device) not in self._lengths:
            self._lengths[n, device] = torch.empty(n, device=device)
            torch._dynamo.maybe_mark_dynamic(self._lengths[n, device], 0)
        return self._lengths[n, device]

    def _lay_out(self, h: int, w: int, device: torch.device) -> Layout:
        fusion, draw = self.fusion, None
        if fusion.seed is not None and self.timestep is not None:
            draw = self.timestep.flatten()[0].float().mul(1000).long() + fusion.seed * 1_000_003
        parts = partition(h, w, fusion.sx, fusion.sy, device, draw)
        near = None
        if fusion.window is not None:
            everyone = Partition(torch.arange(h * w, device=device), parts.dst)
            near = windows(parts if fusion.temperature is None else everyone, h, w, fusion.sx, fusion.sy, fusion.window)
        return Layout(parts, torch.empty(fusion.leaving(h, w), device=device), near)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "timestep": None, "_last": None, "_layouts": {}, "_lengths": {}, "_expected": ()}
