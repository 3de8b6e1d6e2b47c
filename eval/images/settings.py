"""What an image depends on, and where it lies in the output folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..common.schema_changes import BASELINE_NAMES
from ..methods.method import Method
from .requests import Request

IMAGE_VERSION = 1  # raise it when `generate_batch` generates other images than before
RUNS = "runs"  # the folder with the metadata of each run that generated images


@dataclass(frozen=True)
class Settings:
    """What must be the same for two images to be compared."""

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
    tokenizers: str | None = None  # a hash of how prompts are tokenized; older runs do not have it
    variant: str | None = None  # of the weights' files, such as fp16; None: the plain ones


def config_hash(settings: Settings, method: Method) -> str:
    """Hash of everything except the request that decides an image."""
    later = ("tokenizers", "variant")  # fields that older runs do not have
    fields = {name: value for name, value in asdict(settings).items() if name not in later or value is not None}
    text = json.dumps([IMAGE_VERSION, fields, method.identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def expected_record(settings: Settings, method: Method, request: Request) -> dict[str, Any]:
    """The entries that the record of this image must have."""
    return {
        "prompt": request.prompt,
        "seed": request.seed + method.seed_shift,
        "config_hash": config_hash(settings, method),
    }


def image_dir(out: Path, slug: str) -> Path:
    """The folder of a method's images. Folders of schema 1 keep their names, such as `full` for the baseline's."""
    earlier = next((old for old, new in BASELINE_NAMES.items() if new == slug and (out / old).is_dir()), slug)
    return out / slug if (out / slug).is_dir() else out / earlier


def image_path(out: Path, slug: str, image_id: str) -> Path:
    """The file of an image."""
    return image_dir(out, slug) / f"{image_id}.png"


def record_path(out: Path, slug: str, image_id: str) -> Path:
    """The file of an image's record."""
    return image_dir(out, slug) / f"{image_id}.json"


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a file; None where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
