"""Small helpers: errors, suggestions for misspelt names, tables in Markdown, the log of command lines."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

logging.getLogger("tofu_sd").addHandler(logging.NullHandler())


class RegistrationError(ValueError):
    """A name under which nothing can be registered: it is taken, or no identifier."""


class InvalidResultError(ValueError):
    """A matcher or reduction from outside of this package returned something invalid."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ' (did you mean …?)' with the most similar of the known names, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Returns the lines of a table in Markdown.

    Args:
        titles: of the columns.
        rows: the cells of each row.
        left: how many columns, from the first, are left-aligned; the others are right-aligned.
    """
    rule = "|" + "---|" * left + "--:|" * (len(titles) - left)
    return [f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def same_source(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions are defined in the same file. A module that is loaded again may register its own again."""
    files = [getattr(function, "__code__", None) and function.__code__.co_filename for function in (one, other)]
    return one is other or (files[0] is not None and files[0] == files[1])


def show_log(level: int = logging.INFO) -> None:
    """Shows what is patched: sets the level of the logger "tofu_sd", and prints to stderr if no handler does.

    For programs: command lines and web UIs. A level or a handler that the user has set stays.
    """
    logger = logging.getLogger("tofu_sd")
    if logger.level == logging.NOTSET:
        logger.setLevel(level)
    handlers = [*logger.handlers, *(logging.getLogger().handlers if logger.propagate else ())]
    if all(isinstance(handler, logging.NullHandler) for handler in handlers):
        logger.addHandler(logging.StreamHandler())
