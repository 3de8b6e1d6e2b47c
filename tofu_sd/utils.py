"""Small helpers for names: suggestions for misspelt ones, and who owns a registered one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean …?)' for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def same_source(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions are defined in the same file: a module that was loaded again may register its own again."""
    files = [getattr(function, "__code__", None) and function.__code__.co_filename for function in (one, other)]
    return one is other or (files[0] is not None and files[0] == files[1])
