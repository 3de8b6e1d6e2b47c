"""One method on one model: prepared, timed, and its row of the results."""

from __future__ import annotations

import gc
import itertools
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from tofu_sd.timing import synchronize

from ..methods.method import BASELINE, Method
from ..methods.schedule import timesteps
from . import model_shapes, transformer_shapes
from .model_shapes import Call, Case
from .transformer_shapes import TransformerCase

SCOPES = {
    "attention": "self-attention of the highest resolution",
    "block": "transformers of the highest resolution",
    "unet": "UNet step",
}
OF_TRANSFORMERS = {"block": "one block of each kind", "unet": "a step"}  # where a scope means something else
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
OUT_OF_TIME = "not measured: --minutes had passed"
MIN_SAMPLE_SECONDS = 0.02  # shorter samples show the clock's resolution and the start of the first kernel


def allow_graphs(models: int) -> AbstractContextManager[Any]:
    """Inside, torch.compile keeps the graphs of this many models of one class, each with a few kinds of block."""
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    return torch._dynamo.config.patch({name: 16 * models, "accumulated_" + name: 1024})


def unsuitable_reason(method: Method, scope: str) -> str:
    """Why repeating a few steps does not measure a method, or not in this scope; empty where it does."""
    fusion = method.fusion
    if method.unavailable_reason:
        return method.unavailable_reason
    if method.needs_full_unet and scope != "unet":
        return "it needs a whole UNet or transformer"
    if fusion is not None and fusion.min_tokens == "auto" and scope != "unet":
        return "where merging pays is measured in whole UNets: give min_tokens a number"
    if fusion is not None and (fusion.start, fusion.end) != (0, 1):
        return "it depends on the step: measure it with eval.run"
    if method.varies:
        return "its cost depends on the image: measure it with eval.run"
    if fusion is not None and scope == "attention" and set(fusion.layers) != {"attn"}:
        return "this scope has only self-attention"
    return ""


@dataclass(frozen=True)
class Setup:
    """What the rows of one comparison have in common: a model and its input."""

    case: Case | TransformerCase
    scope: str
    backend: str
    ratio: float
    batch: int
    dtype: torch.dtype

    @property
    def what(self) -> str:
        """The part of the model, for people."""
        return what(self.scope, isinstance(self.case, TransformerCase))

    def build(self, device: torch.device) -> tuple[Any, Call]:
        """The model and the arguments of a call."""
        if isinstance(self.case, TransformerCase):
            return transformer_shapes.build(self.case, self.batch, device, self.dtype, whole=self.scope == "unet")
        if self.scope == "unet":
            model, call = model_shapes.unet(self.case, self.batch, device, self.dtype)
        else:
            only_attention = self.scope == "attention"
            model, call = model_shapes.top_level(
                self.case, self.batch, device, self.dtype, only_attention=only_attention
            )
        if self.backend == "slicing":
            for module in model.modules():
                if isinstance(module, Attention):
                    module.set_attention_slice(max(1, module.sliceable_head_dim // 2))  # "auto" of diffusers
        return model, call

    def describe(self, device: torch.device) -> dict[str, Any]:
        """The entries of a row that describe the setup."""
        dtype = str(self.dtype).removeprefix("torch.")
        ceilings = self.case.ceilings(self.ratio) if isinstance(self.case, TransformerCase) else None
        return {"case": self.case.name, "scope": self.scope, "ratio": self.ratio, "batch": self.batch,
                "device": device.type, "dtype": dtype, "backend": self.backend,
                **({"ceilings": ceilings} if ceilings else {})}  # fmt: skip


@dataclass
class Contender:
    """One method, to be timed. mode: of torch.compile, None for eager."""

    method: str
    key: str
    mode: str | None
    run: Callable[[], Any] = lambda: None
    calls: int = 1  # steps in a timed sample
    seconds: list[float] = field(default_factory=list)
    scratch: int | None = None
    kernels: int | None = None
    skipped: str = ""

    def prepare(self, model: Any, call: Call, period: int, device: torch.device) -> None:
        """Compiles, warms up, and measures memory and kernels.

        Args:
            model: with the method applied.
            call: the arguments of a step.
            period: after how many steps the model repeats itself.
            device: where it runs.
        """
        if self.mode is not None:
            model = torch.compile(model, mode=self.mode, dynamic=False)
        schedule = itertools.cycle(timesteps(period).to(device))
        self.run = lambda: model(call.sample, next(schedule), **call.more)
        self.calls = period

        def run_period() -> None:
            for _ in range(period):
                self.run()

        run_period()  # compiles, and allocates what a first call allocates
        self.scratch = peak(run_period, device)
        kernels = launched_kernels(run_period, device)
        self.kernels = None if kernels is None else round(kernels / period)
        self.sample(device)
        self.calls *= math.ceil(MIN_SAMPLE_SECONDS / (period * self.seconds.pop()))

    def sample(self, device: torch.device) -> None:
        """Times one sample; the device is synchronized around it."""
        synchronize(device)
        start = time.perf_counter()
        for _ in range(self.calls):
            self.run()
        synchronize(device)
        self.seconds.append((time.perf_counter() - start) / self.calls)

    def row(self, times: dict[str, list[float]]) -> dict[str, Any]:
        """The row of the results. times: seconds of all methods, by name."""
        same = {"method": self.method, "key": self.key, "compiled": self.mode is not None, "mode": self.mode}
        if self.skipped:
            return {**same, "skipped": self.skipped}
        baseline, ideal_times = times.get(BASELINE.name), times.get("ideal")
        share = None
        if baseline and ideal_times and self.method not in (BASELINE.name, "ideal"):
            saving = _figure(lambda b, m, i: b - i, baseline, self.seconds, ideal_times)
            if saving["low"] > 0:  # else a share of it is meaningless
                share = _figure(lambda b, m, i: (b - m) / (b - i), baseline, self.seconds, ideal_times)
        p20, p50, p80 = torch.tensor(self.seconds).double().quantile(QUANTILES).tolist()
        return {
            **same,
            "p20": p20,
            "p50": p50,
            "p80": p80,
            "samples": self.seconds,  # in the order of the rounds, which are the same for all rows
            "speedup": _figure(lambda b, m, i: b / m, baseline, self.seconds, baseline) if baseline else None,
            "share": share,
            "scratch_bytes": self.scratch,
            "kernels": self.kernels,
        }


def _figure(formula: Callable[[Tensor, Tensor, Tensor], Tensor], *seconds: list[float]) -> dict[str, float]:
    """A formula of three medians, with a 95 % interval from resampling the rounds, which are common to all three."""
    times = torch.tensor(seconds, dtype=torch.float64)  # [3, rounds]
    generator = torch.Generator().manual_seed(0)
    resampled = torch.randint(times.shape[1], (RESAMPLES, times.shape[1]), generator=generator)
    values = formula(*times[:, resampled].quantile(0.5, dim=-1))
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": formula(*times.quantile(0.5, dim=-1)).item(), "low": low, "high": high}


def profiler(**options: Any) -> profile:
    """The profiler of torch. Its library does not log: it would report a missing GPU driver as an error."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the first profiler starts
    return profile(**options)


def peak(run: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes of one call above what was allocated before; None where torch does not report it."""
    if device.type not in ("cpu", "cuda"):
        return None
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profiler(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def launched_kernels(run: Callable[[], Any], device: torch.device) -> int | None:
    """How many CUDA kernels one call launches; None on other devices."""
    if device.type != "cuda":
        return None
    with profiler(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        synchronize(device)
    return sum(e.device_type() == torch.profiler.DeviceType.CUDA for e in recorded.profiler.kineto_results.events())


def what(scope: str, transformer: bool) -> str:
    """The part of a model that a scope is, for people."""
    return OF_TRANSFORMERS[scope] if transformer else SCOPES[scope]


def _setups(found: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows) of each comparison, in the order of the results."""
    titled: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        part = what(row["scope"], "ceilings" in row)
        compiled = f", torch.compile {row['mode']}" if row["compiled"] else ""
        backend = "" if row["backend"] == "default" else f", {row['backend']} attention"
        titled.setdefault(f"{row['case']}, {part}, batch {row['batch']}{compiled}{backend}", []).append(row)
    return list(titled.items())
