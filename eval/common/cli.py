"""Command lines: options, progress, exit codes."""

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
from tofu_sd.utils import InvalidResultError, did_you_mean

from .. import EvalError
from .files import TEMPORARY, explain

T = TypeVar("T")


class Main(Protocol):
    """A program: takes arguments, by default sys.argv's, and returns its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def command(resumes: bool) -> Callable[[Callable[[Sequence[str]], int]], Main]:
    """Decorator that makes a program of a function of its arguments.

    It exits with 2, after one line, for options that cannot be fulfilled and for an invalid result of a user's matcher
    or reduction, and with 130 after Ctrl-C.

    Args:
        resumes: whether the same command resumes an interrupted run. The message of what stopped it then says so,
            unless the same command would fail again.
    """
    hint = "; the same command resumes" if resumes else ""

    def decorate(work: Callable[[Sequence[str]], int]) -> Main:
        @wraps(work)
        def main(argv: Sequence[str] | None = None) -> int:
            try:
                with interruptible():
                    return _run(work, sys.argv[1:] if argv is None else list(argv))
            except BrokenPipeError:  # the reader closed the pipe, as `head` does
                _drop_output()
                return 141  # the exit code of a shell for SIGPIPE
            except (EvalError, InvalidResultError, OSError, KeyboardInterrupt) as error:
                if interrupted(error):
                    print(f"\nstopped{hint}", file=sys.stderr)  # below the ^C of a terminal
                    return STOPPED
                is_temporary = isinstance(error, OSError) and error.errno in TEMPORARY
                message = explain(error) if isinstance(error, OSError) else str(error)
                print(f"error: {message}{hint if is_temporary else ''}", file=sys.stderr)
            return 2

        return main

    return decorate


def _run(work: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a program and flushes stdout; returns its exit code."""
    for argument in argv:
        if not argument.isprintable() and re.search("[\ud800-\udfff]", argument):
            raise EvalError(f"the argument {argument!a} is not UTF-8; give another name")
    try:
        return work(argv)
    finally:  # also after --help, which raises SystemExit
        if sys.stdout is not None:  # None where the shell closed it
            try:
                sys.stdout.flush()
            except OSError:
                _drop_output()  # Python flushes once more when it ends
                raise


def _drop_output() -> None:
    """Discards further output: its reader closed the pipe, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Parser(argparse.ArgumentParser):
    """Raises an EvalError for wrong arguments, without printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise EvalError(f"{message} (see --help)")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds defaults that are values; the help of the other options describes theirs. Examples keep their lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def explicit_options(parser: Parser, argv: Sequence[str]) -> set[str]:
    """The names of the options on the command line, whatever their values."""
    absent = object()  # argparse keeps an existing attribute whose option is not on the command line
    names = vars(parser.parse_args(argv))
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent))))
    return {name for name, value in typed.items() if value is not absent}


def flag(name: str) -> str:
    """An option as it is typed: '--map-step' for 'map_step'."""
    return f"--{name.replace('_', '-')}"


def integer_from(minimum: int, maximum: int = 2**31) -> Any:
    """Type of an argument: an integer from `minimum` to `maximum`."""

    def parse_integer(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {minimum} to {maximum}")
        return int(text)

    return parse_integer


def as_path(text: str) -> Path:
    """Type of an argument: the path of a file or folder. One without a name, such as '.', is made absolute."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a path; give the name of a file or folder")
    path = Path(text)
    return path if path.name else path.absolute()


def integers(text: str) -> list[int]:
    """Type of an argument: '8,12' becomes [8, 12]."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer, nor several with commas between")
    return [int(part) for part in text.split(",")]


def finite(text: str) -> float:
    """Type of an argument: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def choices(text: str, known: Any, what: str) -> list[str]:
    """The names in a list such as "a,b". EvalError for an unknown one. what: the kind of name, for the message."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise EvalError(f"unknown {what} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return names


def progress(work: Sequence[T], what: str, quiet: bool = False) -> Iterable[T]:
    """Iterates over `work` with a progress bar on stderr; in a file, a line of it every 15 seconds."""
    interval = 0.1 if sys.stderr.isatty() else 15
    bar: Iterable[T] = tqdm(work, what, disable=quiet or not work, file=sys.stderr, mininterval=interval)
    return bar


@contextmanager
def quiet_patches() -> Iterator[None]:
    """Inside, tofu_sd does not log the patches that it applies, here one for each batch."""
    logger = logging.getLogger("tofu_sd")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
