"""What the command lines of eval share."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from tqdm import tqdm

from tofu_sd.interrupts import STOPPED, interrupted, interruptible
from tofu_sd.utils import did_you_mean

from .. import EvalError
from .files import PASSING, explain

T = TypeVar("T")


class Main(Protocol):
    """A program: its arguments, sys.argv's where none are given, and its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def command(goes_on: bool) -> Callable[[Callable[[Sequence[str]], int]], Main]:
    """Makes a program of what takes its arguments: it ends with 2, after one line, where what was asked for cannot be,
    and with 130 where it was interrupted.

    goes_on: whether the same command, given again, takes up what was begun; what stops it then says so, unless the same
    command would fail again.
    """  # fmt: skip
    again = "; the same command goes on from here" if goes_on else ""

    def made(work: Callable[[Sequence[str]], int]) -> Main:
        @wraps(work)
        def main(argv: Sequence[str] | None = None) -> int:
            try:
                with interruptible():
                    return _run(work, sys.argv[1:] if argv is None else list(argv))
            except BrokenPipeError:  # who reads has had enough, as `head` does
                _drop_output()
                return 141  # as a shell says of what SIGPIPE ended
            except (EvalError, OSError, KeyboardInterrupt) as error:
                if interrupted(error):
                    print(f"\nstopped{again}", file=sys.stderr)  # below the ^C of a terminal
                    return STOPPED
                resumes = again if isinstance(error, OSError) and error.errno in PASSING else ""
                told = explain(error) if isinstance(error, OSError) else str(error)
                print(f"error: {told}{resumes}", file=sys.stderr)
            return 2

        return main

    return made


def _run(work: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit code of a program, once all that it printed has left."""
    for argument in argv:
        if not argument.isprintable() and re.search("[\ud800-\udfff]", argument):
            raise EvalError(f"the argument {argument!a} is not UTF-8; give another name")
    try:
        return work(argv)
    finally:  # also after --help, which ends by SystemExit
        if sys.stdout is not None:  # None where the shell closed it
            try:
                sys.stdout.flush()
            except OSError:
                _drop_output()  # Python flushes once more when it ends
                raise


def _drop_output() -> None:
    """Sends whatever is still printed nowhere: its reader is gone, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Parser(argparse.ArgumentParser):
    """One line of what is wrong, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise EvalError(f"{message} (see --help)")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the defaults that are values; the others are said in words. Examples keep their lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def said(parser: Parser, argv: Sequence[str]) -> set[str]:
    """The names of the options that are typed, whatever their values."""
    unsaid = object()  # argparse leaves an attribute alone that is there and not typed
    names = vars(parser.parse_args(argv))
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unsaid))))
    return {name for name, value in typed.items() if value is not unsaid}


def written(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def at_least(least: int, most: int = 2**31) -> Any:
    """A whole number from `least` to `most`, as an argument's type."""

    def whole_number(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return whole_number


def as_path(text: str) -> Path:
    """The path of a file or folder, as an argument's type. One without a name, as '.', gets it from its folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a path; give the name of a file or folder")
    path = Path(text)
    return path if path.name else path.absolute()


def whole_numbers(text: str) -> list[int]:
    """'8,12' as [8, 12], as an argument's type."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, nor several with commas between")
    return [int(part) for part in text.split(",")]


def finite(text: str) -> float:
    """A finite number, as an argument's type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def choices(text: str, known: Any, what: str) -> list[str]:
    """The names of a list such as "a,b", each of them known; EvalError naming the first that is not."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise EvalError(f"unknown {what} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return names


def working(work: Sequence[T], what: str, quiet: bool = False) -> Iterable[T]:
    """Each of `work`, with a bar on stderr; in a file, a line of it every while."""
    often = 0.1 if sys.stderr.isatty() else 15
    bar: Iterable[T] = tqdm(work, what, disable=quiet or not work, file=sys.stderr, mininterval=often)
    return bar


@contextmanager
def quiet_patches() -> Iterator[None]:
    """tofu_sd reports each patch it applies; here that is once a batch."""
    logger = logging.getLogger("tofu_sd")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
