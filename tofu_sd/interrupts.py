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

STOPPED = 130  # exit code after Ctrl-C


def guard() -> None:
    """Makes Ctrl-C and a missing package end this process with one line, until `interruptible`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # shells ignore it for background jobs
        signal.signal(signal.SIGINT, _leave)
    sys.excepthook = _in_one_line


def is_command() -> bool:
    """Whether Python was started as `python -m eval.NAME` or `-m tofu_sd.NAME` and has not yet run the module."""
    started = any(part.removeprefix("-m").startswith(("eval.", "tofu_sd.")) for part in sys.orig_argv)
    return sys.argv[:1] == ["-m"] and started


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt inside a `with` block, so that files are closed and a message is printed."""
    if signal.getsignal(signal.SIGINT) is not _leave:  # not a command line, or already inside
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _leave)


def interrupted(error: BaseException) -> bool:
    """Whether an error was caused by Ctrl-C, which libraries turn into other errors."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


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
