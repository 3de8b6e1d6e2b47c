"""Values of one forward: each thread that runs a model has its own, and compiled code has one for all threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ..kernels.operators import is_compiling

Value = TypeVar("Value")


class PerThread(Generic[Value]):
    """A value made by `make` for each thread, and one more for compiled code, which cannot ask for its thread.

    Hooks that run outside of compiled code write to `both`, as they cannot know whether the block that they serve is
    compiled. Copies and pickles start with fresh values.
    """

    def __init__(self, make: Callable[[], Value]):
        self._make = make
        self._local = threading.local()
        self.compiled = make()

    def get(self) -> Value:
        """The value of this thread, or of compiled code."""
        if is_compiling():
            return self.compiled
        if not hasattr(self._local, "value"):
            self._local.value = self._make()
        value: Value = self._local.value
        return value

    def both(self) -> tuple[Value, ...]:
        """The values that a hook writes to: this thread's and that of compiled code."""
        return (self.compiled,) if is_compiling() else (self.get(), self.compiled)

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_make"])  # type: ignore[misc]
