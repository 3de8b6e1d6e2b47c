"""Options -> a plan of the run, checked before anything is generated."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tofu_sd import demo
from tofu_sd.environment import check_torchvision

from .. import EvalError
from ..common import provenance
from ..common.cli import written
from ..common.devices import pick_device, pick_dtype
from ..common.files import check_place
from ..images import merge_maps as maps
from ..images import requests as prompts
from ..images.components import check_prompts
from ..images.distributed import Team, assemble
from ..images.guidance import check_guidance, guidance_scale
from ..images.model import check_steps, load_model, own_size, try_out, variant_of
from ..images.output_dir import differing, refuse_obstacles, refuse_others, settings_of
from ..images.requests import Request
from ..images.settings import Settings
from ..methods import registry as methods
from ..methods.method import BASELINE, OTHER_SEEDS, Method
from ..metrics import registry as metrics
from ..metrics.score import records
from ..reporting import earlier_results as earlier


@dataclass(frozen=True)
class Job:
    """What is asked for, as far as it can be told without the model.

    chosen: the methods. requests: the whole list of prompts; asked: what of it is drawn, as often as it is. metrics: as
    --metrics names them.
    """

    options: argparse.Namespace
    chosen: list[Method]
    requests: list[Request]
    asked: list[Request]
    nets: metrics.Nets
    team: Team
    device: torch.device
    metrics: str

    @property
    def drawn(self) -> list[Method]:
        """Those that take pictures: the full model always."""
        return [BASELINE, *(m for m in self.chosen if m is not BASELINE and not m.unavailable_reason)]


@dataclass(frozen=True)
class Drawn:
    """Pictures of a job, to be measured. judge: the classifier that goes with the model. made: how many of them by this
    process, memory: MiB that it took.
    """  # fmt: skip

    job: Job
    settings: Settings
    out: Path
    judge: nn.Module | None
    made: int = 0
    memory: int | None = None


@dataclass(frozen=True)
class Outcome:
    """found: the results. planned: what would be drawn, under --dry-run. drawn: how many pictures were, by a stage that
    measures none. Of a team, the first process alone has these. lacking: whether a method or a metric was skipped, or a
    picture is none.
    """  # fmt: skip

    out: Path
    drawn: int | None = None
    found: dict[str, Any] | None = None
    planned: dict[str, Any] | None = None
    lacking: bool = False


def plan(options: argparse.Namespace) -> Job:
    """EvalError for what cannot be, whatever the model is. What will be skipped is told before hours of drawing."""
    chosen = methods.parse(options.method, _ratios(options.ratio)) + [OTHER_SEEDS] * bool(options.scale_row)
    requests = prompts.load(options.prompts, options.seed)
    asked = prompts.chosen(requests, options.per_prompt, options.only, options.limit)
    nets = metrics.Nets(
        options.lpips_net, options.lpips_backbone, options.inception_weights, options.clip_model, options.dino_model
    )
    measured = metrics.check(options.metrics, nets)
    for name, takers in metrics.TAKERS.items():
        if name in options.typed and not set(takers) & set(measured):
            raise EvalError(f"{written(name)} is for {' and '.join(takers)}, which --metrics does not ask for")
    for method in chosen:
        for name, number in (("min_tokens", "of tokens"), ("depth_split", "of blocks")):
            if method.fusion and getattr(method.fusion, name) == "auto":
                raise EvalError(
                    f"{method.name}: what {name}=auto comes to is measured anew by every process, so that pictures of "
                    f"two runs need not agree; give a number {number}"
                )
    guidance = demo.GUIDANCE if options.guidance is None and options.model == "demo" else options.guidance
    check_guidance(chosen, guidance)
    if options.maps and not any(method.fusion for method in chosen):
        raise EvalError("--maps shows what this package's methods fuse, and --method asks for none of them")
    device = pick_device(options.device)
    team = assemble(cpu=device.type == "cpu")
    if team.size > 1 and options.shard:
        raise EvalError("--shard is for processes that know nothing of each other; these share the work as it is")
    if team.size > 1 and ":" in options.device:
        raise EvalError(f"--device is {options.device!r}; each of {team.size} processes takes a device of its own")
    for name in ("map_step", "map_block"):
        if getattr(options, name) is not None and not options.maps:
            raise EvalError(f"{written(name)} is {getattr(options, name)}; it takes --maps")
    if options.map_step is not None and options.map_step > options.steps:
        raise EvalError(f"--map-step is {options.map_step}; there are {options.steps} steps")
    for method in chosen if team.leads else ():
        if method.unavailable_reason:
            print(f"{method.slug} is skipped: {method.unavailable_reason}", file=sys.stderr)
    try:
        check_torchvision()
    except ImportError as error:
        raise EvalError(str(error)) from error
    return Job(options, chosen, requests, asked, nets, team, team.device or device, options.metrics)


def dry(job: Job) -> dict[str, Any]:
    """What there would be to draw, and what of it is there."""
    _, _, settings, out = ready(job)
    refuse_others(out, settings)
    refuse_obstacles(out, job.drawn, job.asked)
    if writes_results(job):
        with_earlier(job, out, settings)
    tell_too_small(job, settings)
    there = {m.slug: set(records(out, settings, m, job.asked)) for m in job.drawn}
    if job.options.reference:
        there[BASELINE.slug] |= set(records(job.options.reference, settings, BASELINE, job.asked))
    pictures = {key: len(ids) for key, ids in there.items()}
    return {
        "out": str(out),
        "settings": asdict(settings),
        "methods": [{"key": key, "pictures": len(job.asked), "there": there} for key, there in pictures.items()],
    }


def ready(job: Job) -> tuple[Any, nn.Module | None, Settings, Path]:
    """(pipeline, its judge, settings, folder) of pictures to be drawn. EvalError for what no model would do."""
    reference = job.options.reference
    theirs = settings_of_reference(reference) if reference else None
    if job.options.out is not None:
        check_place(job.options.out, "--out", folder=True)  # before minutes of loading
    dtype = pick_dtype(job.options.dtype, job.device)
    pipe, judge = load_model(job.options.model, job.device, dtype, job.options.variant)
    if job.team.leads and job.options.variant is None and (variant := variant_of(pipe)):
        print(f"the model has weights of the variant {variant} alone: these are used", file=sys.stderr)
    try_out(pipe, job.chosen)
    check_prompts(pipe, [request.prompt for request in job.asked])
    check_steps(pipe, job.options.steps)
    if job.options.map_block is not None:
        maps.check(pipe, job.drawn, job.options.map_block)
    settings = _settings(job.options, pipe, job.requests, job.device, dtype)
    check_guidance(job.chosen, guidance_scale(pipe, settings.guidance))
    for method in job.chosen:
        if method.check is not None:
            method.check(pipe, settings.size // pipe.vae_scale_factor)
    if theirs and (name := differing(asdict(settings), asdict(theirs))):  # there is none to take, and hours to draw
        raise EvalError(
            f"--reference {reference.name}: its pictures were made with {name} {getattr(theirs, name)!r}, this run has "
            f"{getattr(settings, name)!r}"
        )
    return pipe, judge, settings, job.options.out or default_out(settings, job.options.limit, job.options.only)


def writes_results(job: Job) -> bool:
    """Whether the run measures, and so writes the figures of its folder."""
    return not (job.options.generate_only or job.options.shard)


def with_earlier(job: Job, out: Path, settings: Settings) -> Job:
    """The job with the methods and metrics that the folder's results have, so that no figure is lost.

    EvalError where that cannot be: for fewer images, or for methods whose images are not all there.
    """
    before = earlier.read(out)
    if before is None:
        return job
    earlier.check_images(before, out, job.asked)
    chosen = earlier.joined_methods(before, job.chosen, out, settings, job.asked)
    names = earlier.joined_metrics(before, job.metrics, metrics.check(job.metrics, job.nets))
    return replace(job, chosen=chosen, metrics=names)


def tell_lost(drawn: Drawn, described: list[dict[str, Any]]) -> None:
    """Which metrics of the folder's results cannot be measured any more."""
    before = earlier.read(drawn.out)
    for line in earlier.lost_metrics(before, described) if before else ():
        print(line, file=sys.stderr)


def settings_of_reference(folder: Path) -> Settings:
    """Under which its pictures were made. EvalError for a folder that holds none of the full model's."""
    if not (folder / BASELINE.slug).is_dir():
        raise EvalError(f"--reference {folder.name}: there is no folder {BASELINE.slug!r} in it")
    settings = settings_of(folder, "--reference")
    if settings is None:
        raise EvalError(f"--reference {folder.name}: there is no settings.json of this version of eval.run in it")
    return settings


def tell_too_small(job: Job, settings: Settings) -> None:
    """Which metrics these pictures will be too small for, before hours of drawing."""
    for metric in metrics.too_small(job.metrics, settings.size) if job.team.leads else ():
        print(f"{metric.name} is skipped: {metric.reason}", file=sys.stderr)


def tell_missing(job: Job, settings: Settings) -> None:
    """Which metrics lack weights or packages, before hours of drawing: their nets are loaded once for it."""
    names = ",".join(name for name in metrics.check(job.metrics, job.nets) if name != "judge")
    told = {metric.name for metric in metrics.too_small(job.metrics, settings.size)}
    cpu = torch.device("cpu")
    for metric in metrics.choose(names, job.nets, size=settings.size, prompts=(), device=cpu) if names else ():
        if isinstance(metric, metrics.Skipped) and metric.name not in told:
            print(f"{metric.name} will be skipped: {metric.reason}", file=sys.stderr)


def _settings(
    options: argparse.Namespace, pipe: Any, requests: Sequence[Request], device: torch.device, dtype: torch.dtype
) -> Settings:
    size = options.size or own_size(pipe)
    if size % 8:
        raise EvalError(f"--size is {size}; it must be a multiple of 8")
    return Settings(
        model=_model_name(options.model),
        pipeline=provenance.pipeline_name(pipe),
        prompts=Path(options.prompts).name,
        prompts_hash=prompts.digest(requests),
        seed=options.seed,
        size=size,
        steps=options.steps,
        guidance=demo.GUIDANCE if options.guidance is None and options.model == "demo" else options.guidance,
        batch=options.batch,
        device=provenance.device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        attention=provenance.attention_name(pipe),
        torch=str(torch.__version__),
        diffusers=provenance.version("diffusers") or "unknown",
        transformers=provenance.version("transformers") or "unknown",
        tokenizers=provenance.tokenizers_hash(pipe),
        variant=variant_of(pipe),
    )


def _model_name(model: str) -> str:
    """A folder without those above it. One that is called demo is not the embedded model."""
    if model == "demo" or not Path(model).is_dir():
        return model
    name = Path(os.path.abspath(model)).name
    return "demo, a folder" if name == "demo" else name


def default_out(settings: Settings, limit: int | None, only: str | None) -> Path:
    """Other settings, another folder; the same command again goes on in the same one.

    A limited run has a folder of its own, so that a quick try does not replace the figures of a long run.
    """
    digest = hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:6]
    model = re.sub(r"[^\w.-]+", "-", settings.model)
    part = "" if only is None else f"-only{hashlib.sha256(only.encode()).hexdigest()[:6]}"
    part += "" if limit is None else f"-first{limit}"
    return Path("runs") / f"{model}-{settings.size}px-{settings.steps}steps{part}-{digest}"


def _ratios(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise EvalError(f"--ratio is {text!r}; it must be a number or several with commas between") from error
