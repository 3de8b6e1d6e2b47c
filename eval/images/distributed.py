"""One process, or several that split the batches: `accelerate launch --num_processes 2 -m eval.run ...`.

The rank of a process fixes its share, so that processes have only the folder in common.
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
TIMEOUT = timedelta(days=7)  # one process may generate for long after another has finished


@dataclass(frozen=True)
class Processes:
    """The processes of a launch and this one's place among them, in accelerate's words.

    Args:
        process_index: from 0.
        num_processes: how many there are.
        device: this process's own, where each has one.
        is_shard: whether the others are started independently, by --shard.
    """

    process_index: int = 0
    num_processes: int = 1
    device: torch.device | None = None
    is_shard: bool = False

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and writes results."""
        return self.process_index == 0

    def split_between_processes(self, work: Sequence[T]) -> Sequence[T]:
        """This process's share of the work."""
        return work[self.process_index :: self.num_processes]

    def wait_for_everyone(self) -> None:
        """Blocks until all processes have arrived here."""
        if self.num_processes > 1:
            torch.distributed.barrier()

    def gather_object(self, value: T) -> list[T]:
        """The values of all processes, by index, in every process."""
        if self.num_processes == 1:
            return [value]
        found: list[Any] = [None] * self.num_processes
        torch.distributed.all_gather_object(found, value)
        return found


SINGLE_PROCESS = Processes()


def launched_processes(cpu: bool) -> Processes:
    """The processes of this launch; a single one without a launcher.

    Args:
        cpu: do not use GPUs.

    Raises:
        EvalError: the processes cannot find each other. Each would do all the work, in the same folder.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch(r"[1-9]\d*", world_size):
        raise EvalError(
            f"WORLD_SIZE is {world_size!r}; it must be an integer >= 1: unset it, or start by accelerate launch"
        )
    size = int(world_size)
    if size == 1:
        return SINGLE_PROCESS
    from accelerate import PartialState

    state = PartialState(cpu=cpu, timeout=TIMEOUT)
    if state.num_processes != size:
        raise EvalError(
            f"WORLD_SIZE is {size}, and accelerate finds {state.num_processes} processes: start them by accelerate "
            "launch or torchrun, or each of them independently with --shard"
        )
    # PyTorch's threads that still wait for messages when a process ends sometimes abort it ("terminate called")
    atexit.register(state.destroy_process_group)
    return Processes(state.process_index, state.num_processes, None if cpu else state.device)
