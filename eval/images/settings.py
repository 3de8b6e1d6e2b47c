"""What an image depends on, and the output folder that belongs to it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..methods.method import Method
from .requests import Request

DRAWING = 1  # to be raised when `draw` draws otherwise than before
RUNS = "runs"  # the folder of what is told of each run that drew pictures


@dataclass(frozen=True)
class Settings:
    """What must be the same for two pictures to be compared."""

    model: str
    pipeline: str  # classes and a hash of settings and weights
    prompts: str
    prompts_hash: str
    seed: int
    size: int
    steps: int
    guidance: float | None  # None: the pipeline's default
    batch: int
    device: str
    dtype: str
    attention: str  # the classes of the denoiser's attention processors
    torch: str
    diffusers: str
    transformers: str
    tokenizers: str | None = None  # a hash of how prompts are read; older runs do not tell it
    variant: str | None = None  # of the weights' files, as fp16; None: the plain ones


def identity(settings: Settings, method: Method) -> str:
    """A hash of everything but the request that decides a picture."""
    later = ("tokenizers", "variant")  # fields that older runs do not have
    decides = {name: value for name, value in asdict(settings).items() if name not in later or value is not None}
    told = json.dumps([DRAWING, decides, method.identity], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _asked(settings: Settings, method: Method, request: Request) -> dict[str, Any]:
    """What the record of this picture has to say."""
    return {"prompt": request.prompt, "seed": request.seed + method.seed_shift, "made": identity(settings, method)}


def _sha(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
