"""The options of Token Fusion on a program's screen, derived from the fields of TokenFusionConfig.

A screen has no None: -1 stands for it where a number is entered, and 0 for no window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...config import TokenFusionConfig
from ...core.reductions import get_reduction
from ...options import defaults_of, specs_of
from ...recipes import RECIPES
from ...utils import did_you_mean


@dataclass(frozen=True)
class Option:
    """An input on a screen: a number, a switch or one of some names.

    Args:
        name: its name.
        default: its default, whose type is that of its values.
        tooltip: what it does.
        low, high, step: limits and step of a number, both limits included.
        names: the names to choose from.
        advanced: whether it is hidden until the user opens the advanced options.
    """

    name: str
    default: Any
    tooltip: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    names: tuple[str, ...] = ()
    advanced: bool = False

    @property
    def label(self) -> str:
        return self.name.replace("_", " ").capitalize()

    def parse(self, value: Any) -> Any:
        """Returns a value from a screen, a file or a request in the type of the default.

        The limits are checked by TokenFusionConfig.

        Raises:
            ValueError: the value has another type.
        """
        kind = type(self.default)
        if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        try:
            parsed = kind(float(value)) if kind is int else kind(value)
            if kind is bool and value not in (0, 1):
                raise ValueError
            if kind is int and parsed != float(value):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            what = {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "a name")
            raise ValueError(f"{self.name} is {value!r}; it must be {what}") from None
        return parsed


@dataclass(frozen=True)
class _Screen:
    """How a field of TokenFusionConfig is shown where that differs from the field itself.

    Args:
        field: the field.
        name: its name on the screen, if another.
        none: the number or name that stands for None, or for `word`.
        word: the word of the field that -1 stands for.
        high: the largest value that the screen offers, where the field has no limit.
        step: step of a slider.
        note: more text for the tooltip.
    """

    field: str
    name: str = ""
    none: int | str | None = None
    word: str | None = None
    high: float | None = None
    step: float | None = 1
    note: str = ""

    def option(self) -> Option:
        spec, default = specs_of(TokenFusionConfig)[self.field], defaults_of(TokenFusionConfig)[self.field]
        number = spec.kind in ("integer", "number")
        return Option(
            self.name or self.field,
            self.none if default == self.word else default,
            self._tooltip(spec.help),
            low=(self.none if isinstance(self.none, int) else spec.low) if number else None,
            high=(self.high if spec.high is None or self.field == "ratio" else spec.high) if number else None,
            step=self.step if number else None,
            names=(*([self.none] if isinstance(self.none, str) else []), *spec.choices()),
            advanced=self.field != "ratio",
        )

    def _tooltip(self, help: str) -> str:
        """Returns the help without what a screen does not have: None, and measured values ('auto')."""
        sentences = [text for text in re.split(r"(?<=\.)(?<!Eq\.) ", help) if "'auto'" not in text]
        text = re.sub(r"\bNone\b", str(self.none), " ".join([*sentences, *([self.note] if self.note else [])]))
        return text.replace("`", "")


# none is called seed: ComfyUI would put a second widget beside it
_SCREENS = (
    _Screen("ratio", high=TokenFusionConfig().max_ratio, step=0.01),
    _Screen("early"),
    _Screen("late"),
    _Screen("depth_split", none=-1, high=100),
    _Screen("proportional"),
    _Screen("kv_only"),
    _Screen("levels", high=4, note="The middle block is never merged: guidance (SAG, SEG, PAG) acts there."),
    _Screen("start", "start_percent", step=0.001),
    _Screen("end", "end_percent", step=0.001),
    _Screen("seed", "grid_seed", none=-1),
    _Screen("window", none=0, high=64),
    _Screen("match_interval", high=20),
    _Screen("share_across_blocks"),
    _Screen(
        "min_tokens",
        none=-1,
        word="auto",
        high=2**20,
        note="-1 skips those on which merging is not faster, which is measured once on this machine.",
    ),
    _Screen("kv_early", none="same"),
    _Screen("kv_late", none="same"),
)
OPTIONS = tuple(screen.option() for screen in _SCREENS)
CUSTOM = "custom"
PRESETS = ("tofu", "tofu-fast", "faithful", "asymmetric", "tome")
METHOD = ("early", "late", "kv_early", "kv_late", "depth_split", "proportional", "kv_only", "window")  # set by a preset
PRESET = Option(
    "preset",
    "tofu",
    "asymmetric changes the image least; tofu-fast and faithful compare tokens within windows, which is faster and "
    "less exact; tofu and tome are the papers' methods. A "
    f"preset sets {', '.join(METHOD)}; their inputs are used only with custom. All other inputs are always used.",
    names=(*PRESETS, CUSTOM),
)


def parse_values(options: Iterable[Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the value of every option by name; the default where it is missing.

    Raises:
        ValueError: a value of another type.
        TypeError: an unknown option.
    """
    known = {option.name: option for option in options}
    for name in values:
        if name not in known:
            raise TypeError(f"unknown option {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return {name: option.parse(values.get(name, option.default)) for name, option in known.items()}


def config_of(values: Mapping[str, Any]) -> TokenFusionConfig:
    """Returns the configuration of values as a screen has them; a missing one is the default.

    Raises:
        ValueError: a value of another type or out of range.
        TypeError: an unknown option.
    """
    parsed = parse_values(OPTIONS, values)
    fields: dict[str, Any] = {}
    for screen, option in zip(_SCREENS, OPTIONS, strict=True):
        value = parsed[option.name]
        none = screen.none
        # any negative number is None where -1 is
        is_none = none is not None and (value == none or (isinstance(none, int) and value <= none < 0))
        fields[screen.field] = screen.word if is_none else value
    return TokenFusionConfig.of(fields.pop("ratio"), **fields)


def values_of(config: TokenFusionConfig) -> dict[str, Any]:
    """Returns a configuration as a screen has it: the inverse of `config_of`."""
    values = {}
    for screen, option in zip(_SCREENS, OPTIONS, strict=True):
        value = getattr(config, screen.field)
        if callable(value):
            value = get_reduction(value).__name__
        values[option.name] = screen.none if value == screen.word else type(option.default)(value)
    return values


def apply_preset(preset: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Replaces the values that a preset sets.

    Returns:
        (the values, the names of those that were entered differently and are ignored).

    Raises:
        ValueError: an unknown preset.
    """
    if preset == CUSTOM:
        return dict(values), []
    if preset not in PRESETS:
        known = (*PRESETS, CUSTOM)
        raise ValueError(f"unknown preset {preset!r}{did_you_mean(str(preset), known)}; known: {', '.join(known)}")
    defaults = {option.name: option.default for option in OPTIONS}
    method = {name: value for name, value in values_of(RECIPES[preset]).items() if name in METHOD}
    ignored = [name for name in METHOD if values.get(name, defaults[name]) not in (defaults[name], method[name])]
    return {**values, **method}, ignored
