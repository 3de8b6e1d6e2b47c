"""What was measured of a picture is not measured again: OUT/measured holds it, by the content of the pictures.

A run that is stopped while it measures, one more method, or one more metric, costs only what is new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tofu_sd.demo import classifier

from ..common.files import digest, write

FOLDER = "measured"


def recall(
    out: Path, content: Sequence[str], wanted: Mapping[str, Callable[[], Tensor]], reference: Path | None = None
) -> dict[str, Tensor]:
    """`wanted` by name, each as it was found of pictures of this very content, or computed and kept.

    content: all that the figures depend on beside their names, which tell metric, implementation and weights.
    reference: another run's folder, which may have measured them.
    """
    name = hashlib.sha256(json.dumps([_circumstances(), *content]).encode()).hexdigest()[:24]
    path = out / FOLDER / f"{name}.safetensors"
    found = _read(path)
    if reference is not None and not wanted.keys() <= found.keys():
        found = _read(reference / FOLDER / path.name) | found
    new = {key: compute() for key, compute in wanted.items() if key not in found}
    if new:
        found |= {key: value.contiguous() for key, value in new.items()}
        write(path, save(found))
    return {key: found[key] for key in wanted}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):  # not there, or not whole
        return {}


@cache
def _circumstances() -> list[str]:
    """Changes with what this package measures by, and torch; in float32 or better devices agree to all digits shown."""
    return [digest(*sorted(Path(__file__).parent.glob("*.py")), Path(classifier.__file__)), str(torch.__version__)]
