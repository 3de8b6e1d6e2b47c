"""Ctrl-C and missing packages before a command line runs: one line and an exit code instead of a traceback.

Importing torch and diffusers takes seconds. A KeyboardInterrupt in between is a long traceback, and libraries turn it
into other errors or drop it. So Ctrl-C ends the process at once until the work begins, and after it ends.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

STOPPED = 130  # the exit code of a shell for what Ctrl-C ended


def guard() -> None:
    """Ends this process in one line on Ctrl-C, or where a package cannot be imported, until `interruptible`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored in the background
        signal.signal(signal.SIGINT, _leave)
    sys.excepthook = _in_one_line


def is_command() -> bool:
    """Whether Python was started as `python -m eval.NAME` or `-m tofu_sd.NAME` and has not yet run the module."""
    started = any(part.removeprefix("-m").startswith(("eval.", "tofu_sd.")) for part in sys.orig_argv)
    return sys.argv[:1] == ["-m"] and started


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, so that files are closed and the user reads how to resume."""
    if signal.getsignal(signal.SIGINT) is not _leave:  # not a command line, or inside already
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _leave)


def interrupted(error: BaseException) -> bool:
    """Whether an error comes from Ctrl-C: libraries raise others in its place."""
    seen: list[BaseException | None] = [error]
    while (last := seen[-1]) is not None and not isinstance(last, KeyboardInterrupt):
        seen.append(last.__cause__ or last.__context__)
    return seen[-1] is not None


def _leave(_signal: int, _frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")  # a print inside a print raises
    os._exit(STOPPED)


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        sys.exit(STOPPED)
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in ("", "eval", "tofu_sd"):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: the package {package!r} is not installed: pip install 'tofu-sd[eval]'", file=sys.stderr)
    sys.exit(2)
