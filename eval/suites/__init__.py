"""Named sets of options of eval.run, a JSON file each, so that others can repeat a run.

`about` describes it; the rest are options of the command. Options on the command line override them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tofu_sd.utils import did_you_mean

from .. import EvalError
from ..common.files import read_json

VALUES = (str, int, float)  # bool is an int
NAMES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.json")))


def load(name: str) -> dict[str, Any]:
    """The options of a suite, by their names in the parser. EvalError for an unknown suite."""
    if name not in NAMES:
        raise EvalError(f"unknown suite {name!r}{did_you_mean(name, NAMES)}; known: {', '.join(NAMES)}")
    found = read_json(Path(__file__).parent / f"{name}.json")
    if not isinstance(found, dict) or not all(isinstance(value, VALUES) for value in found.values()):
        raise EvalError(f"the suite {name!r} is damaged: {name}.json must be an object of texts and numbers")
    return found
