"""Times a method's denoiser beside the baseline's."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

WARM_UP = 2  # pictures, at least, that a method draws at each size of batch before it is timed
TIMED = 10  # batches of each method that the full model's denoiser runs beside, which doubles what they take


def fastest(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What is counted of two drawings of a batch: the faster, and of what ran beside them the fastest too."""
    first, second = sorted((one, other), key=lambda cost: cost["seconds"])
    if first["full_denoising"] in (None, first["denoising"]):  # it is none, or the full model's own
        return first
    return {**first, "full_denoising": min(first["full_denoising"], second["full_denoising"])}


def denoiser_of(pipe: Any) -> nn.Module | None:
    """What a pipeline calls in every step."""
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)


def twin(model: nn.Module | None) -> nn.Module | None:
    """A copy of a model that shares its weights, to be called while the model itself is patched."""
    if model is None:
        return None
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@contextmanager
def denoising(
    pipe: Any, beside: Callable[..., Any] | None = None
) -> Iterator[Callable[[], tuple[float | None, float | None]]]:
    """Inside, the pipeline's denoiser is timed, without waiting for a GPU; what it gives says how many seconds it ran,
    and how many `beside` did.

    beside: another denoiser, called on the same input after each step, of which the time alone is kept. To be asked
    once the device is idle. None on devices that keep no times, where `beside` is not called.
    """
    denoiser = denoiser_of(pipe)
    device = torch.device(pipe.device)
    if denoiser is None or device.type not in ("cpu", "cuda"):
        yield lambda: (None, None)
        return
    moments: list[Any] = []

    def note(*_: Any) -> None:
        if device.type == "cuda":
            with torch.cuda.device(device):  # it need not be the current one
                moments.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
                moments[-1].record(torch.cuda.current_stream(device))
        else:
            moments.append(time.perf_counter())

    def done(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        note()
        if beside is not None:
            beside(*args, **kwargs)
            note()

    def between(first: int, second: int) -> float:
        """Seconds from one moment of each step to another."""
        stride = 2 if beside is None else 3
        pairs = zip(moments[first::stride], moments[second::stride], strict=True)
        if device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        return sum(end - begin for begin, end in pairs)

    # before the method's own hooks, whose time is its own
    hooks = [
        denoiser.register_forward_pre_hook(note, prepend=True),
        denoiser.register_forward_hook(done, with_kwargs=True),
    ]
    try:
        yield lambda: (between(0, 1), None if beside is None else between(1, 2))
    finally:
        for hook in hooks:
            hook.remove()
