"""Carries out a plan: generate, measure, write results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tofu_sd import demo

from .. import EvalError
from ..common import provenance
from ..common.devices import enough_memory
from ..common.files import listed, tidy
from ..images import flops
from ..images import merge_maps as maps
from ..images import requests as prompts
from ..images.distributed import Team
from ..images.generate import generate
from ..images.guidance import check_guidance
from ..images.model import revision
from ..images.output_dir import claim, refuse_obstacles, refuse_others, settings_of, take_over
from ..images.records import damaged, runs
from ..methods.method import BASELINE
from ..metrics import registry as metrics
from ..metrics.score import Scores, check_complete, describe, load, records, score
from ..reporting import results as report
from ..reporting import tables as table
from .plan import (
    Drawn,
    Job,
    Outcome,
    _model_name,
    dry,
    plan,
    ready,
    tell_lost,
    tell_missing,
    tell_too_small,
    with_earlier,
    writes_results,
)


def run(options: argparse.Namespace, argv: Sequence[str]) -> Outcome:
    """One run. Everything that can be refused is refused before the first file is written."""
    job = plan(options)
    without = any(method.unavailable_reason for method in job.chosen)
    if options.dry_run:
        planned = dry(job)
        return Outcome(Path(planned["out"]), planned=planned if job.team.leads else None, lacking=without)
    told = {**provenance.begin("eval.run", argv, job.device), "environment": provenance.environment()}
    drawn = drawn_before(job) if options.metrics_only else draw(job, told)
    if options.generate_only or options.shard:
        made = sum(job.team.gather(drawn.made))
        return Outcome(drawn.out, made if job.team.leads else None, lacking=without)
    job = drawn.job
    measured = measure(job, drawn)
    if measured is None:
        return Outcome(drawn.out)
    scores, described = measured
    told |= {"process_mib": drawn.memory, "ended": provenance.now(), "drawn": runs(drawn.out, scores.records)}
    told["environments"] = provenance.told_once([told, *told["drawn"]])
    tell_lost(drawn, described)
    of = len(job.requests) * options.per_prompt
    found = report.save(drawn.out, report.results(drawn.settings, scores, described, told, of=of), scores)
    lacking = without or any("skipped" in metric for metric in described) or bool(table.flaws(found))
    return Outcome(drawn.out, found=found, lacking=lacking)


def draw(job: Job, told: dict[str, Any]) -> Drawn:
    """Every picture there is not yet, of this process's share. told: of this run; the model's revision is added."""
    options, team = job.options, job.team
    pipe, judge, settings, out = ready(job)
    told["revision"] = revision(options.model)
    refuse_others(out, settings)
    if writes_results(job):
        job = with_earlier(job, out, settings)
    refuse_obstacles(out, job.drawn, job.asked)
    claim(out, settings)
    tell_too_small(job, settings)
    if team.leads and not (options.generate_only or options.shard):
        tell_missing(job, settings)
    if team.leads:
        tidy(out)
    if options.reference and team.leads:
        there = take_over(options.reference, out, settings, job.asked)
        print(f"{there} of {len(job.asked)} pictures of the full model are {options.reference.name}'s", file=sys.stderr)
    team.wait()
    part = Team(options.shard[0] - 1, options.shard[1]) if options.shard else team
    with enough_memory("a smaller --batch takes less; it changes the last bits, so it begins a folder of its own"):
        made = generate(pipe, job.asked, job.drawn, settings, out, part, options.repeats, told, not team.leads)
        memory = provenance.process_mib() if made else None  # `tell_missing` has held the metrics' nets for a while
        team.wait()
        if options.flops and part.leads:
            flops.count(out, pipe, job.drawn, settings, job.asked)
        if options.maps and part.leads:
            maps.save(out, pipe, job.drawn, settings, job.asked[0], options.map_step, options.map_block)
    if options.generate_only or options.shard:
        print(f"drew {made} pictures in {out}", file=sys.stderr)
    return Drawn(job, settings, out, judge, made, memory)


def drawn_before(job: Job) -> Drawn:
    """Pictures that are all there already, for which no pipeline is needed."""
    options = job.options
    if options.out is None:
        raise EvalError("--metrics-only measures the pictures of a folder: give it by --out")
    for name in ("reference", "repeats", "flops", "maps"):
        if name in options.said:
            raise EvalError(f"--metrics-only draws nothing, for which --{name} is")
    settings = settings_of(options.out)
    if settings is None:
        raise EvalError(f"--out {options.out.name}: there is no settings.json of eval.run in it")
    fixed = ("model", "size", "steps", "guidance", "batch", "dtype", "variant")
    asked = {name: getattr(options, name) for name in fixed}
    for name, value in {**asked, "model": _model_name(options.model)}.items():
        if name in options.said and value not in (getattr(settings, name), "auto"):
            raise EvalError(f"--{name} is {value}; {options.out.name}'s were drawn with {getattr(settings, name)}")
    if settings.prompts_hash != prompts.digest(job.requests):
        raise EvalError(
            f"--out {options.out.name}: its pictures were drawn for the prompts {settings.prompts!r} and seeds from "
            f"{settings.seed}, which are not those of --prompts and --seed"
        )
    check_guidance(job.chosen, settings.guidance)
    job = with_earlier(job, options.out, settings)
    refuse_obstacles(options.out, job.drawn, job.asked)
    for method in job.drawn:
        found = records(options.out, settings, method, job.asked)
        other = [r.id for r in job.asked if r.id not in found and (options.out / method.slug / f"{r.id}.png").exists()]
        if other:
            names = listed([f"{id}.png" for id in other])
            broken = any(damaged(options.out, method, request) for request in job.asked if request.id in other)
            why = "are damaged, or their records" if broken else "were drawn by other code"
            raise EvalError(f"{method.slug}: {names} {why}; without --metrics-only they are drawn anew")
        check_complete(job.asked, found, method.slug)
    judge = demo.load_classifier(device=job.device) if settings.model == "demo" else None
    return Drawn(job, settings, options.out, judge)


def measure(job: Job, drawn: Drawn) -> tuple[Scores, list[dict[str, Any]]] | None:
    """(figures, the metrics as results.json lists them); None in all processes of a team but the first."""
    settings, out, wanted = drawn.settings, drawn.out, [request.prompt for request in job.asked]
    with enough_memory("--metrics-only --device cpu measures without the accelerator"):
        loaded = metrics.choose(
            job.metrics, job.nets, size=settings.size, prompts=wanted, device=job.device, judge=drawn.judge
        )
        loaded = metrics.usable(loaded, load(out / BASELINE.slug, job.asked[:2]), wanted[:2])
        loaded = everywhere(loaded, job.team)
        scores = score(out, settings, job.asked, job.chosen, loaded, job.team, job.options.reference)
    if not job.team.leads:
        return None
    by_key = {method.slug: method for method in job.drawn}
    for row in scores.rows:
        if row["key"] in by_key:
            row["flops"] = flops.counted(out, settings, by_key[row["key"]])
            row["maps"] = maps.saved(out, settings, by_key[row["key"]])
    return scores, describe(loaded)


def everywhere(loaded: Sequence[metrics.Metric], team: Team) -> list[metrics.Metric]:
    """The metrics that every process of a team can compute; one that any of them lacks is skipped, for its reason."""
    lacking = [metric for metric in loaded if isinstance(metric, metrics.Skipped)]
    reasons = {metric.name: metric for found in team.gather(lacking) for metric in found}
    return [reasons.get(metric.name, metric) for metric in loaded]
