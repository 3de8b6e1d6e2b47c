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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from tofu_sd import demo, recipes
from tofu_sd.environment import check_torchvision

from . import EvalError, flops, maps, methods, metrics, peers, prompts, provenance, report, suites, table
from .files import read_json, to_json, without_paths
from .generate import Settings, claim, generate, take_over
from .methods import FULL, SCALE, Method
from .model import load_model, own_size, try_out
from .options import Help, Parser, add_device, at_least, finite, pick_device, pick_dtype
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
    p.add_argument("--prompts", default="demo", help="demo, imagenet1k, or a .txt or .jsonl file")
    p.add_argument("--per-prompt", type=at_least(1), default=1, metavar="N", help="pictures of each prompt of the list")
    p.add_argument("--ratio", default="0.5", metavar="R,R", help="share of tokens fused away; several give a row each")
    p.add_argument("--steps", type=at_least(1), default=20, help="sampling steps")
    p.add_argument("--size", type=at_least(8), help="pixels a side (default: the model's own)")
    p.add_argument("--seed", type=at_least(0, 2**62), default=0, help="seed of the first picture; the others count on")
    p.add_argument("--batch", type=at_least(1), default=4, help="pictures drawn at once")
    p.add_argument("--limit", type=at_least(1), metavar="N", help="the first N of the list only (default: all)")
    p.add_argument(
        "--guidance",
        type=finite,
        help=f"classifier-free guidance (default: the pipeline's; {demo.GUIDANCE:g} for demo)",
    )
    add_device(p)
    p.add_argument("--out", type=Path, metavar="DIR", help="folder (default: one in runs/ named after the settings)")
    p.add_argument("--reference", type=Path, metavar="DIR", help="of an earlier run, to take the full model's pictures")
    p.add_argument("--scale-row", action="store_true", help="add the full model under other seeds, for scale")
    p.add_argument("--repeats", type=at_least(1), default=1, metavar="N", help="draw each batch N times, time the best")
    p.add_argument("--flops", action="store_true", help="count the floating-point operations of a picture too")
    p.add_argument("--maps", action="store_true", help="show in the report which token stood for which")
    p.add_argument("--map-step", type=at_least(1), metavar="N", help="at this step, from 1 (default: the middle one)")
    stage = p.add_mutually_exclusive_group()
    stage.add_argument("--dry-run", action="store_true", help="say what would be drawn, and draw nothing")
    stage.add_argument("--generate-only", action="store_true", help="draw, and measure nothing")
    stage.add_argument("--metrics-only", action="store_true", help="draw nothing, measure what is in --out")
    stage.add_argument("--shard", type=shard, metavar="I/N", help="draw the I-th of N parts, and measure nothing")
    p.add_argument("--metrics", default="standard", help=f"standard, all, or some of {','.join(metrics.NAMES)}")
    p.add_argument("--lpips-net", default="alex", help=", ".join(metrics.LPIPS_NETS))
    p.add_argument(
        "--lpips-backbone", type=Path, metavar="PATH", help="torchvision weights of that net (default: downloaded)"
    )
    p.add_argument("--inception-weights", type=Path, metavar="PATH", help="for FID and KID (default: downloaded)")
    p.add_argument("--clip-model", default=metrics.CLIP, metavar="MODEL", help="for clip: its id or folder")
    p.add_argument("--dino-model", default=metrics.DINO, metavar="MODEL", help="for dino: its id or folder")
    p.add_argument("--strict", action="store_true", help="exit with 1 if a method or a metric was skipped")
    p.add_argument("--json", action="store_true", help="print the results as JSON and nothing else on stdout")
    return p


def shard(text: str) -> tuple[int, int]:
    """'2/4' as (2, 4)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 1/4")
    return int(found[1]), int(found[2])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options typed, before those of a suite, before the defaults."""
    p = parser()
    options = p.parse_args(argv)
    if options.suite is not None:
        p.set_defaults(**{name: value for name, value in suites.load(options.suite).items() if name != "about"})
        options = p.parse_args(argv)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job. 0 if it is done, 2 if something that was asked for cannot be, 130 if it was interrupted.

    1 under --strict if something was skipped.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        options = parse(argv)
        # whatever a library prints must not end up between the results
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            found, out = run(options, argv)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {without_paths(str(error))}; the same command goes on from here", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        first = without_paths(str(error)).partition("\n")[0]
        print(
            f"error: {first} A smaller --batch takes less; it changes the last bits, so it begins a folder of its own",
            file=sys.stderr,
        )
        return 2
    if found is None:
        return 0
    if options.json:
        print(to_json(found), end="")
    else:
        table.terminal(found, Console(width=None if sys.stdout.isatty() else 120))
    print(f"report: {out / 'report.html'}", file=sys.stderr)
    return int(options.strict and any("skipped" in part for part in (*found["rows"], *found["metrics"])))


@dataclass(frozen=True)
class Job:
    """What is asked for, as far as it can be told without the model.

    chosen: the methods. requests: the whole list of prompts; asked: what of it is drawn, as often as it is.
    """

    options: argparse.Namespace
    chosen: list[Method]
    requests: list[Request]
    asked: list[Request]
    nets: metrics.Nets
    team: Team
    device: torch.device

    @property
    def drawn(self) -> list[Method]:
        """Those that take pictures: the full model always."""
        return [FULL, *(m for m in self.chosen if m is not FULL and not m.missing)]


@dataclass(frozen=True)
class Drawn:
    """Pictures to be measured. judge: the classifier that goes with the model. memory: MiB that drawing took."""

    settings: Settings
    out: Path
    judge: nn.Module | None
    memory: int | None = None


def run(options: argparse.Namespace, argv: Sequence[str]) -> tuple[dict[str, Any] | None, Path]:
    """(results, folder) of one run; no results where nothing was to be measured, or another process measures.

    Everything that can be refused is refused before the first file is written.
    """
    started = provenance.now()
    job = plan(options)
    drawn = drawn_before(job) if options.metrics_only else draw(job)
    if options.dry_run or options.generate_only or options.shard:
        return None, drawn.out
    measured = measure(job, drawn)
    if measured is None:
        return None, drawn.out
    scores, told = measured
    circumstances = provenance.collect("eval.run", list(argv), job.device, drawn.memory, started)
    of = len(job.requests) * options.per_prompt
    found = report.results(drawn.settings, scores, told, circumstances, of=of)
    report.save(drawn.out, found, scores)
    return found, drawn.out


def plan(options: argparse.Namespace) -> Job:
    """EvalError for what cannot be, whatever the model is."""
    chosen = methods.parse(options.method, _ratios(options.ratio)) + [SCALE] * options.scale_row
    requests = prompts.load(options.prompts, options.seed)
    asked = prompts.several(requests[: options.limit], options.per_prompt, len(requests))
    nets = metrics.Nets(
        options.lpips_net, options.lpips_backbone, options.inception_weights, options.clip_model, options.dino_model
    )
    metrics.check(options.metrics, nets)
    team = assemble(cpu=options.device == "cpu")
    if team.size > 1 and options.shard:
        raise EvalError("--shard is for processes that know nothing of each other; these share the work as it is")
    if team.size > 1 and ":" in options.device:
        raise EvalError(f"--device is {options.device!r}; each of {team.size} processes takes a device of its own")
    device = pick_device(options.device)  # in a team too: what is misspelt is told
    try:
        check_torchvision()
    except ImportError as error:
        raise EvalError(str(error)) from error
    return Job(options, chosen, requests, asked, nets, team, team.device or device)


def draw(job: Job) -> Drawn:
    """Every picture there is not yet, of this process's share; under --dry-run, what there would be to draw."""
    options, team = job.options, job.team
    dtype = pick_dtype(options.dtype, job.device)
    pipe, judge = load_model(options.model, job.device, dtype)
    try_out(pipe, job.chosen)
    settings = _settings(options, pipe, job.requests, job.device, dtype)
    out = options.out or default_out(settings, options.limit)
    if options.dry_run:
        _tell(out, settings, job)
        return Drawn(settings, out, judge)
    if options.reference and not (options.reference / FULL.key).is_dir():
        raise EvalError(f"--reference {options.reference.name}: there is no folder {FULL.key!r} in it")
    claim(out, settings)
    if options.reference and team.leads:
        there = take_over(options.reference, out, settings, job.asked)
        print(f"{there} of {len(job.asked)} pictures of the full model are {options.reference.name}'s", file=sys.stderr)
    team.wait()
    part = Team(options.shard[0] - 1, options.shard[1]) if options.shard else team
    made = generate(pipe, job.asked, job.drawn, settings, out, part, options.repeats)
    memory = provenance.process_mib() if made else None  # before the metrics' nets come
    team.wait()
    if options.flops and part.leads:
        flops.count(out, pipe, job.drawn, settings, job.asked[0])
    if options.maps and part.leads:
        maps.save(out, pipe, job.drawn, settings, job.asked[0], options.map_step)
    if options.generate_only or options.shard:
        print(f"drew {made} pictures in {out}", file=sys.stderr)
    return Drawn(settings, out, judge, memory)


def drawn_before(job: Job) -> Drawn:
    """Pictures that are all there already, for which no pipeline is needed."""
    options = job.options
    if options.out is None:
        raise EvalError("--metrics-only measures the pictures of a folder: give it by --out")
    if options.reference or options.repeats > 1:
        raise EvalError("--metrics-only draws nothing, for which --reference and --repeats are")
    told = read_json(options.out / "settings.json")
    try:
        settings = Settings(**told) if isinstance(told, dict) else None
    except TypeError:
        settings = None
    if settings is None:
        raise EvalError(f"--out {options.out.name}: there is no settings.json of eval.run in it")
    if settings.prompts_hash != prompts.digest(job.requests):
        raise EvalError(
            f"--out {options.out.name}: its pictures were drawn for the prompts {settings.prompts!r} and seeds from "
            f"{settings.seed}, which are not those of --prompts and --seed"
        )
    for method in job.drawn:
        check_complete(job.asked, records(options.out, settings, method, job.asked), method.key)
    return Drawn(settings, options.out, demo.judge(device=job.device) if settings.model == "demo" else None)


def measure(job: Job, drawn: Drawn) -> tuple[Scores, list[dict[str, Any]]] | None:
    """(figures, the metrics as results.json lists them); None in all processes of a team but the first."""
    settings, out, wanted = drawn.settings, drawn.out, [request.prompt for request in job.asked]
    loaded = metrics.choose(
        job.options.metrics, job.nets, size=settings.size, prompts=wanted, device=job.device, judge=drawn.judge
    )
    loaded = metrics.usable(loaded, load(out / FULL.key, job.asked[:2]), wanted[:2])
    scores = score(out, settings, job.asked, job.chosen, loaded, job.team)
    if not job.team.leads:
        return None
    by_key = {method.key: method for method in job.drawn}
    for row in scores.rows:
        if row["key"] in by_key:
            row["flops"] = flops.counted(out, settings, by_key[row["key"]])
            row["maps"] = maps.saved(out, settings, by_key[row["key"]])
    return scores, describe(loaded)


def _settings(
    options: argparse.Namespace, pipe: Any, requests: Sequence[Request], device: torch.device, dtype: torch.dtype
) -> Settings:
    size = options.size or own_size(pipe)
    if size % 8:
        raise EvalError(f"--size is {size}; it must be a multiple of 8")
    return Settings(
        model=Path(options.model).name if Path(options.model).is_dir() else options.model,
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
    )


def _tell(out: Path, settings: Settings, job: Job) -> None:
    """What a run would draw."""
    print(
        f"{settings.model}, {settings.size} px, {settings.steps} steps, {settings.dtype} on {settings.device} -> {out}"
    )
    for method in job.drawn:
        there = len(records(out, settings, method, job.asked))
        print(f"  {method.key}: {len(job.asked)} pictures, {there} of them drawn before")


def default_out(settings: Settings, limit: int | None) -> Path:
    """Other settings, another folder; the same command again goes on in the same one.

    A limited run has a folder of its own, so that a quick try does not replace the figures of a long run.
    """
    digest = hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:6]
    model = re.sub(r"[^\w.-]+", "-", settings.model)
    first = "" if limit is None else f"-first{limit}"
    return Path("runs") / f"{model}-{settings.size}px-{settings.steps}steps{first}-{digest}"


def _ratios(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise EvalError(f"--ratio is {text!r}; it must be a number or several with commas between") from error


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
