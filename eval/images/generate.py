"""Request × method -> a PNG and its record. Stopped and started again, it goes on where it was.

    OUT/settings.json           what holds for every picture in the folder
    OUT/<method's key>/<id>.png the picture, and beside it <id>.json, its record
    OUT/runs/<id>.json          the command and circumstances of each run that drew some of them

The batches are fixed by the list of requests, and the methods take turns on each: what one method's pictures met on
the machine, the others' met too. For speed that is too coarse, as a shared machine is another one a minute later: in a
few batches of each method the full model's denoiser runs beside it, step by step.
"""

from __future__ import annotations

import gc
import hashlib
import math
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn
from tqdm import tqdm

from tofu_sd.patching.autotune import synchronize

from ..common.cli import quiet_patches
from ..common.files import listed, png, write, write_json
from ..methods.method import BASELINE, Method
from .distributed import ALONE, Team
from .records import damaged, record_of
from .requests import Request
from .settings import RUNS, Settings, _asked
from .timing import TIMED, WARM_UP, denoiser_of, denoising, fastest, twin


def batches(requests: Sequence[Request], settings: Settings) -> list[Sequence[Request]]:
    """What is drawn at once: the same for every method, and for any number of processes."""
    return [requests[i : i + settings.batch] for i in range(0, len(requests), settings.batch)]


def generate(
    pipe: Any,
    requests: Sequence[Request],
    methods: Sequence[Method],
    settings: Settings,
    out: Path,
    team: Team = ALONE,
    repeats: int = 1,
    told: dict[str, Any] | None = None,
    quiet: bool = False,
) -> int:
    """Makes every picture of this process's share that is not there yet. Returns how many it made.

    repeats: a batch is drawn so many times, of which the fastest counts; the pictures are the same. told: of this run
    and its circumstances, to be kept beside its pictures. quiet: show no progress.
    """
    turns = [
        (batch, [m for m in methods if any(record_of(out, settings, m, request) is None for request in batch)])
        for batch in team.share(batches(requests, settings))
    ]
    turns = [(batch, due) for batch, due in turns if due]
    broken = [f"{m.slug}/{r.id}.png" for batch, due in turns for m in due for r in batch if damaged(out, m, r)]
    if broken:
        print(f"damaged, drawn again: {listed(broken)}", file=sys.stderr)
    pictures, made = sum(len(batch) * len(due) for batch, due in turns), 0
    run = uuid.uuid4().hex[:12]
    beside, timed, warm, last = twin(denoiser_of(pipe)), Counter[str](), set[tuple[str, int]](), ""
    if pictures and told is not None:
        write_json(out / RUNS / f"{run}.json", told)
    with (
        quiet_patches(),
        tqdm(
            total=pictures,
            unit="img",
            disable=not pictures or quiet,
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 15,
        ) as progress,
    ):
        for batch, due in turns:
            ids = [request.id for request in batch]
            for method in due:
                progress.set_description(method.slug, refresh=False)
                with method.apply(pipe):
                    if (method.slug, len(batch)) not in warm:
                        for _ in range(math.ceil(WARM_UP / len(batch))):
                            draw(pipe, batch, method, settings, steps=settings.steps, beside=beside)
                        warm.add((method.slug, len(batch)))
                    elif method.slug != last:  # what a step after a switch lays out or fetches anew is not the method's
                        draw(pipe, batch, method, settings, steps=1, output="latent")
                    last = method.slug
                    near = beside if timed[method.slug] < TIMED / team.size else None
                    images, cost = draw(pipe, batch, method, settings, steps=settings.steps, beside=near)
                    for _ in range(repeats - 1):
                        again = draw(pipe, batch, method, settings, steps=settings.steps, beside=near)[1]
                        cost = fastest(cost, again)
                timed[method.slug] += 1
                lacking = [r for r in batch if record_of(out, settings, method, r) is None]  # others were saved before
                for request, image in zip(batch, images, strict=True):
                    if request in lacking:
                        first = request is lacking[0]  # one time a batch
                        figures = {"run": run, "batch": len(batch), "drawn_with": ids, "timed": first, **cost}
                        _save(out, settings, method, request, image, figures)
                        made += 1
                progress.update(len(batch))
    return made


def draw(
    pipe: Any,
    requests: Sequence[Request],
    method: Method,
    settings: Settings,
    *,
    steps: int,
    output: str = "np",
    beside: nn.Module | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The pictures, float [B, H, W, 3] in 0..1 or NaN, and what one cost: seconds, those in the denoiser, and on CUDA
    bytes beyond those held before.

    Every picture has a CPU generator of its own, so that it does not depend on its neighbours in the batch. output: as
    diffusers' output_type; 'latent' decodes nothing. beside: the full model's denoiser, called after each step of the
    method's for its time alone, which is neither in the seconds nor in peak_bytes; reserved_bytes are not told then.
    """
    device = torch.device(pipe.device)
    other = None if method is BASELINE else beside  # it is its own measure
    peaks: list[int] = []

    def aside(*args: Any, **kwargs: Any) -> None:
        synchronize(device)  # neither is launched while the other runs
        peaks.append(torch.cuda.max_memory_allocated(device) if cuda else 0)
        if other is not None:
            other(*args, **kwargs)
        synchronize(device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)

    generators = [torch.Generator("cpu").manual_seed(request.seed + method.seed_shift) for request in requests]
    guidance = {} if settings.guidance is None else {"guidance_scale": settings.guidance}
    cuda, held, reserved = device.type == "cuda", 0, 0
    if cuda:
        gc.collect()
        if beside is None:  # else it would be the method that asks for memory again, and the other that finds it
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    synchronize(device)
    with denoising(pipe, None if other is None else aside) as told:
        start = time.perf_counter()
        images = pipe(
            prompt=[request.prompt for request in requests],
            generator=generators,
            num_inference_steps=steps,
            height=settings.size,
            width=settings.size,
            output_type=output,
            **guidance,
        ).images
        synchronize(device)
        seconds = time.perf_counter() - start
        denoised, full_denoised = told()
        seconds -= full_denoised or 0
        if method is BASELINE and beside is not None:
            full_denoised = denoised
    return images, {
        "seconds": seconds / len(requests),
        "denoising": None if denoised is None else denoised / len(requests),
        "full_denoising": None if full_denoised is None else full_denoised / len(requests),
        "peak_bytes": max(*peaks, torch.cuda.max_memory_allocated(device), 0) - held if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) - reserved if cuda and beside is None else None,
        "held_bytes": held if cuda else None,
    }


def as_image(pixels: np.ndarray[Any, Any]) -> Image.Image:
    """A picture [H, W, 3] in 0..1 as diffusers makes one of it; NaN is black."""
    image: Image.Image = VaeImageProcessor.numpy_to_pil(np.nan_to_num(pixels))[0]
    return image


def _save(
    out: Path,
    settings: Settings,
    method: Method,
    request: Request,
    pixels: np.ndarray[Any, Any],
    figures: dict[str, Any],
) -> None:
    """The picture first, its record after it: a record says that the picture is whole."""
    content = png(as_image(pixels))
    write(out / method.slug / f"{request.id}.png", content)
    write_json(
        out / method.slug / f"{request.id}.json",
        {
            "id": request.id,
            **_asked(settings, method, request),
            "sha256": hashlib.sha256(content).hexdigest(),
            "finite": bool(np.isfinite(pixels).all()),
            **figures,
        },
    )
