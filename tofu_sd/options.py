"""Describes configuration fields once: type, limits, choices and help, for checks, slugs, tables and UIs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from .utils import did_you_mean, markdown_table


@dataclass(frozen=True)
class OptionSpec:
    """What a field of a configuration may hold.

    Args:
        kind: "integer", "number", "switch" (True or False), "choice" or "function".
        help: what the option does, in one sentence.
        low, high: limits of a number, both included; `above` excludes `low`.
        choices: returns the allowed names; a function, because names may be registered later.
        words: words that are allowed instead of a number, such as "auto".
        optional: whether None is allowed.
        mark: prefix of a value other than the default in slugs; "" leaves it out.
        unit: what a number counts, for messages.
        group: heading in tables of options.
    """

    kind: str
    help: str
    low: float | None = None
    high: float | None = None
    above: bool = False
    choices: Callable[[], Iterable[str]] = tuple
    words: tuple[str, ...] = ()
    optional: bool = False
    mark: str = ""
    unit: str = ""
    group: str = ""

    @property
    def requirement(self) -> str:
        """What a value must be, for messages and tables: "None or an integer >= 1"."""
        if self.kind == "switch":
            return "True or False"
        alternatives = [*(["None"] if self.optional else []), *(repr(word) for word in self.words)]
        if self.kind == "choice":
            alternatives += [repr(name) for name in self.choices()]
        elif self.kind == "function":
            alternatives += [*(repr(name) for name in self.choices()), "a function"]
        else:
            alternatives.append(f"{'an integer' if self.kind == 'integer' else 'a number'}{self._limits}")
        return " or ".join([", ".join(alternatives[:-1]), alternatives[-1]] if len(alternatives) > 1 else alternatives)

    @property
    def _limits(self) -> str:
        low, high = (f"{limit:.16g}" if limit is not None else "" for limit in (self.low, self.high))
        if self.low is None:
            return ""
        if self.high is None:
            return f" {'>' if self.above else '>='} {low}{self.unit}"
        return f" from {low} to {high}{self.unit}"

    def accepts(self, value: Any) -> bool:
        """Whether a value is of this type and within the limits."""
        if value is None:
            return self.optional
        if self.kind == "switch":
            return isinstance(value, bool)
        if self.kind == "choice":
            return isinstance(value, str) and value in self.choices()
        if isinstance(value, str):
            return value in self.words
        if isinstance(value, bool) or not isinstance(value, Integral if self.kind == "integer" else Real):
            return False
        if math.isnan(value) or (self.low is not None and (value < self.low or (self.above and value == self.low))):
            return False
        return value <= self.high if self.high is not None else value < math.inf

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError, naming the value and what it must be, where it is not accepted."""
        if not self.accepts(value):
            known = self.choices() if self.kind == "choice" else self.words
            hint = did_you_mean(value, known) if isinstance(value, str) and known else ""
            raise ValueError(f"{name} is {value!r}{hint}; it must be {self.requirement}")


def option(default: Any, kind: str, help: str, **spec: Any) -> Any:
    """Makes a dataclass field that carries an OptionSpec."""
    return field(default=default, metadata={"option": OptionSpec(kind, help, **spec)})


def specs_of(config: Any) -> dict[str, OptionSpec]:
    """Returns the specification of each field of a dataclass made of `option` fields, in order."""
    return {one.name: one.metadata["option"] for one in fields(config)}


def defaults_of(config: Any) -> dict[str, Any]:
    """Returns the default of each such field."""
    return {one.name: one.default for one in fields(config)}


def check_options(config: Any, *, skip: tuple[str, ...] = ()) -> None:
    """Checks every field of a configuration but functions and those to skip. ValueError for a value out of range."""
    for name, spec in specs_of(config).items():
        if spec.kind != "function" and name not in skip:
            spec.check(name, getattr(config, name))


def describe_options(config: Any) -> str:
    """Returns tables of all options in Markdown: name, default, values, meaning; one for each group."""
    rows: dict[str, list[list[str]]] = {}
    for name, spec in specs_of(config).items():
        default = defaults_of(config)[name]
        shown = getattr(default, "__name__", default)
        rows.setdefault(spec.group, []).append([f"`{name}`", f"`{shown}`", spec.requirement, spec.help])
    titles = ["option", "default", "values", "what it does"]
    tables = ["\n".join([f"**{group}**", "", *markdown_table(titles, own, left=4)]) for group, own in rows.items()]
    return "\n\n".join(tables)
