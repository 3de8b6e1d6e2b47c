"""The main job: `python -m eval.run --method tofu`.

Prompts × fixed seeds -> pictures of the full model and of each method under the same seeds -> figures against the full
model -> a table here, and in the folder --out: results.json, per_image.csv, report.html, grid.png and all pictures.
"""

from __future__ import annotations

import argparse
import contextlib
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
from rich.console import Console
from torch import nn

from tofu_sd import demo, recipes
from tofu_sd.environment import check_torchvision

from . import EvalError, earlier, flops, maps, methods, metrics, peers, prompts, provenance, report, suites, table
from .components import check_prompts
from .files import check_place, listed, tidy, to_json
from .generate import (
    Settings,
    claim,
    damaged,
    differing,
    generate,
    refuse_obstacles,
    refuse_others,
    runs,
    settings_of,
    take_over,
)
from .guidance import check_guidance, guidance_scale
from .methods import FULL, SCALE, Method
from .model import check_steps, load_model, own_size, revision, try_out, variant_of
from .options import (
    Help,
    Parser,
    add_device,
    add_dtype,
    as_path,
    at_least,
    command,
    enough_memory,
    finite,
    pick_device,
    pick_dtype,
    said,
    written,
)
from .prompts import Request
from .score import Scores, check_complete, describe, load, records, score
from .team import Team, assemble

EXAMPLES = """examples:
  python -m eval.run --method tofu,tome
      ToFu and ToMe on the embedded model, 96 pictures, minutes on two cores
  python -m eval.run --method tofu,kv:tome+p,tofu@window=8 --ratio 0.5,0.75 --scale-row
      more methods, each at two ratios, and how far other seeds are, for scale
  python -m eval.run --suite paper --model stable-diffusion-v1-5/stable-diffusion-v1-5
      ToFu's Table 5; --limit 20 to try it first, --dry-run to see what it would draw
  accelerate launch --num_processes 4 -m eval.run --suite paper
      the same on four GPUs; --shard 1/4 to --shard 4/4 where a scheduler starts them, then once without
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m eval.run",
        description="What token fusion costs and saves, against the full model under the same seeds.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.add_argument(
        "--method",
        default="tofu",
        metavar="A,B",
        help=f"full, {', '.join(recipes.RECIPES)}, also as kv:NAME, NAME+p, NAME@option=value; "
        f"{', '.join(peers.ALONE)}, deepcache; deepcache:NAME stacks the two",
    )
    p.add_argument("--suite", metavar="NAME", help=f"options under a name: {', '.join(suites.NAMES)}; others override")
    p.add_argument("--model", default="demo", help="demo, or a diffusers text-to-image model: its id or folder")
    p.add_argument(
        "--variant", metavar="NAME", help="of the weights, as fp16 (default: the plain ones, or fp16 where it is alone)"
    )
    p.add_argument("--prompts", default="demo", help="demo, imagenet1k, or a .txt or .jsonl file")
    p.add_argument("--per-prompt", type=at_least(1), default=1, metavar="N", help="pictures of each prompt of the list")
    p.add_argument("--ratio", default="0.5", metavar="R,R", help="share of tokens fused away; several give a row each")
    p.add_argument("--steps", type=at_least(1), default=20, help="sampling steps")
    p.add_argument("--size", type=at_least(8), help="pixels a side (default: the model's own)")
    p.add_argument("--seed", type=at_least(0, 2**62), default=0, help="seed of the first picture; the others count on")
    p.add_argument("--batch", type=at_least(1), default=4, help="pictures drawn at once")
    p.add_argument("--limit", type=at_least(1), metavar="N", help="the first N of the list only (default: all)")
    p.add_argument("--only", metavar="ID,A-B", help="pictures of these ids or classes of the list only: 0007_1,20-29")
    p.add_argument(
        "--guidance",
        type=finite,
        help=f"classifier-free guidance (default: the pipeline's; {demo.GUIDANCE:g} for demo)",
    )
    add_device(p)
    add_dtype(p)
    p.add_argument("--out", type=as_path, metavar="DIR", help="folder (default: one in runs/ named after the settings)")
    p.add_argument("--reference", type=as_path, metavar="DIR", help="of an earlier run, for the full model's pictures")
    p.add_argument(
        "--scale-row", action=argparse.BooleanOptionalAction, help="add the full model under other seeds, for scale"
    )
    p.add_argument("--repeats", type=at_least(1), default=1, metavar="N", help="draw each batch N times, time the best")
    p.add_argument("--flops", action="store_true", help="count the floating-point operations of a picture too")
    p.add_argument("--maps", action="store_true", help="show in the report which token stood for which")
    p.add_argument("--map-step", type=at_least(1), metavar="N", help="at this step, from 1 (default: the middle one)")
    p.add_argument("--map-block", metavar="NAME", help="in blocks of such names (default: the first and the last)")
    stage = p.add_mutually_exclusive_group()
    stage.add_argument("--dry-run", action="store_true", help="say what would be drawn, and draw nothing")
    stage.add_argument("--generate-only", action="store_true", help="draw, and measure nothing")
    stage.add_argument("--metrics-only", action="store_true", help="draw nothing, measure what is in --out")
    stage.add_argument("--shard", type=shard, metavar="I/N", help="draw the I-th of N parts, and measure nothing")
    p.add_argument("--metrics", default="standard", help=f"standard, all, or some of {','.join(metrics.NAMES)}")
    p.add_argument("--lpips-net", default="alex", help=", ".join(metrics.LPIPS_NETS))
    p.add_argument(
        "--lpips-backbone", type=as_path, metavar="PATH", help="torchvision weights of that net (default: downloaded)"
    )
    p.add_argument("--inception-weights", type=as_path, metavar="PATH", help="for FID and KID (default: downloaded)")
    p.add_argument("--clip-model", default=metrics.CLIP, metavar="MODEL", help="for clip: its id or folder")
    p.add_argument("--dino-model", default=metrics.DINO, metavar="MODEL", help="for dino: its id or folder")
    p.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 if something was skipped, or pictures measured are flat or NaN",
    )
    p.add_argument("--json", action="store_true", help="print the results as JSON and nothing else on stdout")
    return p


def shard(text: str) -> tuple[int, int]:
    """'2/4' as (2, 4)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 1/4")
    return int(found[1]), int(found[2])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options typed, before those of a suite, before the defaults. `typed` names the first, `said` both."""
    p = parser()
    options = p.parse_args(argv)
    of_suite = {}
    if options.suite is not None:
        of_suite = {name: value for name, value in suites.load(options.suite).items() if name != "about"}
        if unknown := sorted(of_suite.keys() - vars(options).keys()):
            raise EvalError(f"the suite {options.suite!r} has an unknown option {unknown[0]!r}")
        p.set_defaults(**of_suite)
        options = p.parse_args(argv)
    options.typed = said(p, argv)
    options.said = options.typed | of_suite.keys()
    return options


@command(goes_on=True)
def main(argv: Sequence[str]) -> int:
    """Runs the job. 0 if it is done, 2 if something that was asked for cannot be, 130 if it was interrupted.

    1 under --strict if something was skipped, or a picture is none.
    """
    options = parse(argv)
    # whatever a library prints must not end up between the results
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        outcome = run(options, argv)
    stage = None if outcome.drawn is None else {"out": str(outcome.out), "drawn": outcome.drawn}
    told = outcome.found or outcome.planned or stage
    if options.json:
        print(to_json(told) if told else "", end="")
    elif outcome.found:
        table.terminal(outcome.found, Console(width=None if sys.stdout.isatty() else 120))
    elif outcome.planned:
        print("\n".join(table.planned(outcome.planned)))
    if outcome.found:
        print(f"report: {outcome.out / 'report.html'}", file=sys.stderr)
    return int(options.strict and outcome.lacking)


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
        return [FULL, *(m for m in self.chosen if m is not FULL and not m.missing)]


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


def run(options: argparse.Namespace, argv: Sequence[str]) -> Outcome:
    """One run. Everything that can be refused is refused before the first file is written."""
    job = plan(options)
    without = any(method.missing for method in job.chosen)
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


def plan(options: argparse.Namespace) -> Job:
    """EvalError for what cannot be, whatever the model is. What will be skipped is told before hours of drawing."""
    chosen = methods.parse(options.method, _ratios(options.ratio)) + [SCALE] * bool(options.scale_row)
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
        if method.missing:
            print(f"{method.key} is skipped: {method.missing}", file=sys.stderr)
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
    there = {m.key: set(records(out, settings, m, job.asked)) for m in job.drawn}
    if job.options.reference:
        there[FULL.key] |= set(records(job.options.reference, settings, FULL, job.asked))
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
    if any(method.name.rpartition(":")[2] == "hypertile" for method in job.chosen):
        peers.check_tiles(pipe, settings.size // pipe.vae_scale_factor)
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
    if not (folder / FULL.key).is_dir():
        raise EvalError(f"--reference {folder.name}: there is no folder {FULL.key!r} in it")
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
        other = [r.id for r in job.asked if r.id not in found and (options.out / method.key / f"{r.id}.png").exists()]
        if other:
            names = listed([f"{id}.png" for id in other])
            broken = any(damaged(options.out, method, request) for request in job.asked if request.id in other)
            why = "are damaged, or their records" if broken else "were drawn by other code"
            raise EvalError(f"{method.key}: {names} {why}; without --metrics-only they are drawn anew")
        check_complete(job.asked, found, method.key)
    judge = demo.judge(device=job.device) if settings.model == "demo" else None
    return Drawn(job, settings, options.out, judge)


def measure(job: Job, drawn: Drawn) -> tuple[Scores, list[dict[str, Any]]] | None:
    """(figures, the metrics as results.json lists them); None in all processes of a team but the first."""
    settings, out, wanted = drawn.settings, drawn.out, [request.prompt for request in job.asked]
    with enough_memory("--metrics-only --device cpu measures without the accelerator"):
        loaded = metrics.choose(
            job.metrics, job.nets, size=settings.size, prompts=wanted, device=job.device, judge=drawn.judge
        )
        loaded = metrics.usable(loaded, load(out / FULL.key, job.asked[:2]), wanted[:2])
        loaded = everywhere(loaded, job.team)
        scores = score(out, settings, job.asked, job.chosen, loaded, job.team, job.options.reference)
    if not job.team.leads:
        return None
    by_key = {method.key: method for method in job.drawn}
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


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
