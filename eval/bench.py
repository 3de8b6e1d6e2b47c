"""How fast, and how much of what could be saved: `python -m eval.bench`.

Models of Stable Diffusion's real sizes with random weights. All methods run in turns in one process, round after round,
so that what else the machine does falls on all alike. `ideal` runs self-attention on the first N (1 - ratio) tokens,
with no matching, merging or unmerging: what fusion could save at most. A method's share of it is
(full - method) / (full - ideal). (What fuses more than the top level's self-attention can save more.)
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from tofu_sd.calibrate import synchronize

from . import EvalError, formats, methods, provenance, report, shapes
from .files import check_place, listed, to_json, write_results
from .methods import FULL, Method
from .options import Help, Parser, add_device, add_dtype, as_path, at_least, choices, command, pick_device, pick_dtype
from .peers import fused_attentions
from .shapes import CASES, Call, Case
from .table import method_column, short

SCHEMA = 1
SCOPES = {
    "attention": "self-attention of the highest resolution",
    "block": "transformers of the highest resolution",
    "unet": "UNet step",
}
BACKENDS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "default": nullcontext,
    "flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "efficient": lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "math": lambda: sdpa_kernel(SDPBackend.MATH),
    "slicing": nullcontext,
}
MODES = ("no", "default", "reduce-overhead", "max-autotune")
QUANTILES = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
RESAMPLES = 2000
OUT_OF_TIME = "not measured: --minutes were over"
SAMPLE = 0.02  # seconds a timed sample lasts at least, where the clock or the first kernel's start would show
DEFAULT_SCOPES = "attention,unet"
DEFAULT_METHODS = "tomesd,tome,tofu,tofu+p,kv:tofu"


EXAMPLES = """examples:
  python -m eval.bench --quick
      the attention of Stable Diffusion 1.5 at 512 px, with and without fusion
  python -m eval.bench --case sd15-1024 --method tomesd,tofu,faithful --compile no,default --out bench.json
      a UNet step of larger pictures too, compiled and not
  python -m eval.bench --table bench.json --scope unet
      a part of what was measured, for a page
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m eval.bench",
        description="Time, memory and the share of the ideal saving, at real sizes with random weights.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.add_argument("--case", default="sd15-512", metavar="A,B", help=", ".join(CASES))
    p.add_argument("--scope", metavar="A,B", help=f"{', '.join(SCOPES)} (default: {DEFAULT_SCOPES})")
    p.add_argument(
        "--method", metavar="A,B", help=f"as in eval.run; full and ideal always run (default: {DEFAULT_METHODS})"
    )
    p.add_argument("--ratio", type=float, default=0.5, help="share of tokens fused away")
    p.add_argument("--batch", type=at_least(1), default=2, help="samples of a step: two for a picture with guidance")
    p.add_argument("--compile", default="no", metavar="A,B", help=f"modes of torch.compile: {', '.join(MODES)}")
    p.add_argument("--backend", default="default", metavar="A,B", help=", ".join(BACKENDS))
    p.add_argument("--rounds", type=at_least(2), default=20, help="timed samples of each row")
    p.add_argument("--minutes", type=at_least(1), metavar="N", help="begin nothing new after N minutes")
    p.add_argument(
        "--quick", action="store_true", help="attention of sd15-512 alone, within three minutes on two cores"
    )
    add_device(p)
    add_dtype(p)
    p.add_argument("--out", type=as_path, metavar="FILE", help="also write the results there, as JSON")
    p.add_argument("--json", action="store_true", help="print the rows as JSON and nothing else on stdout")
    p.add_argument(
        "--table",
        type=as_path,
        metavar="FILE",
        help="measure nothing; print FILE's rows, of --scope and --method, for a page",
    )
    p.add_argument("--quality", type=as_path, nargs="+", default=[], metavar="DIR", help="of eval.run, for --table")
    return p


@command(goes_on=False)
def main(argv: Sequence[str]) -> int:
    """Measures; 0 if it is done, 2 if something that was asked for cannot be, 130 if it was interrupted."""
    options = parser().parse_args(argv)
    if options.table:
        found = part(read(options.table), options.scope, options.method)
        print(markdown(found, quality(options.quality)), end="")
        return 0
    if options.out:
        check_place(options.out, "--out")  # before minutes of measuring
    with contextlib.redirect_stdout(sys.stderr) if options.json else nullcontext():
        found = bench(options, argv)
    if options.out:
        write_results(options.out, found)
    if options.json:
        print(to_json(found["rows"]), end="")
    else:
        terminal(found, Console(width=None if sys.stdout.isatty() else 120))
    return 0


def bench(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What results hold: rows, and the circumstances they were measured in."""
    if options.quick:
        options.case, options.scope, options.rounds = "sd15-512", "attention", 10
    cases = [CASES[name] for name in choices(options.case, CASES, "case")]
    scopes = choices(options.scope or DEFAULT_SCOPES, SCOPES, "scope")
    backends = choices(options.backend, BACKENDS, "backend")
    chosen = [m for m in methods.parse(options.method or DEFAULT_METHODS, [options.ratio]) if m is not FULL]
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    setups = [
        Setup(case, scope, backend, options.ratio, options.batch, dtype)
        for case in cases for scope in scopes for backend in backends
    ]  # fmt: skip
    modes = [None if mode == "no" else mode for mode in choices(options.compile, MODES, "mode of torch.compile")]
    rows: list[dict[str, Any]] = []
    told = provenance.begin("eval.bench", argv, device)
    began = time.monotonic()
    for setup in tqdm(setups, unit="setup"):
        for mode in modes:
            if options.minutes and time.monotonic() - began > 60 * options.minutes:
                rows.append({**setup.told(device), **Contender("all", "all", mode, skipped=OUT_OF_TIME).row({})})
            else:
                rows += measure(setup, chosen, mode, options.rounds, device)
    told |= {"process_mib": None, "ended": provenance.now()}
    settings = {"ratio": options.ratio, "batch": options.batch, "rounds": options.rounds,
                "device": provenance.device_name(device), "dtype": str(dtype).removeprefix("torch."),
                "torch": str(torch.__version__)}  # fmt: skip
    return {"schema": SCHEMA, "settings": settings, "rows": rows, "provenance": told}


def measure(
    setup: Setup, chosen: Sequence[Method], mode: str | None, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """The rows of one setup in a mode of torch.compile (None: not compiled): full, ideal and every method."""
    model, call = setup.build(device)
    latent = call.sample.shape[-1]
    best = Method("ideal", "ideal", applied=partial(ideal, ratio=setup.ratio, latent=latent))
    contenders: list[Contender] = []
    torch._dynamo.reset()  # graphs of models that are gone count against the limit, beyond which all runs eagerly
    with torch.no_grad(), BACKENDS[setup.backend](), _graphs(2 + len(chosen)), contextlib.ExitStack() as patches:
        for method in (FULL, best, *chosen):
            contender = Contender(method.name, method.key, mode, skipped=_unfit(method, setup.scope))
            contenders.append(contender)
            if contender.skipped:
                continue
            twin = shapes.twin(model)
            try:
                patches.enter_context(method.applied(twin))
                contender.ready(twin, call, method.cycle, device)
            except Exception as error:  # whatever a peer or a compiler does not bear is a row that says so
                contender.skipped = " ".join(str(error).split())[:160]
        running = [contender for contender in contenders if not contender.skipped]
        for turn in tqdm(range(rounds), unit="round", leave=False):
            for i in range(len(running)):  # another one begins each round
                running[(turn + i) % len(running)].sample(device)
    base = {contender.method: contender.seconds for contender in running}
    return [{**setup.told(device), **c.row(base)} for c in contenders]


def _graphs(models: int) -> AbstractContextManager[Any]:
    """Lets torch.compile keep graphs of so many models of one class, each with a few kinds of block."""
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    return torch._dynamo.config.patch({name: 16 * models, "accumulated_" + name: 1024})


def _unfit(method: Method, scope: str) -> str:
    """Why a method cannot be measured by a few steps over and over, or not in this scope; nothing where it can."""
    fusion = method.fusion
    if method.missing:
        return method.missing
    if method.whole and scope != "unet":
        return "it acts on whole UNets"
    if fusion is not None and fusion.min_tokens == "auto":
        return "what it does depends on the machine: give min_tokens a number"
    if fusion is not None and (fusion.start, fusion.end) != (0, 1):
        return "what it does depends on the step: measure it with eval.run"
    if fusion is not None and fusion.threshold is not None:
        return "how much it fuses depends on the picture: measure it with eval.run"
    if fusion is not None and scope == "attention" and set(fusion.layers) != {"attn"}:
        return "there is self-attention alone in this scope"
    return ""


@dataclass(frozen=True)
class Setup:
    """What the rows of one comparison have in common."""

    case: Case
    scope: str
    backend: str
    ratio: float
    batch: int
    dtype: torch.dtype

    def build(self, device: torch.device) -> tuple[Any, Call]:
        if self.scope == "unet":
            model, call = shapes.unet(self.case, self.batch, device, self.dtype)
        else:
            alone = self.scope == "attention"
            model, call = shapes.top_level(self.case, self.batch, device, self.dtype, attention_alone=alone)
        if self.backend == "slicing":
            for module in model.modules():
                if isinstance(module, Attention):
                    module.set_attention_slice(max(1, module.sliceable_head_dim // 2))  # "auto" of diffusers
        return model, call

    def told(self, device: torch.device) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"case": self.case.name, "scope": self.scope, "ratio": self.ratio, "batch": self.batch,
                "device": device.type, "dtype": dtype, "backend": self.backend}  # fmt: skip


@dataclass
class Contender:
    """One row in the making. mode: of torch.compile, None for eager."""

    method: str
    key: str
    mode: str | None
    run: Callable[[], Any] = lambda: None
    calls: int = 1  # steps in a timed sample
    seconds: list[float] = field(default_factory=list)
    scratch: int | None = None
    kernels: int | None = None
    skipped: str = ""

    def ready(self, model: Any, call: Call, cycle: int, device: torch.device) -> None:
        """Compiles, warms up, and measures what does not vary. cycle: steps after which the model does the same."""
        if self.mode is not None:
            model = torch.compile(model, mode=self.mode, dynamic=False)
        timesteps = itertools.cycle(shapes.timesteps(cycle).to(device))
        self.run = lambda: model(call.sample, next(timesteps), **call.more)
        self.calls = cycle

        def all_of_it() -> None:
            for _ in range(cycle):
                self.run()

        all_of_it()  # compiles; lays out what a first call lays out
        self.scratch = peak(all_of_it, device)
        kernels = launched(all_of_it, device)
        self.kernels = None if kernels is None else round(kernels / cycle)
        self.sample(device)
        self.calls *= math.ceil(SAMPLE / (cycle * self.seconds.pop()))

    def sample(self, device: torch.device) -> None:
        """Times one sample, from an idle device to an idle device."""
        synchronize(device)
        start = time.perf_counter()
        for _ in range(self.calls):
            self.run()
        synchronize(device)
        self.seconds.append((time.perf_counter() - start) / self.calls)

    def row(self, base: dict[str, list[float]]) -> dict[str, Any]:
        same = {"method": self.method, "key": self.key, "compiled": self.mode is not None, "mode": self.mode}
        if self.skipped:
            return {**same, "skipped": self.skipped}
        full, least = base.get(FULL.name), base.get("ideal")
        share = None
        if full and least and self.method not in (FULL.name, "ideal"):
            saving = _figure(lambda f, m, i: f - i, full, self.seconds, least)
            if saving["low"] > 0:  # else a share of it means nothing
                share = _figure(lambda f, m, i: (f - m) / (f - i), full, self.seconds, least)
        p20, p50, p80 = torch.tensor(self.seconds).double().quantile(QUANTILES).tolist()
        return {
            **same,
            "p20": p20,
            "p50": p50,
            "p80": p80,
            "samples": self.seconds,  # in the order of the rounds, which all rows share
            "speedup": _figure(lambda f, m, i: f / m, full, self.seconds, full) if full else None,
            "share": share,
            "scratch_bytes": self.scratch,
            "kernels": self.kernels,
        }


def _figure(formula: Callable[[Tensor, Tensor, Tensor], Tensor], *seconds: list[float]) -> dict[str, float]:
    """A formula of three medians, with a 95 % interval from resampling the rounds, which all share."""
    times = torch.tensor(seconds, dtype=torch.float64)  # [3, rounds]
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(times.shape[1], (RESAMPLES, times.shape[1]), generator=generator)
    drawn = formula(*times[:, draws].quantile(0.5, dim=-1))
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": formula(*times.quantile(0.5, dim=-1)).item(), "low": low, "high": high}


def peak(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes one call holds beyond what was there before; None where torch does not tell."""
    if device.type not in ("cpu", "cuda"):
        return None
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def launched(run: Callable[[], Any], device: torch.device) -> int | None:
    """How many kernels one call launches; None where there are none."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        synchronize(device)
    return sum(e.device_type() == torch.profiler.DeviceType.CUDA for e in recorded.profiler.kineto_results.events())


@contextmanager
def ideal(model: Any, ratio: float, latent: int) -> Iterator[None]:
    """Inside, the attention that would be fused runs on as many tokens as fusion leaves: the first."""
    for attention, tokens in fused_attentions(model, ratio, (latent, latent)):
        attention.__class__, attention.tokens = IdealAttention, tokens
    yield


class IdealAttention(Attention):  # type: ignore[misc]
    """Self-attention on the first tokens alone. Its result is dropped for one of full size that was there before.

    So what comes after it, the residual, costs what it costs in the full model. A compiler would leave out attention
    whose result nobody takes; there, the first result is looked at in place of all.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fused = super().forward(hidden_states[:, : self.tokens], *args, **kwargs)
        if torch.compiler.is_compiling():
            return fused[:, :1].expand_as(hidden_states)
        if getattr(self, "result", None) is None:
            self.result = torch.zeros(hidden_states.shape, dtype=fused.dtype, device=fused.device)
        return self.result


# --- tables ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """Results that were written by --out."""
    found = formats.read(path, formats.BENCH, SCHEMA, "python -m eval.bench --out", path.name)
    rounds = {len(row["samples"]) for row in found["rows"] if "samples" in row}
    if len(rounds) > 1:
        raise EvalError(f"{path.name} is damaged: its rows have {listed(sorted(map(str, rounds)))} samples")
    return found


def part(found: dict[str, Any], scopes: str | None, methods: str | None) -> dict[str, Any]:
    """The results with the rows of these scopes and methods, and of full and ideal; all where none are named."""
    rows = found["rows"]
    if scopes:
        known = choices(scopes, sorted({row["scope"] for row in rows}), "scope")
        rows = [row for row in rows if row["scope"] in known]
    if methods:
        known = choices(f"full,ideal,{methods}", sorted({row["method"] for row in rows}), "method")
        rows = [row for row in rows if row["method"] in known]
    return {**found, "rows": rows}


def quality(folders: Sequence[Path]) -> dict[str, dict[str, str]]:
    """By a method's key, in folders of eval.run: its PSNR and LPIPS with their intervals, and of how many."""
    by_key: dict[str, dict[str, str]] = {}
    for folder in folders:
        found = report.read(folder)[0]
        metrics = [m for m in found["metrics"] if "skipped" not in m and m["name"].startswith(("PSNR", "LPIPS"))]
        for row in found["rows"]:
            figures = {f"{m['name']} {'↓' if m['lower_is_better'] else '↑'}": m for m in metrics}
            own = {title: short(row.get("metrics", {}).get(m["name"]), m["digits"]) for title, m in figures.items()}
            own["n"] = str(found["settings"]["n"])
            by_key.setdefault(row["key"], own)
    return by_key


def markdown(found: dict[str, Any], figures: dict[str, dict[str, str]]) -> str:
    """A table for each setup, for a page; with what each method costs in quality, where that was measured."""
    metrics = list(dict.fromkeys(title for own in figures.values() for title in own if title != "n"))
    shown = [figures[row["key"]]["n"] for row in found["rows"] if row.get("key") in figures]
    lines = []
    for title, rows in _setups(found):
        columns = _columns(rows)
        lines += [f"**{title}**", "", f"| method | {' | '.join([*columns, *metrics])} |"]
        lines += ["|---|" + "--:|" * (len(columns) + len(metrics))]
        for row in rows:
            costs = [figures.get(row["key"], {}).get(metric, "–") for metric in metrics]
            if "skipped" in row:
                cells = [f"skipped: {row['skipped']}", *[""] * (len(columns) - 1), *costs]
            else:
                cells = [cell(row) for cell in columns.values()] + costs
            lines.append(f"| {row['method']} | {' | '.join(cells)} |")
        lines.append("")
    lines += [circumstances(found)]
    if metrics:
        n = " or ".join(sorted(set(shown), key=int))
        lines += [f"PSNR, LPIPS: of {n} of the embedded model's pictures, against the full ones (docs/results.md)."]
    return "\n".join([*lines, "", f"`{found['provenance']['command']}`"]) + "\n"


def terminal(found: dict[str, Any], console: Console) -> None:
    for title, rows in _setups(found):
        drawn = Table(title=title, box=SIMPLE_HEAD)
        method_column(drawn, [row["method"] for row in rows])
        columns = _columns(rows)
        for column in columns:
            drawn.add_column(column, justify="right", overflow="fold")
        for row in rows:
            if "skipped" in row:
                drawn.add_row(row["method"], Text(f"skipped: {row['skipped']}", "dim"))
            else:
                drawn.add_row(row["method"], *(cell(row) for cell in columns.values()))
        console.print(drawn)
    console.print(circumstances(found), style="dim", highlight=False, markup=False)


def _setups(found: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows) of each comparison, in the order in which they ran."""
    titled: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        what = SCOPES[row["scope"]]
        compiled = f", torch.compile {row['mode']}" if row["compiled"] else ""
        backend = "" if row["backend"] == "default" else f", {row['backend']} attention"
        titled.setdefault(f"{row['case']}, {what}, batch {row['batch']}{compiled}{backend}", []).append(row)
    return list(titled.items())


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """What a table of these rows shows: each column's title, and its text for a row that was measured."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "ms": lambda row: f"{1000 * row['p50']:.1f} ({1000 * row['p20']:.1f}–{1000 * row['p80']:.1f})",
        "speed-up": lambda row: _interval(None if row["method"] == FULL.name else row["speedup"], "×"),
        "share of the ideal saving": lambda row: _interval(row["share"]),
        "scratch": lambda row: f"{row['scratch_bytes'] / 2**20:,.0f} MiB" if row["scratch_bytes"] is not None else "–",
    }
    peer = next((row["samples"] for row in rows if row["method"] == PEER and "samples" in row), None)
    if peer:
        columns[f"rounds ahead of {PEER}"] = lambda row: "–" if row["method"] == PEER else _ahead(row["samples"], peer)
    if any(row.get("kernels") is not None for row in rows):
        columns["kernels"] = lambda row: str(row["kernels"])
    return columns


PEER = "tomesd"


def _interval(figure: dict[str, float] | None, unit: str = "") -> str:
    return f"{figure['value']:.2f}{unit} ({figure['low']:.2f}–{figure['high']:.2f})" if figure else "–"


def _ahead(own: Sequence[float], peer: Sequence[float]) -> str:
    """In how many of the rounds, which all rows share, this one was the faster."""
    return f"{sum(a < b for a, b in zip(own, peer, strict=True))} of {len(own)}"


def circumstances(found: dict[str, Any]) -> str:
    """One line without which the figures mean nothing."""
    s, p = found["settings"], found["provenance"]
    return (
        f"ratio {s['ratio']:g}, {s['rounds']} rounds in turns · {s['dtype']} on {s['device']} · torch {s['torch']}, "
        f"diffusers {p['packages'].get('diffusers', 'unknown')} · commit {p['commit'] or 'unknown'}. ms: median and "
        "20th to 80th percentile; speed-up, share: of medians, with a 95 % interval; scratch: the most memory a call "
        "holds, its result included."
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
