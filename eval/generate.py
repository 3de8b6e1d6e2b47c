"""Request × method -> a PNG and its record. Stopped and started again, it goes on where it was.

    OUT/settings.json           what holds for every picture in the folder
    OUT/<method's key>/<id>.png the picture, and beside it <id>.json, its record

The batches are fixed by the list of requests, and the methods take turns on each: what one method's pictures met on
the machine, the others' met too.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import logging
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from tofu_sd.calibrate import synchronize

from . import EvalError
from .files import read_json, write, write_json
from .methods import Method
from .prompts import Request

WARM_UP_STEPS = 2


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


def claim(out: Path, settings: Settings) -> None:
    """Makes `out` a folder of pictures under these settings, or refuses one that holds pictures under others."""
    new = asdict(settings)
    if out.exists() and not out.is_dir():
        raise EvalError(f"--out {out.name}: there is a file of that name")
    old = read_json(out / "settings.json")
    if not isinstance(old, dict):
        if out.exists() and any(out.iterdir()):
            raise EvalError(f"--out {out.name}: the folder is not empty and holds no settings.json; give another")
        write_json(out / "settings.json", new)
        return
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) != new.get(name):
            raise EvalError(
                f"--out {out.name}: its pictures were made with {name} {old.get(name)!r}, this run has "
                f"{new.get(name)!r}; give another folder or delete it"
            )


def identity(settings: Settings, method: Method) -> str:
    """A hash of everything but the request that decides a picture."""
    return hashlib.sha256(json.dumps([asdict(settings), method.identity], sort_keys=True).encode()).hexdigest()[:16]


def record_of(out: Path, settings: Settings, method: Method, request: Request) -> dict[str, Any] | None:
    """The record of a finished picture; None where it is missing, damaged or was made otherwise."""
    record = read_json(out / method.key / f"{request.id}.json")
    asked = {"prompt": request.prompt, "seed": request.seed + method.seed_shift, "made": identity(settings, method)}
    if not isinstance(record, dict) or any(record.get(name) != value for name, value in asked.items()):
        return None
    try:
        content = (out / method.key / f"{request.id}.png").read_bytes()
    except OSError:
        return None
    return record if hashlib.sha256(content).hexdigest() == record.get("sha256") else None


def generate(
    pipe: Any,
    requests: Sequence[Request],
    methods: Sequence[Method],
    settings: Settings,
    out: Path,
) -> int:
    """Makes every picture that is not there yet. Returns how many it made."""
    batches = [requests[i : i + settings.batch] for i in range(0, len(requests), settings.batch)]
    turns = [
        (batch, [m for m in methods if any(record_of(out, settings, m, request) is None for request in batch)])
        for batch in batches
    ]
    turns = [(batch, due) for batch, due in turns if due]
    pictures = sum(len(batch) * len(due) for batch, due in turns)
    run = uuid.uuid4().hex[:12]  # times are compared within a run only
    with (
        quiet_patches(),
        tqdm(
            total=pictures,
            unit="img",
            disable=not pictures,
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 15,
        ) as progress,
    ):
        progress.set_description("warm-up")
        for method, size in {(m.key, len(batch)): (m, len(batch)) for batch, due in turns for m in due}.values():
            with method.applied(pipe):
                draw(pipe, requests[:size], method, settings, steps=min(WARM_UP_STEPS, settings.steps))
        for batch, due in turns:
            for method in due:
                progress.set_description(method.key, refresh=False)
                with method.applied(pipe):
                    images, seconds, peak = draw(pipe, batch, method, settings, steps=settings.steps)
                for request, image in zip(batch, images, strict=True):
                    figures = {"run": run, "seconds": seconds / len(batch), "batch": len(batch), "peak_bytes": peak}
                    figures["timed"] = request is batch[0]  # one time a batch
                    _save(out, settings, method, request, image, figures)
                progress.update(len(batch))
    return pictures


def draw(
    pipe: Any, requests: Sequence[Request], method: Method, settings: Settings, *, steps: int
) -> tuple[list[Image.Image], float, int | None]:
    """(pictures, seconds for all, bytes of peak memory over the weights or None off CUDA).

    Every picture has a CPU generator of its own, so that it does not depend on its neighbours in the batch.
    """
    device = torch.device(pipe.device)
    generators = [torch.Generator("cpu").manual_seed(request.seed + method.seed_shift) for request in requests]
    guidance = {} if settings.guidance is None else {"guidance_scale": settings.guidance}
    cuda, held = device.type == "cuda", 0
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    synchronize(device)
    start = time.perf_counter()
    images = pipe(
        prompt=[request.prompt for request in requests],
        generator=generators,
        num_inference_steps=steps,
        height=settings.size,
        width=settings.size,
        output_type="pil",
        **guidance,
    ).images
    synchronize(device)
    seconds = time.perf_counter() - start
    return images, seconds, torch.cuda.max_memory_allocated(device) - held if cuda else None


def _save(
    out: Path, settings: Settings, method: Method, request: Request, image: Image.Image, figures: dict[str, Any]
) -> None:
    """The picture first, its record after it: a record says that the picture is whole."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    content = buffer.getvalue()
    write(out / method.key / f"{request.id}.png", content)
    write_json(
        out / method.key / f"{request.id}.json",
        {
            "id": request.id,
            "prompt": request.prompt,
            "seed": request.seed + method.seed_shift,
            "made": identity(settings, method),
            "sha256": hashlib.sha256(content).hexdigest(),
            **figures,
        },
    )


@contextmanager
def quiet_patches() -> Iterator[None]:
    """tofu_sd reports each patch it applies; here that is once a batch."""
    logger = logging.getLogger("tofu_sd")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
