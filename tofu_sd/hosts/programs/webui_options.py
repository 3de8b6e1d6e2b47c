"""The options of an image in the web UIs: read from the screen, a request or a grid, and saved with the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...config import TokenFusionConfig
from .ui_options import OPTIONS, Option, config_of, parse_values

RATIO = OPTIONS[0]
ENABLED = Option("enabled", True, "Whether tokens are merged.")
HIRES = replace(RATIO, name="hires_ratio", tooltip="The ratio in the second pass of Hires. fix.")
# requests give them in this order, after "enabled"; programs rely on it, so new ones are appended
INPUTS = (RATIO, HIRES, *OPTIONS[1:])
ALWAYS_SAVED = (RATIO.name, "early", "late")  # the others only if they are not the default
AXES = "tofu_sd_axes"


def requested_values(p: Any, args: tuple[Any, ...]) -> dict[str, Any] | None:
    """Returns the options of an image, including the axes of a grid; None where Token Fusion is off.

    Args:
        p: the program's request.
        args: the values of the screen or of an API request. A mapping of names as the first may replace all others. A
            request that is answered before the scripts are ready has none.

    Raises:
        ValueError, TypeError: see `parse_values`.
    """
    if args and isinstance(args[0], Mapping):
        values = dict(args[0])
        enabled = values.pop(ENABLED.name, ENABLED.default)
    else:
        enabled, *by_position = args or (False,)
        values = dict(zip((option.name for option in INPUTS), by_position, strict=False))
    axes = getattr(p, AXES, {})
    if not axes and (enabled is None or not ENABLED.parse(enabled)):
        return None
    return parse_values(INPUTS, {name: value for name, value in values.items() if value is not None} | axes)


def pass_configs(values: Mapping[str, Any]) -> tuple[TokenFusionConfig, TokenFusionConfig]:
    """Returns the configurations of the first pass and of Hires. fix. ValueError for a value out of range."""
    values = dict(values)
    hires_ratio = values.pop(HIRES.name)
    first = config_of(values)
    try:
        return first, replace(first, ratio=hires_ratio)
    except ValueError as error:
        raise ValueError(f"hires_{error}") from None  # only the ratio differs


def saved_name(option: Option) -> str:
    """Returns the name under which an option is saved with an image."""
    return f"ToFu {option.name.replace('_', ' ')}"


def saved_parameters(values: Mapping[str, Any], hires: bool) -> dict[str, Any]:
    """Returns what is saved with an image, as `PASTED` reads it."""
    return {
        saved_name(option): values[option.name]
        for option in INPUTS
        if (hires if option is HIRES else option.name in ALWAYS_SAVED or values[option.name] != option.default)
    }


def _reader(option: Option) -> Callable[[Mapping[str, Any]], Any]:
    def pasted(saved: Mapping[str, Any]) -> Any:
        if saved_name(RATIO) not in saved or (option is HIRES and saved_name(HIRES) not in saved):
            return None  # leaves the field unchanged
        value = option.parse(saved.get(saved_name(option), option.default))
        return None if option.names and value not in option.names else value

    return pasted


# a function for each option: the buttons between the tabs identify fields by it
PASTED = {option.name: _reader(option) for option in INPUTS}


def was_on(saved: Mapping[str, Any]) -> bool:
    """Whether Token Fusion was on in an image with these saved parameters."""
    return saved_name(RATIO) in saved


def clear_saved(p: Any) -> None:
    """Removes all parameters of Token Fusion from those that are saved with an image."""
    for name in map(saved_name, INPUTS):
        p.extra_generation_params.pop(name, None)
