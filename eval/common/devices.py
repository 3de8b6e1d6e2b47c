"""Devices, dtypes and memory on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tofu_sd.utils import did_you_mean

from .. import EvalError
from .cli import Parser
from .files import without_paths

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICES = ("cpu", "cuda", "mps", "xpu")


def add_device(parser: Parser) -> None:
    """Adds --device, for pick_device."""
    parser.add_argument("--device", default="auto", help=f"auto, {', '.join(DEVICES)}")


def add_dtype(parser: Parser, default: str = "auto") -> None:
    """Adds --dtype, for pick_dtype."""
    parser.add_argument("--dtype", default=default, help=f"auto (float16 on cuda, else float32), {', '.join(DTYPES)}")


def pick_device(name: str) -> torch.device:
    """The device of this name; `auto` is the accelerator, if there is one. EvalError where it is unavailable."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if name.partition(":")[0] not in DEVICES or not re.fullmatch(r"\w+(:\d+)?", name):
        raise EvalError(f"unknown device {name!r}{did_you_mean(name, DEVICES)}; known: auto, {', '.join(DEVICES)}")
    device = torch.device(name)
    if device.type != "cpu" and not getattr(torch, device.type).is_available():
        raise EvalError(f"device {name!r} is not available here; --device cpu always works")
    if device.type != "cpu" and (device.index or 0) >= (count := getattr(torch, device.type).device_count()):
        raise EvalError(f"there is no device {name!r}: the last one of {device.type} is {count - 1}")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; `auto` is float16 on CUDA, else float32. EvalError for an unknown one."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise EvalError(f"unknown dtype {name!r}{did_you_mean(name, DTYPES)}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def out_of_memory(error: Exception) -> bool:
    """Whether an error means too little memory; devices other than CUDA have no error class for it."""
    phrases = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Inside, too little memory on any device raises an EvalError with this advice."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise EvalError(f"{without_paths(str(error)).splitlines()[0].rstrip('.')}: {advice}") from error
