"""Loads the model of a plan and checks all that can be checked before the first image."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tofu_sd.demo.models import EMBEDDED

from .. import EvalError
from ..common import provenance
from ..common.cli import quiet_patches
from ..common.devices import enough_memory, pick_dtype
from ..common.files import check_exists, check_place
from ..images import merge_maps
from ..images.components import check_prompts
from ..images.generate import generate_batch
from ..images.model import (
    check_guidance,
    check_steps,
    default_size,
    guidance_scale,
    load_model,
    try_methods,
    variant_of,
)
from ..images.output_dir import check_no_obstacles, check_settings_match, differing_setting, load_settings
from ..images.records import load_records
from ..images.requests import requests_hash
from ..images.settings import Settings, image_dir
from ..methods.method import BASELINE
from ..methods.registry import has_outside_code
from ..metrics.base import Skipped
from ..metrics.registry import build_metrics, parse_metric_names, too_small
from ..reporting import earlier_results
from .plan import GeneratedImages, RunPlan, default_guidance, with_earlier_results


@dataclass(frozen=True)
class Prepared:
    """A loaded pipeline with the classifier of the embedded model, and the settings and folder of its images."""

    pipe: Any
    classifier: nn.Module | None
    settings: Settings
    out: Path


def prepare(run_plan: RunPlan) -> Prepared:
    """Loads the pipeline and tries every method on it.

    Raises:
        EvalError: the model cannot be loaded, or does not fit the methods, prompts, steps, size or reference.
        InvalidResultError: a user's matcher or reduction returns something invalid.
    """
    options = run_plan.options
    reference = load_reference_settings(options.reference) if options.reference else None
    if options.out is not None:
        check_place(options.out, "--out", folder=True)  # before minutes of loading
    dtype = pick_dtype(options.dtype, run_plan.device)
    pipe, classifier = load_model(options.model, run_plan.device, dtype, options.variant)
    if run_plan.processes.is_main_process and options.variant is None and (variant := variant_of(pipe)):
        print(f"the model has only weights of the variant {variant}: these are used", file=sys.stderr)
    try_methods(pipe, run_plan.methods)
    check_prompts(pipe, [request.prompt for request in run_plan.requests])
    check_steps(pipe, options.steps)
    if options.map_block is not None:
        merge_maps.check(pipe, run_plan.generated_methods, options.map_block)
    settings = make_settings(run_plan, pipe, dtype)
    check_guidance(run_plan.methods, guidance_scale(pipe, settings.guidance))
    for method in run_plan.methods:
        if method.check is not None:
            method.check(pipe, settings.size // pipe.vae_scale_factor)
    if reference and (name := differing_setting(asdict(settings), asdict(reference))):  # else nothing to copy
        raise EvalError(
            f"--reference {options.reference.name}: its images were generated with {name} "
            f"{getattr(reference, name)!r}, this run has {getattr(settings, name)!r}"
        )
    _try_outside_code(pipe, run_plan, settings)
    return Prepared(pipe, classifier, settings, options.out or default_out(settings, run_plan.limit, options.only))


def _try_outside_code(pipe: Any, run_plan: RunPlan, settings: Settings) -> None:
    """Runs one step of each method whose matcher or reduction is a user's, before hours of generating.

    Raises:
        InvalidResultError: it returns something invalid.
    """
    for method in run_plan.methods:
        if has_outside_code(method.fusion):
            with enough_memory("a smaller --size takes less"), quiet_patches(), method.apply(pipe):
                generate_batch(pipe, run_plan.requests[:1], method, settings, steps=1)


def dry_run(run_plan: RunPlan) -> dict[str, Any]:
    """What the run would generate, and how much of it exists already."""
    prepared = prepare(run_plan)
    settings, out = prepared.settings, prepared.out
    check_settings_match(out, settings)
    check_no_obstacles(out, run_plan.generated_methods, run_plan.requests)
    if run_plan.writes_results:
        with_earlier_results(run_plan, out, settings)
    warn_too_small(run_plan, settings)
    existing = {m.slug: set(load_records(out, settings, m, run_plan.requests)) for m in run_plan.generated_methods}
    if run_plan.options.reference:
        existing[BASELINE.slug] |= set(load_records(run_plan.options.reference, settings, BASELINE, run_plan.requests))
    return {
        "out": str(out),
        "settings": asdict(settings),
        "methods": [
            {"key": key, "images": len(run_plan.requests), "existing": len(ids)} for key, ids in existing.items()
        ],
    }


def load_reference_settings(folder: Path) -> Settings:
    """The settings of another run's images. EvalError for a folder without images of the baseline."""
    check_exists(folder, "--reference")
    if not image_dir(folder, BASELINE.slug).is_dir():
        raise EvalError(f"--reference {folder.name}: there is no folder {BASELINE.slug!r} in it")
    settings = load_settings(folder, "--reference")
    if settings is None:
        raise EvalError(f"--reference {folder.name}: there is no settings.json of this version of eval.run in it")
    return settings


def warn_lost_metrics(images: GeneratedImages, described: Sequence[dict[str, Any]]) -> None:
    """Names the metrics of the folder's results that cannot be measured any more."""
    before = earlier_results.read(images.out)
    for line in earlier_results.lost_metrics(before, described) if before else ():
        print(line, file=sys.stderr)


def warn_too_small(run_plan: RunPlan, settings: Settings) -> None:
    """Names the metrics that cannot measure images of this size, before hours of generating."""
    if run_plan.processes.is_main_process:
        for metric in too_small(run_plan.metric_names, settings.size):
            print(f"{metric.name} is skipped: {metric.reason}", file=sys.stderr)


def warn_missing_weights(run_plan: RunPlan, settings: Settings) -> list[Skipped]:
    """Names the metrics that lack weights or packages, before hours of generating: it loads their networks once.

    Returns:
        These metrics.
    """
    parsed = parse_metric_names(run_plan.metric_names, run_plan.nets)
    names = ",".join(name for name in parsed if name != "demo-classifier")
    named = {metric.name for metric in too_small(run_plan.metric_names, settings.size)}
    cpu = torch.device("cpu")
    metrics = build_metrics(names, run_plan.nets, size=settings.size, prompts=(), device=cpu) if names else []
    missing = [metric for metric in metrics if isinstance(metric, Skipped) and metric.name not in named]
    for metric in missing:
        print(f"{metric.name} will be skipped: {metric.reason}", file=sys.stderr)
    return missing


def make_settings(run_plan: RunPlan, pipe: Any, dtype: torch.dtype) -> Settings:
    """The settings of the images that a pipeline generates under this plan."""
    options = run_plan.options
    size = options.size or default_size(pipe)
    if size % 8:
        raise EvalError(f"--size is {size}; it must be a multiple of 8")
    return Settings(
        model=model_name(options.model),
        pipeline=provenance.pipeline_name(pipe),
        prompts=Path(options.prompts).name,
        prompts_hash=requests_hash(run_plan.all_requests),
        seed=options.seed,
        size=size,
        steps=options.steps,
        guidance=default_guidance(options),
        batch=options.batch,
        device=provenance.device_name(run_plan.device),
        dtype=str(dtype).removeprefix("torch."),
        attention=provenance.attention_name(pipe),
        torch=str(torch.__version__),
        diffusers=provenance.version("diffusers") or "unknown",
        transformers=provenance.version("transformers") or "unknown",
        tokenizers=provenance.tokenizers_hash(pipe),
        variant=variant_of(pipe),
    )


def model_name(model: str) -> str:
    """The name of a model: of a folder its last part. A folder named demo is not the embedded model."""
    if model in EMBEDDED or not Path(model).is_dir():
        return model
    name = Path(os.path.abspath(model)).name
    return f"{name}, a folder" if name in EMBEDDED else name


def default_out(settings: Settings, limit: int | None, only: str | None) -> Path:
    """The folder of these settings: the same command resumes in it, other settings have another one.

    A limited run has its own folder, so that a quick try does not replace the figures of a long run.
    """
    settings_hash = hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:6]
    model = re.sub(r"[^\w.-]+", "-", settings.model)
    part = "" if only is None else f"-only{hashlib.sha256(only.encode()).hexdigest()[:6]}"
    part += "" if limit is None else f"-first{limit}"
    return Path("runs") / f"{model}-{settings.size}px-{settings.steps}steps{part}-{settings_hash}"
