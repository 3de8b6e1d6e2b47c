"""Seconds of a call on a device."""

from __future__ import annotations

import importlib
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

PACKAGE = __name__.rpartition(".")[0]
LAUNCHES = 4  # calls between two synchronizations of a GPU, whose launches would else not overlap
clock: Callable[[], float] = time.perf_counter


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds of a call. On a GPU several calls are launched at once, as in a model."""
    calls = 1 if device.type == "cpu" else LAUNCHES
    synchronize(device)
    start = clock()
    for _ in range(calls):
        run()
    synchronize(device)
    return (clock() - start) / calls


def versions() -> str:
    """Returns those of this package and of torch, on which times depend."""
    return f"{PACKAGE} {importlib.import_module(PACKAGE).__version__}, torch {torch.__version__}"


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU; of a CPU its kind and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()} with {torch.get_num_threads()} threads"
    return device.type


def synchronize(device: torch.device) -> None:
    """Waits until a device has finished its work."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
