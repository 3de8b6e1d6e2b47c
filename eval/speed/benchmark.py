"""How fast, and how much of what could be saved: `python -m eval.bench`.

Models of Stable Diffusion's real sizes with random weights. All methods run in turns in one process, round after round,
so that what else the machine does falls on all alike. `ideal` runs self-attention on the first N (1 - ratio) tokens,
with no matching, merging or unmerging: what fusion could save at most. A method's share of it is
(full - method) / (full - ideal). (What fuses more than the top level's self-attention can save more.)
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ..common import provenance
from ..common.cli import choices
from ..common.devices import pick_device, pick_dtype
from ..methods import registry as methods
from ..methods.method import BASELINE, Method
from . import model_shapes as shapes
from .contender import BACKENDS, MODES, OUT_OF_TIME, SCOPES, Contender, Setup, _graphs, _unfit, ideal
from .model_shapes import CASES

SCHEMA = 1
DEFAULT_SCOPES = "attention,unet"
DEFAULT_METHODS = "tomesd,tome,tofu,tofu+p,kv:tofu"


def bench(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What results hold: rows, and the circumstances they were measured in."""
    if options.quick:
        options.case, options.scope, options.rounds = "sd15-512", "attention", 10
    cases = [CASES[name] for name in choices(options.case, CASES, "case")]
    scopes = choices(options.scope or DEFAULT_SCOPES, SCOPES, "scope")
    backends = choices(options.backend, BACKENDS, "backend")
    chosen = [m for m in methods.parse(options.method or DEFAULT_METHODS, [options.ratio]) if m is not BASELINE]
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
    best = Method("ideal", "ideal", apply=partial(ideal, ratio=setup.ratio, latent=latent))
    contenders: list[Contender] = []
    torch._dynamo.reset()  # graphs of models that are gone count against the limit, beyond which all runs eagerly
    with torch.no_grad(), BACKENDS[setup.backend](), _graphs(2 + len(chosen)), contextlib.ExitStack() as patches:
        for method in (BASELINE, best, *chosen):
            contender = Contender(method.name, method.slug, mode, skipped=_unfit(method, setup.scope))
            contenders.append(contender)
            if contender.skipped:
                continue
            twin = shapes.twin(model)
            try:
                patches.enter_context(method.apply(twin))
                contender.ready(twin, call, method.period, device)
            except Exception as error:  # whatever a peer or a compiler does not bear is a row that says so
                contender.skipped = " ".join(str(error).split())[:160]
        running = [contender for contender in contenders if not contender.skipped]
        for turn in tqdm(range(rounds), unit="round", leave=False):
            for i in range(len(running)):  # another one begins each round
                running[(turn + i) % len(running)].sample(device)
    base = {contender.method: contender.seconds for contender in running}
    return [{**setup.told(device), **c.row(base)} for c in contenders]
