"""Cache of what was measured: OUT/measured holds it, by the content of the images.

After an interrupt, or with one more method or metric, only what is new is computed.
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


def cached_metrics(
    out: Path, content: Sequence[str], wanted: Mapping[str, Callable[[], Tensor]], reference: Path | None = None
) -> dict[str, Tensor]:
    """The values of `wanted` by name, from the cache or computed and stored.

    Args:
        out: the folder of the run.
        content: what the values depend on, such as hashes of the images.
        wanted: how each value is computed; its name contains metric, implementation and weights.
        reference: the folder of another run, whose cache is read too.
    """
    name = hashlib.sha256(json.dumps([_versions(), *content]).encode()).hexdigest()[:24]
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
    except (OSError, SafetensorError):  # missing or incomplete
        return {}


@cache
def _versions() -> list[str]:
    """Changes with this package's metrics and with torch. (In float32 devices agree to all printed digits.)"""
    return [digest(*sorted(Path(__file__).parent.glob("*.py")), Path(classifier.__file__)), str(torch.__version__)]
