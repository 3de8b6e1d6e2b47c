"""One call at a time for compiled blocks, which cannot tell threads apart."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class OneAtATime:
    """Lets one thread at a time run a module whose blocks are compiled, as these cannot ask for their thread.

    Held from the module's pre-hook until its forward ends. A thread that comes again after its forward was interrupted
    still holds it.
    """

    WAIT = 600.0  # seconds for another thread's forward of one module

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._end: RemovableHandle | None = None

    def hold(self, module: nn.Module) -> None:
        """Waits for another thread's forward of the module, and releases itself after this thread's."""
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
    """Whether a module in this one is compiled by itself."""
    return any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in module.modules())
