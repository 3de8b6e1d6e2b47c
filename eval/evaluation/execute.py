"""Carries out a plan: generate, measure, write results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tofu_sd import demo
from tofu_sd.demo.models import EMBEDDED
from tofu_sd.interrupts import interrupted

from .. import EvalError
from ..common import provenance
from ..common.devices import enough_memory
from ..common.files import check_exists, listed, remove_temp_files
from ..images import flops, merge_maps
from ..images.distributed import Processes
from ..images.generate import generate
from ..images.model import check_guidance, revision
from ..images.output_dir import (
    check_no_obstacles,
    check_settings_match,
    copy_reference_images,
    init_output_dir,
    load_settings,
)
from ..images.records import generating_runs, is_corrupt, load_records
from ..images.requests import requests_hash
from ..images.settings import Settings, image_dir, image_path
from ..images.timing import TimingOptions
from ..methods.method import BASELINE, Method
from ..metrics.base import Metric, Skipped
from ..metrics.registry import build_metrics, probe_metrics
from ..metrics.score import Scores, check_complete, describe, load, score
from ..reporting import results
from ..reporting.footnotes import image_warnings
from .plan import GeneratedImages, RunPlan, RunResult, plan, with_earlier_results
from .prepare import (
    Prepared,
    dry_run,
    model_name,
    prepare,
    warn_lost_metrics,
    warn_missing_weights,
    warn_too_small,
)


def run(options: argparse.Namespace, argv: Sequence[str]) -> RunResult:
    """One run from its options to its results. Everything that can be refused is refused before it writes a file."""
    run_plan = plan(options)
    main = run_plan.processes.is_main_process
    some_skipped = any(method.unavailable_reason for method in run_plan.methods)
    if options.dry_run:
        planned = dry_run(run_plan)
        shown = planned if main else None
        return RunResult(Path(planned["out"]), planned=shown, incomplete=some_skipped, sample_hint=run_plan.sample_hint)
    metadata = {**provenance.begin("eval.run", argv, run_plan.device), "environment": provenance.environment()}
    images = load_existing_images(run_plan) if options.metrics_only else generate_images(run_plan, metadata)
    if not run_plan.writes_results:
        total = sum(run_plan.processes.gather_object(images.num_new))
        return RunResult(images.out, total if main else None, incomplete=some_skipped)
    found = measure_and_save(images, metadata)
    if found is None:
        return RunResult(images.out)
    incomplete = some_skipped or any("skipped" in metric for metric in found["metrics"]) or bool(image_warnings(found))
    return RunResult(
        images.out,
        results=found,
        incomplete=incomplete,
        interrupted=images.interrupted,
        sample_hint=run_plan.sample_hint,
    )


def measure_and_save(images: GeneratedImages, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """Measures the images and writes the results; None in all processes but the main one.

    Args:
        images: of a plan.
        metadata: of this run.
    """
    measured = measure(images)
    if measured is None:
        return None
    scores, described = measured
    generated = generating_runs(images.out, scores.records)
    metadata = {
        **metadata, "process_mib": images.process_mib, "ended": provenance.now(), "generated": generated
    }  # fmt: skip
    metadata["environments"] = provenance.deduplicate_environments([metadata, *generated])
    warn_lost_metrics(images, described)
    new = results.results(images.settings, scores, described, metadata, of=images.plan.num_listed)
    return results.save(images.out, new, scores)


def generate_images(run_plan: RunPlan, metadata: dict[str, Any]) -> GeneratedImages:
    """Generates every missing image of this process's share.

    Args:
        run_plan: the plan.
        metadata: of this run; the model's revision is added.
    """
    options, main = run_plan.options, run_plan.processes.is_main_process
    prepared = prepare(run_plan)
    metadata["revision"] = revision(options.model)
    run_plan = _init_folder(run_plan, prepared)
    share = run_plan.processes
    if options.shard:
        share = Processes(options.shard[0] - 1, options.shard[1], is_shard=True)
    settings, out, methods = prepared.settings, prepared.out, run_plan.generated_methods
    num_new, was_interrupted = 0, False
    with enough_memory("a smaller --batch takes less; it changes the last bits, so it needs a new folder"):
        try:
            timing = TimingOptions(options.repeats, options.timed)
            num_new = generate(prepared.pipe, run_plan.requests, methods, settings, out, share, timing, metadata)
        except BaseException as error:
            run_plan, was_interrupted = _complete_part(run_plan, prepared, error), True
        # before metrics load their networks
        memory = provenance.process_mib() if num_new else None
        run_plan.processes.wait_for_everyone()
        if share.is_main_process and not was_interrupted:
            _analyze(run_plan, prepared)
    if not run_plan.writes_results and (main or options.shard):
        print(f"generated {num_new} images in {out}", file=sys.stderr)
    return GeneratedImages(run_plan, settings, out, prepared.classifier, num_new, memory, was_interrupted)


def _init_folder(run_plan: RunPlan, prepared: Prepared) -> RunPlan:
    """Makes the folder ready for images; the plan with the methods and metrics that its results have."""
    options, main = run_plan.options, run_plan.processes.is_main_process
    settings, out = prepared.settings, prepared.out
    check_settings_match(out, settings)
    if run_plan.writes_results:
        run_plan = with_earlier_results(run_plan, out, settings)
    check_no_obstacles(out, run_plan.generated_methods, run_plan.requests)
    init_output_dir(out, settings)
    warn_too_small(run_plan, settings)
    if main and run_plan.writes_results:
        run_plan = replace(run_plan, unavailable_metrics=warn_missing_weights(run_plan, settings))
    if main:
        remove_temp_files(out)
    if options.reference and main:
        copied = copy_reference_images(options.reference, out, settings, run_plan.requests)
        total = len(run_plan.requests)
        print(f"{copied} of {total} images of the baseline are from {options.reference.name}", file=sys.stderr)
    run_plan.processes.wait_for_everyone()
    return run_plan


def _complete_part(run_plan: RunPlan, prepared: Prepared, error: BaseException) -> RunPlan:
    """After Ctrl-C, the plan with the methods whose images are complete. Raises the error where there are none."""
    if not interrupted(error) or not run_plan.writes_results or run_plan.processes.num_processes > 1:
        raise error

    def is_complete(method: Method) -> bool:
        found = load_records(prepared.out, prepared.settings, method, run_plan.requests)
        return len(found) == len(run_plan.requests)

    complete = [m for m in run_plan.generated_methods if is_complete(m)]
    compared = [m.slug for m in complete if m is not BASELINE]
    if BASELINE not in complete or not compared:
        raise error
    print(f"\ninterrupted; measuring what is complete: {listed(compared)}; Ctrl-C again skips it", file=sys.stderr)
    return replace(run_plan, methods=[m for m in run_plan.methods if m in complete])


def _analyze(run_plan: RunPlan, prepared: Prepared) -> None:
    """Counts FLOPs and saves merge maps, where options ask for them."""
    options, methods, settings = run_plan.options, run_plan.generated_methods, prepared.settings
    if options.flops:
        flops.count(prepared.out, prepared.pipe, methods, settings, run_plan.requests)
    if options.maps:
        choice = merge_maps.MapChoice(options.map_step, options.map_block)
        merge_maps.save(prepared.out, prepared.pipe, methods, settings, run_plan.requests[0], choice)


def load_existing_images(run_plan: RunPlan) -> GeneratedImages:
    """The images of --metrics-only, which all exist; no pipeline is loaded.

    Raises:
        EvalError: images are missing, corrupt or of other settings, or options are for generating.
    """
    options = run_plan.options
    settings = _existing_settings(run_plan)
    check_guidance(run_plan.methods, settings.guidance)
    run_plan = with_earlier_results(run_plan, options.out, settings)
    check_no_obstacles(options.out, run_plan.generated_methods, run_plan.requests)
    for method in run_plan.generated_methods:
        _check_images(run_plan, settings, method)
    embedded = EMBEDDED.get(settings.model)
    classifier = None if embedded is None else demo.load_classifier(embedded.name, run_plan.device)
    return GeneratedImages(run_plan, settings, options.out, classifier)


def _existing_settings(run_plan: RunPlan) -> Settings:
    """The settings of the images in --out. EvalError where an option differs from them."""
    options = run_plan.options
    if options.out is None:
        raise EvalError("--metrics-only measures the images of a folder: name it by --out")
    for name in ("reference", "repeats", "timed", "flops", "maps"):
        if name in options.typed:
            raise EvalError(f"--metrics-only generates nothing, and --{name} is for generating")
    check_exists(options.out, "--out")
    settings = load_settings(options.out)
    if settings is None:
        raise EvalError(f"--out {options.out.name}: there is no settings.json of eval.run in it")
    fixed = ("model", "size", "steps", "guidance", "batch", "dtype", "variant")
    given = {**{name: getattr(options, name) for name in fixed}, "model": model_name(options.model)}
    for name, value in given.items():
        if name in options.explicit and value not in (getattr(settings, name), "auto"):
            raise EvalError(
                f"--{name} is {value}; the images of {options.out.name} were generated with {getattr(settings, name)}"
            )
    if settings.prompts_hash != requests_hash(run_plan.all_requests):
        raise EvalError(
            f"--out {options.out.name}: its images were generated for the prompts {settings.prompts!r} and seeds from "
            f"{settings.seed}, which are not those of --prompts and --seed"
        )
    return settings


def _check_images(run_plan: RunPlan, settings: Settings, method: Method) -> None:
    """EvalError where images of a method are missing, corrupt or of other code, saying which of these."""
    out, requests = run_plan.options.out, run_plan.requests
    found = load_records(out, settings, method, requests)
    unusable = [r for r in requests if r.id not in found and image_path(out, method.slug, r.id).exists()]
    if unusable:
        names = listed([f"{request.id}.png" for request in unusable])
        some_corrupt = any(is_corrupt(out, method, request) for request in unusable)
        why = "are corrupt, or their records" if some_corrupt else "were generated by other code"
        raise EvalError(f"{method.slug}: {names} {why}; without --metrics-only they are generated again")
    check_complete(requests, found, method.slug)


def measure(images: GeneratedImages) -> tuple[Scores, list[dict[str, Any]]] | None:
    """(scores, the metrics as results.json lists them); None in all processes but the main one."""
    run_plan, settings, out = images.plan, images.settings, images.out
    prompts = [request.prompt for request in run_plan.requests]
    with enough_memory("--metrics-only --device cpu measures without the accelerator"):
        metrics = build_metrics(
            run_plan.metric_names, run_plan.nets, size=settings.size, prompts=prompts, device=run_plan.device,
            classifier=images.classifier, unavailable=run_plan.unavailable_metrics,
        )  # fmt: skip
        examples = load(image_dir(out, BASELINE.slug), run_plan.requests[:2])
        metrics = available_everywhere(probe_metrics(metrics, examples, prompts[:2]), run_plan.processes)
        scores = score(
            out, settings, run_plan.requests, run_plan.methods, metrics, run_plan.processes,
            run_plan.options.reference,
        )  # fmt: skip
    if not run_plan.processes.is_main_process:
        return None
    by_key = {method.slug: method for method in run_plan.generated_methods}
    for row in scores.rows:
        if row["key"] in by_key:
            row["flops"] = flops.load_count(out, settings, by_key[row["key"]])
            row["maps"] = merge_maps.saved(out, settings, by_key[row["key"]])
    return scores, describe(metrics)


def available_everywhere(metrics: Sequence[Metric], processes: Processes) -> list[Metric]:
    """The metrics that every process can compute; one that any of them lacks is skipped, with its reason."""
    skipped = [metric for metric in metrics if isinstance(metric, Skipped)]
    by_name = {metric.name: metric for found in processes.gather_object(skipped) for metric in found}
    return [by_name.get(metric.name, metric) for metric in metrics]
