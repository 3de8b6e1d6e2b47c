"""A training that diverges ends at once, with its checkpoints as good as they were."""

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
    """The step after which a training resumes; 0 without a checkpoint. EvalError for one that cannot be used."""
    if not checkpoint.exists():
        return 0
    state = _read(checkpoint)
    if state is None:
        raise EvalError(f"{_place(checkpoint)} is damaged; delete it to train from the start")
    if not _is_good(state):
        raise EvalError(f"{_place(checkpoint)} holds weights that are not finite; delete it to train from the start")
    return int(state["step"])


def stopped(checkpoint: Path, what: str, rate: float) -> EvalError:
    """The error that ends a training. A checkpoint whose weights are not finite is removed: nothing resumes from it."""
    if checkpoint.exists() and not _is_good(_read(checkpoint)):
        checkpoint.unlink()
    return EvalError(
        f"the training diverged: {what}; give a lower --rate than {rate:g}, and another --out, or delete "
        f"{shown(checkpoint.parent)}"
    )


@contextmanager
def written(checkpoint: Path) -> Iterator[None]:
    """Inside, a checkpoint that cannot be written is an error of the system, and leaves no part of a file."""
    try:
        yield
    except RuntimeError as error:
        if not any(mark in str(error) for mark in WRITER):
            raise
        checkpoint.with_suffix(".tmp").unlink(missing_ok=True)
        raise OSError(errno.ENOSPC, "the checkpoint cannot be written", str(checkpoint)) from error


def _read(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint holds; None where it is damaged."""
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
