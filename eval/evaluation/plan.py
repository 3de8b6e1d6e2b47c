"""Options -> a plan of the run, checked before anything is loaded or generated."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tofu_sd import demo
from tofu_sd.demo.models import EMBEDDED
from tofu_sd.environment import check_torchvision

from .. import EvalError
from ..common.cli import flag
from ..common.devices import pick_device
from ..images.distributed import Processes, launched_processes
from ..images.model import check_guidance
from ..images.requests import Request, default_prompts, load_requests, select
from ..images.settings import Settings, image_path
from ..methods.method import BASELINE, OTHER_SEEDS, Method
from ..methods.registry import parse as parse_methods
from ..metrics.base import Skipped
from ..metrics.registry import METRICS_OF_OPTIONS, Nets, parse_metric_names
from ..reporting import earlier_results

SAMPLE = 8  # images of each method with the embedded model, where no number is given: a table within minutes


@dataclass(frozen=True)
class RunPlan:
    """What a run does, as far as it is known without the model.

    Args:
        options: of the command.
        methods: the rows, with skipped ones.
        all_requests: the whole list of prompts.
        requests: the images of each method.
        limit: how many prompts of the list these are of; None without a limit.
        nets: where the networks of metrics come from.
        processes: of this launch.
        device: of this process.
        metric_names: as --metrics names them.
        unavailable_metrics: those whose networks could not be loaded before the first image.
    """

    options: argparse.Namespace
    methods: list[Method]
    all_requests: list[Request]
    requests: list[Request]
    limit: int | None
    nets: Nets
    processes: Processes
    device: torch.device
    metric_names: str
    unavailable_metrics: Sequence[Skipped] = ()

    @property
    def generated_methods(self) -> list[Method]:
        """The methods that need images: the baseline always, and first."""
        return [BASELINE, *(m for m in self.methods if m is not BASELINE and not m.unavailable_reason)]

    @property
    def writes_results(self) -> bool:
        """Whether the run measures its images and writes results."""
        return not (self.options.generate_only or self.options.shard)

    @property
    def num_listed(self) -> int:
        """How many images of each method the whole list has."""
        return len(self.all_requests) * int(self.options.per_prompt)

    @property
    def sample_hint(self) -> str | None:
        """How to get all images, where the run took a small sample by default."""
        if "limit" in self.options.explicit or len(self.requests) == self.num_listed or self.options.only:
            return None
        return (
            f"A quick sample: {len(self.requests)} of {self.num_listed} images of each method. "
            "All of them: the same command with --limit all"
        )


@dataclass(frozen=True)
class GeneratedImages:
    """The images of a plan, to be measured.

    Args:
        plan: with the methods and metrics that the folder's earlier results have too.
        settings: of the images.
        out: their folder.
        classifier: of the embedded model; None for other models.
        num_new: how many of the images this process generated.
        process_mib: the memory that this process took for it.
        interrupted: whether Ctrl-C ended the generation; `plan` then has the complete methods only.
    """

    plan: RunPlan
    settings: Settings
    out: Path
    classifier: nn.Module | None
    num_new: int = 0
    process_mib: int | None = None
    interrupted: bool = False


@dataclass(frozen=True)
class RunResult:
    """What a run returns. Of several processes, the main one alone has results, planned and num_generated.

    Args:
        out: the folder.
        num_generated: how many images a stage that measures nothing generated.
        results: what results.json holds.
        planned: what would be generated, under --dry-run.
        incomplete: whether a method or metric was skipped, or an image is flat or NaN.
        interrupted: whether Ctrl-C ended the generation, and the results are of the complete methods.
        sample_hint: how to get all images, where these are a small sample.
    """

    out: Path
    num_generated: int | None = None
    results: dict[str, Any] | None = None
    planned: dict[str, Any] | None = None
    incomplete: bool = False
    interrupted: bool = False
    sample_hint: str | None = None


def plan(options: argparse.Namespace) -> RunPlan:
    """Checks the options and plans the run. Skipped methods are named on stderr, before hours of generating.

    Raises:
        EvalError: options that no model can fulfil.
    """
    methods = parse_methods(options.method, _ratios(options.ratio)) + [OTHER_SEEDS] * bool(options.seed_baseline)
    all_requests = load_requests(options.prompts, options.seed)
    limit, requests = _select_requests(options, all_requests)
    nets = Nets(
        options.lpips_net, options.lpips_backbone, options.inception_weights, options.clip_model, options.dino_model
    )
    _check_net_options(options, parse_metric_names(options.metrics, nets))
    _check_reproducible(methods)
    check_guidance(methods, default_guidance(options))
    _check_map_options(options, methods)
    device = pick_device(options.device)
    processes = launched_processes(cpu=device.type == "cpu")
    _check_processes(options, processes)
    for method in methods if processes.is_main_process else ():
        if method.unavailable_reason:
            print(f"{method.slug} is skipped: {method.unavailable_reason}", file=sys.stderr)
    try:
        check_torchvision()
    except ImportError as error:
        raise EvalError(str(error)) from error
    return RunPlan(
        options, methods, all_requests, requests, limit, nets, processes, processes.device or device, options.metrics
    )


def default_guidance(options: argparse.Namespace) -> float | None:
    """The guidance scale of --guidance; None for the pipeline's default."""
    is_default = options.guidance is None and options.model in EMBEDDED
    scale: float | None = demo.GUIDANCE if is_default else options.guidance
    return scale


def with_earlier_results(run_plan: RunPlan, out: Path, settings: Settings) -> RunPlan:
    """The plan with the methods and metrics that the folder's results have, so that no figure is lost.

    Raises:
        EvalError: that is impossible: for fewer images, or for methods whose images are incomplete.
    """
    before = earlier_results.read(out)
    if before is None:
        return run_plan
    earlier_results.check_images(before, out, run_plan.requests)
    methods = earlier_results.merge_methods(before, run_plan.methods, out, settings, run_plan.requests)
    known = parse_metric_names(run_plan.metric_names, run_plan.nets)
    names = earlier_results.merge_metrics(before, run_plan.metric_names, known)
    return replace(run_plan, methods=methods, metric_names=names)


def _select_requests(options: argparse.Namespace, requests: list[Request]) -> tuple[int | None, list[Request]]:
    """(limit, the requests of the run): a small sample of the embedded model where nothing else is given."""
    if options.limit is not None or options.only is not None or not _is_own_list(options):
        limit = None if options.limit == "all" else options.limit
        return limit, select(requests, options.per_prompt, options.only, limit)
    whole = select(requests, options.per_prompt, None, None)
    existing = [r for r in whole if options.out and image_path(options.out, BASELINE.slug, r.id).exists()]
    if existing and (options.metrics_only or len(existing) > SAMPLE * options.per_prompt):
        return None, existing
    return SAMPLE, select(requests, options.per_prompt, None, SAMPLE)


def _is_own_list(options: argparse.Namespace) -> bool:
    """Whether an embedded model generates its own prompts."""
    return options.model in EMBEDDED and options.prompts == default_prompts(options.model)


def _check_net_options(options: argparse.Namespace, metric_names: Sequence[str]) -> None:
    for name, metrics in METRICS_OF_OPTIONS.items():
        if name in options.typed and not set(metrics) & set(metric_names):
            raise EvalError(f"{flag(name)} is for {' and '.join(metrics)}, which --metrics does not include")


def _check_reproducible(methods: Sequence[Method]) -> None:
    for method in methods:
        for name, unit in (("min_tokens", "of tokens"), ("depth_split", "of blocks")):
            if method.fusion and getattr(method.fusion, name) == "auto":
                raise EvalError(
                    f"{method.name}: every process measures the value of {name}=auto again, so images of two runs may "
                    f"differ; give a number {unit}"
                )


def _check_map_options(options: argparse.Namespace, methods: Sequence[Method]) -> None:
    if options.maps and not any(method.fusion for method in methods):
        raise EvalError("--maps shows what this package's methods merge, and --method has none of them")
    for name in ("map_step", "map_block"):
        if getattr(options, name) is not None and not options.maps:
            raise EvalError(f"{flag(name)} is {getattr(options, name)}; it needs --maps")
    if options.map_step is not None and options.map_step > options.steps:
        raise EvalError(f"--map-step is {options.map_step}; there are {options.steps} steps")


def _check_processes(options: argparse.Namespace, processes: Processes) -> None:
    size = processes.num_processes
    if size > 1 and options.shard:
        raise EvalError("--shard is for processes that are started independently; these split the work anyway")
    if size > 1 and ":" in options.device:
        raise EvalError(f"--device is {options.device!r}; each of {size} processes uses its own device")


def _ratios(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise EvalError(f"--ratio is {text!r}; it must be a number or several with commas between") from error
