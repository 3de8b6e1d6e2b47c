"""What programs with a screen ask of a person: the options of Token Fusion, how each is entered, and what it does.

Said once for all of them. -1 stands for None where a number is entered, 0 for no window.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import TokenFusionConfig
from ..core.reductions import get_reduction
from ..recipes import RECIPES
from ..utils import did_you_mean


@dataclass(frozen=True)
class Option:
    """A number from `least` to `most`, a switch, or one of some names. advanced: hidden until it is asked for."""

    name: str
    default: Any
    tooltip: str
    least: float | None = None
    most: float | None = None
    step: float | None = None
    names: tuple[str, ...] = ()
    advanced: bool = False

    @property
    def label(self) -> str:
        return self.name.replace("_", " ").capitalize()

    def read(self, value: Any) -> Any:
        """A value as it comes from a screen, a file or a request, in the type of the default.

        ValueError for one that is none; whether it lies between the limits is TokenFusion's to say.
        """
        kind = type(self.default)
        if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        try:
            read = kind(float(value)) if kind is int else kind(value)
            if kind is bool and value not in (0, 1):
                raise ValueError
            if kind is int and read != float(value):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            what = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a name")
            raise ValueError(f"{self.name} is {value!r}; it must be {what}") from None
        return read


REDUCE = ("prune", "mean", "mlerp")
BIG = 2**31 - 1
# none is called seed: ComfyUI would put a second widget beside it
OPTIONS = (
    Option("ratio", 0.5, "Share of the tokens that are fused away. 0 leaves the picture as it is.", 0.0, 0.75, 0.01),
    Option(
        "early", "prune", "How tokens are fused on the way down: prune keeps one of each group.", names=REDUCE,
        advanced=True,
    ),
    Option(
        "late", "mlerp", "How they are fused after that: mlerp averages and keeps the largest norm.", names=REDUCE,
        advanced=True,
    ),
    Option(
        "depth_split", -1, "Blocks before this one are early. -1: the whole way down.", -1, 100, 1, advanced=True,
    ),
    Option(
        "proportional", False,
        "A fused token gets the attention of all it stands for: much nearer to the full picture; best with mean twice.",
        advanced=True,
    ),
    Option("kv_only", False, "Fuse keys and values alone: nearer to the full picture, and slower.", advanced=True),
    Option(
        "levels", 1,
        "How many resolutions are fused, from the highest one with attention. The middle block never is: guidance "
        "(SAG, SEG, PAG) acts there.",
        1, 4, 1, advanced=True,
    ),
    Option("start_percent", 0.0, "Fuse from this part of the sampling on.", 0.0, 1.0, 0.001, advanced=True),
    Option("end_percent", 1.0, "Fuse up to this part of the sampling.", 0.0, 1.0, 0.001, advanced=True),
    Option(
        "grid_seed", -1, "-1: fixed destinations. Else drawn at every step, alike for the same seed.", -1, BIG, 1,
        advanced=True,
    ),
    Option(
        "window", 0, "Look for like tokens within squares of so many cells: faster. 0: in the whole map.", 0, 64, 1,
        advanced=True,
    ),
    Option(
        "match_interval", 1, "Match tokens at every so many steps: faster, less exact.", 1, 20, 1, advanced=True,
    ),
    Option(
        "share_across_blocks", False, "Look for like tokens once for all blocks of a resolution: faster, less exact.",
        advanced=True,
    ),
    Option(
        "min_tokens", 0, "Leave maps of fewer tokens alone, where fusing does not pay.", 0, 2**20, 64, advanced=True,
    ),
)  # fmt: skip
CUSTOM = "custom"
PRESETS = ("tofu", "tofu-fast", "faithful", "tome")
METHOD = ("early", "late", "depth_split", "proportional", "kv_only", "window")  # the options that a preset sets
PRESET = Option(
    "preset", "tofu",
    "faithful stays nearest to the full picture, at the speed of tofu-fast; tofu and tome are the papers' methods. It "
    f"sets {', '.join(METHOD)}, whose inputs count with custom alone; all others always count.",
    names=(*PRESETS, CUSTOM),
)  # fmt: skip


def read(options: Iterable[Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every option by its name, the default where it has none.

    ValueError for a value of another type, TypeError for an unknown option.
    """
    known = {option.name: option for option in options}
    for name in values:
        if name not in known:
            raise TypeError(f"unknown option {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return {name: option.read(values.get(name, option.default)) for name, option in known.items()}


def fusion_of(values: Mapping[str, Any]) -> TokenFusionConfig:
    """What is asked for. An option that is not named is the default.

    ValueError for a value of another type or out of range, TypeError for an unknown option.
    """
    told = read(OPTIONS, values)
    depth_split, grid_seed = told.pop("depth_split"), told.pop("grid_seed")
    return TokenFusionConfig.of(
        told.pop("ratio"),
        depth_split=None if depth_split < 0 else depth_split,
        seed=None if grid_seed < 0 else grid_seed,
        window=told.pop("window") or None,
        start=told.pop("start_percent"),
        end=told.pop("end_percent"),
        **told,
    )


def values_of(config: TokenFusionConfig) -> dict[str, Any]:
    """The options as they are entered: `fusion_of` backwards."""
    values = {option.name: getattr(config, option.name, None) for option in OPTIONS}
    return values | {
        "early": get_reduction(config.early).__name__,
        "late": get_reduction(config.late).__name__,
        "depth_split": -1 if config.depth_split is None else config.depth_split,
        "grid_seed": -1 if config.seed is None else config.seed,
        "window": config.window or 0,
        "start_percent": float(config.start),
        "end_percent": float(config.end),
    }


def chosen(preset: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the values with those of a preset in their place, the names of those that were set otherwise and do not count).

    ValueError for an unknown preset.
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
