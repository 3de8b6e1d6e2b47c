"""Requests and methods -> a PNG and a record each. A run that was interrupted resumes.

    OUT/settings.json             the settings of every image in the folder
    OUT/<method's slug>/<id>.png  an image
    OUT/<method's slug>/<id>.json its record
    OUT/runs/<id>.json            command and environment of each run that generated some of them

The list of requests fixes the batches. Methods are generated one after the other, the baseline first, so that each is
complete as early as possible. A shared machine changes its speed within minutes, so in the first batches of each method
the baseline's denoiser runs on the same input after every step: the speed-up compares times that are close together.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn
from tqdm import tqdm

from tofu_sd import demo
from tofu_sd.demo.models import EMBEDDED
from tofu_sd.timing import synchronize

from ..common.cli import quiet_patches
from ..common.files import listed, png, write, write_json
from ..methods.method import BASELINE, Method
from .distributed import SINGLE_PROCESS, Processes
from .records import is_corrupt, load_record
from .requests import Request
from .settings import RUNS, Settings, expected_record, image_path, record_path
from .timing import (
    DEFAULT_TIMING,
    WARM_UP,
    WARM_UP_STEPS,
    MemoryTracker,
    TimingOptions,
    UNetTimer,
    denoiser_of,
    fastest,
    shared_weights_copy,
)


@dataclass(frozen=True)
class PendingBatch:
    """A batch of a method of which at least one image is missing."""

    method: Method
    requests: Sequence[Request]
    missing: Sequence[Request]


def batches(requests: Sequence[Request], settings: Settings) -> list[Sequence[Request]]:
    """The requests in batches: the same for every method, and for any number of processes."""
    return [requests[i : i + settings.batch] for i in range(0, len(requests), settings.batch)]


def pending_batches(
    requests: Sequence[Request], methods: Sequence[Method], settings: Settings, out: Path, processes: Processes
) -> list[PendingBatch]:
    """This process's batches with missing images, method by method. Names corrupt images on stderr."""
    own = processes.split_between_processes(batches(requests, settings))
    found = [
        PendingBatch(method, batch, [r for r in batch if load_record(out, settings, method, r) is None])
        for method in methods
        for batch in own
    ]
    pending = [batch for batch in found if batch.missing]
    corrupt = [f"{b.method.slug}/{r.id}.png" for b in pending for r in b.missing if is_corrupt(out, b.method, r)]
    if corrupt:
        print(f"corrupt, generated again: {listed(corrupt)}", file=sys.stderr)
    return pending


def generate(
    pipe: Any,
    requests: Sequence[Request],
    methods: Sequence[Method],
    settings: Settings,
    out: Path,
    processes: Processes = SINGLE_PROCESS,
    timing: TimingOptions = DEFAULT_TIMING,
    metadata: dict[str, Any] | None = None,
) -> int:
    """Generates every image of this process's share that is missing.

    Args:
        pipe: the pipeline, unpatched.
        requests: one image each, for every method.
        methods: in this order; each is complete before the next one begins.
        settings: of all images in the folder.
        out: the folder.
        processes: which share of the batches is this process's.
        timing: how each method's batches are timed, by all processes together.
        metadata: of this run, stored once in `runs/`.

    Returns:
        How many images it generated.
    """
    pending = pending_batches(requests, methods, settings, out, processes)
    if not pending:
        return 0
    run = uuid.uuid4().hex[:12]
    if metadata is not None:
        write_json(out / RUNS / f"{run}.json", metadata)
    with quiet_patches(), _progress_bar(pending, processes) as bar:
        by_method = [list(group) for _, group in groupby(pending, key=lambda batch: batch.method.slug)]
        for number, own in enumerate(by_method, start=1):
            description = f"{own[0].method.slug} ({number} of {len(by_method)})"
            bar.set_description(description, refresh=sys.stderr.isatty())  # at once, however fast the method is
            timer = BatchTimer(pipe, own[0].method, settings, timing.of_one(processes.num_processes))
            for batch in own:
                images, cost = timer.time_batch(batch.requests)
                _save_batch(out, settings, batch, images, {"run": run, **cost})
                bar.update(len(batch.requests))
    return sum(len(batch.missing) for batch in pending)


def _progress_bar(pending: Sequence[PendingBatch], processes: Processes) -> Any:
    """A bar on stderr; in a file, a line every 15 seconds. Of several processes of one launch, one shows it."""
    return tqdm(
        total=sum(len(batch.requests) for batch in pending),
        unit="img",
        disable=not (processes.is_main_process or processes.is_shard),
        file=sys.stderr,
        mininterval=0.1 if sys.stderr.isatty() else 15,
    )


@dataclass
class BatchTimer:
    """Generates and times the batches of one method, each batch size after a warm-up.

    Args:
        pipe: the pipeline, unpatched.
        method: applied to it for each batch.
        settings: of the images.
        timing: how often each batch is generated, and how many are timed beside the baseline.
    """

    pipe: Any
    method: Method
    settings: Settings
    timing: TimingOptions
    _warm_sizes: set[int] = field(default_factory=set)
    _timed: int = 0

    def __post_init__(self) -> None:
        self._baseline_unet = shared_weights_copy(denoiser_of(self.pipe)) if self.timing.with_baseline else None

    def time_batch(self, batch: Sequence[Request]) -> tuple[Any, dict[str, Any]]:
        """The images of a batch and their cost, as `generate_batch` returns them."""
        baseline_unet = self._baseline_unet if self._timed < self.timing.with_baseline else None
        self._timed += 1
        with self.method.apply(self.pipe):
            if len(batch) not in self._warm_sizes:
                self._warm_up(batch)
            images, cost = self._generate(batch, self.settings.steps, baseline_unet)
            for _ in range(self.timing.repeats - 1):
                cost = fastest(cost, self._generate(batch, self.settings.steps, baseline_unet)[1])
        return images, cost

    def _warm_up(self, batch: Sequence[Request]) -> None:
        self._warm_sizes.add(len(batch))
        for _ in range(math.ceil(WARM_UP / len(batch))):
            self._generate(batch, min(WARM_UP_STEPS, self.settings.steps), self._baseline_unet)

    def _generate(
        self, batch: Sequence[Request], steps: int, baseline_unet: nn.Module | None
    ) -> tuple[Any, dict[str, Any]]:
        return generate_batch(self.pipe, batch, self.method, self.settings, steps=steps, baseline_unet=baseline_unet)


def generate_batch(
    pipe: Any,
    requests: Sequence[Request],
    method: Method,
    settings: Settings,
    *,
    steps: int,
    baseline_unet: nn.Module | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Generates one batch by the method that is applied to the pipeline.

    Every image has its own CPU generator, so that it does not depend on its neighbours in the batch.

    Args:
        pipe: the pipeline, with the method applied.
        requests: the images of the batch.
        method: decides the seeds.
        settings: of the images.
        steps: sampling steps.
        baseline_unet: the baseline's denoiser, called after each step of the method's on the same input. Its time is
            neither in `seconds` nor its memory in `peak_bytes`.

    Returns:
        The images, float [B, H, W, 3] in 0..1 or NaN, and what one of them cost: seconds, seconds in the denoiser and
        in the baseline's, and on CUDA bytes.
    """
    device = torch.device(pipe.device)
    memory = MemoryTracker(device, with_baseline=baseline_unet is not None)

    def run_baseline(*args: Any, **kwargs: Any) -> None:
        synchronize(device)  # neither is launched while the other runs
        memory.pause()
        if baseline_unet is not None:
            baseline_unet(*args, **kwargs)
        synchronize(device)
        memory.resume()

    is_compared = baseline_unet is not None and method is not BASELINE
    arguments = _pipeline_arguments(pipe, requests, method, settings)
    synchronize(device)
    with UNetTimer(pipe, run_baseline if is_compared else None) as timer:
        start = time.perf_counter()
        images = pipe(num_inference_steps=steps, **arguments).images
        synchronize(device)
        seconds = time.perf_counter() - start
        own, baseline = timer.seconds()
    seconds -= baseline or 0
    if method is BASELINE and baseline_unet is not None:
        baseline = own  # the baseline compared with itself
    n = len(requests)
    return images, {
        "seconds": seconds / n,
        "denoiser_seconds": None if own is None else own / n,
        "baseline_denoiser_seconds": None if baseline is None else baseline / n,
        **memory.figures(),
    }


def _pipeline_arguments(pipe: Any, requests: Sequence[Request], method: Method, settings: Settings) -> dict[str, Any]:
    seeds = [request.seed + method.seed_shift for request in requests]
    guidance = {} if settings.guidance is None else {"guidance_scale": settings.guidance}
    if settings.model in EMBEDDED and settings.guidance is not None:
        guidance = demo.call_options(pipe, len(requests), settings.guidance)
    return {
        "prompt": [request.prompt for request in requests],
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "height": settings.size,
        "width": settings.size,
        "output_type": "np",
        **guidance,
    }


def as_image(pixels: np.ndarray[Any, Any]) -> Image.Image:
    """Pixels [H, W, 3] in 0..1 as diffusers turns them into an image; NaN is black."""
    image: Image.Image = VaeImageProcessor.numpy_to_pil(np.nan_to_num(pixels))[0]
    return image


def _save_batch(
    out: Path, settings: Settings, batch: PendingBatch, images: Sequence[np.ndarray[Any, Any]], cost: dict[str, Any]
) -> None:
    """Saves the missing images of a batch. The time of the batch counts once, in the first of them."""
    ids = [request.id for request in batch.requests]
    for request, image in zip(batch.requests, images, strict=True):
        if request in batch.missing:
            timed = {"batch": len(ids), "batch_ids": ids, "timed": request is batch.missing[0]}
            _save(out, settings, batch.method, request, image, {**timed, **cost})


def _save(
    out: Path,
    settings: Settings,
    method: Method,
    request: Request,
    pixels: np.ndarray[Any, Any],
    cost: dict[str, Any],
) -> None:
    """Writes the image, then its record: where there is a record, the image is complete."""
    content = png(as_image(pixels))
    write(image_path(out, method.slug, request.id), content)
    record = {
        "id": request.id,
        **expected_record(settings, method, request),
        "sha256": hashlib.sha256(content).hexdigest(),
        "finite": bool(np.isfinite(pixels).all()),
        **cost,
    }
    write_json(record_path(out, method.slug, request.id), record)
