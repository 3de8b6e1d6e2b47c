"""One method on one model shape, ready to be timed."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from tofu_sd.patching.autotune import synchronize

from ..methods.attention import top_attentions
from ..methods.method import BASELINE, Method
from ..methods.schedule import timesteps
from . import model_shapes as shapes
from .model_shapes import Call, Case

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


def _graphs(models: int) -> AbstractContextManager[Any]:
    """Lets torch.compile keep graphs of so many models of one class, each with a few kinds of block."""
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    return torch._dynamo.config.patch({name: 16 * models, "accumulated_" + name: 1024})


def _unfit(method: Method, scope: str) -> str:
    """Why a method cannot be measured by a few steps over and over, or not in this scope; nothing where it can."""
    fusion = method.fusion
    if method.unavailable_reason:
        return method.unavailable_reason
    if method.needs_full_unet and scope != "unet":
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
        schedule = itertools.cycle(timesteps(cycle).to(device))
        self.run = lambda: model(call.sample, next(schedule), **call.more)
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
        full, least = base.get(BASELINE.name), base.get("ideal")
        share = None
        if full and least and self.method not in (BASELINE.name, "ideal"):
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
    for attention, tokens in top_attentions(model, ratio, (latent, latent)):
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


def _setups(found: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows) of each comparison, in the order in which they ran."""
    titled: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        what = SCOPES[row["scope"]]
        compiled = f", torch.compile {row['mode']}" if row["compiled"] else ""
        backend = "" if row["backend"] == "default" else f", {row['backend']} attention"
        titled.setdefault(f"{row['case']}, {what}, batch {row['batch']}{compiled}{backend}", []).append(row)
    return list(titled.items())
