"""Time and memory of one batch: seconds in the denoiser, those of the baseline's denoiser on the same input, bytes."""

from __future__ import annotations

import copy
import gc
import math
import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn

WARM_UP = 2  # images that a method generates at least, at each batch size, before it is timed
WARM_UP_STEPS = 4  # of such an image: enough for methods that repeat every third step
TIMED = 10  # batches of each method in which the baseline's denoiser runs too, which doubles their time


@dataclass(frozen=True)
class TimingOptions:
    """How the batches of each method are timed.

    Args:
        repeats: how often each batch is generated; the fastest time counts, the images are the same.
        with_baseline: in how many batches the baseline's denoiser runs after each step. With 0 only whole batches of
            one run are compared.
    """

    repeats: int = 1
    with_baseline: int = TIMED

    def of_one(self, num_processes: int) -> TimingOptions:
        """That of one of several processes, which share the batches."""
        return replace(self, with_baseline=math.ceil(self.with_baseline / num_processes))


DEFAULT_TIMING = TimingOptions()


class RunBaseline(Protocol):
    """Runs the baseline's denoiser on the arguments of the method's."""

    def __call__(self, *args: Any, **kwargs: Any) -> None: ...


def fastest(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The cost of a batch that was generated twice: that of the faster time, with the baseline's faster time."""
    first, second = sorted((one, other), key=lambda cost: cost["seconds"])
    if first["baseline_denoiser_seconds"] in (None, first["denoiser_seconds"]):  # none, or the baseline itself
        return first
    times = (first["baseline_denoiser_seconds"], second["baseline_denoiser_seconds"])
    return {**first, "baseline_denoiser_seconds": min(times)}


def denoiser_of(pipe: Any) -> nn.Module | None:
    """The model that a pipeline calls in every step."""
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)


def shared_weights_copy(model: nn.Module | None) -> nn.Module | None:
    """A copy of a model that shares its weights, to run unpatched while the model itself is patched."""
    if model is None:
        return None
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class UNetTimer:
    """Context manager that times the denoiser of a pipeline, without synchronizing a GPU at each step.

    Devices other than CPU and CUDA are not timed, and `run_baseline` is not called on them.

    Args:
        pipe: the pipeline.
        run_baseline: called with the denoiser's arguments after each step; its time is measured separately.
    """

    def __init__(self, pipe: Any, run_baseline: RunBaseline | None = None):
        self._denoiser = denoiser_of(pipe)
        self._device = torch.device(pipe.device)
        self._run_baseline = run_baseline
        self._marks: list[Any] = []  # before a step, after it and, with a baseline, after the baseline's
        self._hooks: list[Any] = []

    def __enter__(self) -> UNetTimer:
        if self._denoiser is not None and self._device.type in ("cpu", "cuda"):
            # the first pre-hook and the first hook: what the method's own hooks do is the method's time
            before = self._denoiser.register_forward_pre_hook(self._mark, prepend=True)
            after = self._denoiser.register_forward_hook(self._after_step, with_kwargs=True)
            self._hooks = [before, after]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def seconds(self) -> tuple[float | None, float | None]:
        """Seconds of the denoiser and of `run_baseline`, once the device is idle; None for what was not timed."""
        if not self._hooks:
            return None, None
        return self._between(0, 1), None if self._run_baseline is None else self._between(1, 2)

    def _mark(self, *_: Any) -> None:
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):  # it may not be the current device
                self._marks.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
                self._marks[-1].record(torch.cuda.current_stream(self._device))
        else:
            self._marks.append(time.perf_counter())

    def _after_step(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._mark()
        if self._run_baseline is not None:
            self._run_baseline(*args, **kwargs)
            self._mark()

    def _between(self, first: int, second: int) -> float:
        """Seconds between two marks of each step, summed over the steps."""
        stride = 2 if self._run_baseline is None else 3
        pairs = zip(self._marks[first::stride], self._marks[second::stride], strict=True)
        if self._device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        return sum(end - begin for begin, end in pairs)


class MemoryTracker:
    """CUDA memory of one batch, from its creation on. On other devices all figures are None.

    Args:
        device: where the batch runs.
        with_baseline: whether the baseline runs in between. The allocator then keeps its cache, as otherwise one of
            the two would pay for reserving memory again, and `reserved_bytes` is None.
    """

    def __init__(self, device: torch.device, with_baseline: bool):
        self._device, self._with_baseline = device, with_baseline
        self._peaks: list[int] = []
        self._held = self._reserved = 0
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            gc.collect()
            if not with_baseline:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._held, self._reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)

    def pause(self) -> None:
        """Stores the peak so far, before another model runs."""
        if self._on_cuda:
            self._peaks.append(torch.cuda.max_memory_allocated(self._device))

    def resume(self) -> None:
        """Ignores the peak since `pause`."""
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)

    def figures(self) -> dict[str, int | None]:
        """Bytes: the peak above what was held before, newly reserved ones, and those held before."""
        if not self._on_cuda:
            return {"peak_bytes": None, "reserved_bytes": None, "held_bytes": None}
        peak = max(*self._peaks, torch.cuda.max_memory_allocated(self._device), 0)
        reserved = torch.cuda.max_memory_reserved(self._device) - self._reserved
        return {
            "peak_bytes": peak - self._held,
            "reserved_bytes": None if self._with_baseline else reserved,
            "held_bytes": self._held,
        }
