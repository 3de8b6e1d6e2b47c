"""Forwards in several threads: each thread has its own state, and compiled blocks run one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..kernels.operators import is_compiling

Value = TypeVar("Value")


class PerThread(Generic[Value]):
    """A value made by `make` for each thread, and one for compiled code, which cannot tell threads apart.

    Hooks that run outside of compiled code write to `both`, as they cannot know whether their block is compiled. Copies
    and pickles start with new values.
    """

    def __init__(self, make: Callable[[], Value]):
        self._make = make
        self._local = threading.local()
        self.compiled = make()

    def get(self) -> Value:
        """Returns the value of this thread, or of compiled code."""
        if is_compiling():
            return self.compiled
        if not hasattr(self._local, "value"):
            self._local.value = self._make()
        value: Value = self._local.value
        return value

    def both(self) -> tuple[Value, ...]:
        """Returns the values that a hook writes to: this thread's and that of compiled code."""
        return (self.compiled,) if is_compiling() else (self.get(), self.compiled)

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_make"])  # type: ignore[misc]


class OneAtATime:
    """A lock on a module whose blocks are compiled, as these cannot tell threads apart.

    It is held from the module's pre-hook until its forward ends. A thread whose forward was interrupted still holds it
    in its next forward.
    """

    WAIT = 600.0  # seconds for another thread's forward of one module

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._end: RemovableHandle | None = None

    def hold(self, module: nn.Module) -> None:
        """Acquires the lock, after another thread's forward of the module, until the end of this thread's."""
        if self._owner != threading.get_ident():
            if not self._lock.acquire(timeout=self.WAIT):
                raise RuntimeError("compiled blocks run one call at a time, and another thread's call has not ended")
            self._owner = threading.get_ident()
        if self._end is None:
            self._end = module.register_forward_hook(self._release, always_call=True)

    def _release(self, *_: Any) -> None:
        if self._owner == threading.get_ident() and self._end is not None:
            self._end.remove()
            self._owner = self._end = None
            self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def has_compiled(module: nn.Module) -> bool:
    """Whether a module in this one is compiled separately."""
    return any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in module.modules())
