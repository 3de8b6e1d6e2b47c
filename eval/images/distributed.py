"""One process, or several that share the work: `accelerate launch --num_processes 2 -m eval.run ...`.

What each of them does is fixed by its rank alone, so that they share nothing but the folder.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from .. import EvalError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # one process may draw for long after another is done


@dataclass(frozen=True)
class Team:
    """The processes of a launch. rank: this one's place among `size`."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # of its own, where there is one for each

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """What of the work is this process's."""
        return work[self.rank :: self.size]

    def wait(self) -> None:
        """Until all have come this far."""
        if self.size > 1:
            torch.distributed.barrier()

    def gather(self, value: T) -> list[T]:
        """What each process has, by rank, in every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found


ALONE = Team()


def assemble(cpu: bool) -> Team:
    """The team that this process was launched in; one of its own without a launcher. cpu: leave the GPUs alone.

    EvalError where it cannot find the others: each of them alone would do all the work, in the same folder.
    """
    told = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch(r"[1-9]\d*", told):
        raise EvalError(f"WORLD_SIZE is {told!r}; it must be an integer >= 1: unset it, or start by accelerate launch")
    size = int(told)
    if size == 1:
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=cpu, timeout=PATIENCE)
    if state.num_processes != size:
        raise EvalError(
            f"WORLD_SIZE says that this is one of {size} processes, and accelerate finds {state.num_processes}: "
            "start them by accelerate launch or torchrun, or each by itself with --shard"
        )
    # PyTorch's threads that still wait for messages at the end of a process now and then abort it ("terminate called")
    atexit.register(state.destroy_process_group)
    return Team(state.process_index, state.num_processes, None if cpu else state.device)
