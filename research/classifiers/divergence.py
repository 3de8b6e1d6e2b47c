"""Stops a training that diverges at once, and keeps its last good checkpoint."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from eval import EvalError
from eval.common.files import shown

WRITER = ("PytorchStreamWriter", "unexpected pos", "cannot be opened")  # in torch's errors of a file that it writes


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def resumed_at(checkpoint: Path) -> int:
    """Returns the step after which a training resumes; 0 without a checkpoint. EvalError for an unusable one."""
    if not checkpoint.exists():
        return 0
    state = _read(checkpoint)
    if state is None:
        raise EvalError(f"{_place(checkpoint)} is damaged; delete it to train from the start")
    if not _is_good(state):
        raise EvalError(f"{_place(checkpoint)} holds weights that are not finite; delete it to train from the start")
    return int(state["step"])


def stopped(checkpoint: Path, what: str, rate: float) -> EvalError:
    """Returns the error that ends a training, and removes a checkpoint whose weights are not finite."""
    if checkpoint.exists() and not _is_good(_read(checkpoint)):
        checkpoint.unlink()
    return EvalError(
        f"the training diverged: {what}; give a lower --rate than {rate:g}, and another --out, or delete "
        f"{shown(checkpoint.parent)}"
    )


@contextmanager
def explain_save_errors(checkpoint: Path) -> Iterator[None]:
    """Turns a checkpoint that cannot be written into an OSError, and removes its partial file."""
    try:
        yield
    except RuntimeError as error:
        if not any(mark in str(error) for mark in WRITER):
            raise
        checkpoint.with_suffix(".tmp").unlink(missing_ok=True)
        raise OSError(errno.ENOSPC, "the checkpoint cannot be written", str(checkpoint)) from error


def _read(checkpoint: Path) -> dict[str, Any] | None:
    """Returns the content of a checkpoint; None where it is damaged."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, ValueError, KeyError):
        return None
    whole = isinstance(state, dict) and {"model", "averaged", "optimiser", "step", "spent", "curve"} <= state.keys()
    return state if whole else None


def _is_good(state: dict[str, Any] | None) -> bool:
    return state is not None and is_finite([*state["model"].values(), *state["averaged"].values()])


def _place(checkpoint: Path) -> str:
    return f"{shown(checkpoint.parent)}/{checkpoint.name}"
