"""Times methods and compares them with the ideal saving: `python -m eval.bench`.

Models of real sizes with random weights. All methods are interleaved in one process, round after
round, so that other load on the machine affects all of them equally. `ideal` runs self-attention on the first
N (1 - ratio) tokens, with no matching, merging or unmerging: the most that merging could save. A method's share of it
is (baseline - method) / (baseline - ideal). (Methods that merge in other layers too can save more.)
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from .. import EvalError
from ..common import provenance
from ..common.cli import choices
from ..common.devices import pick_device, pick_dtype
from ..common.schema_changes import SCHEMA
from ..methods.method import BASELINE, Method
from ..methods.registry import parse as parse_methods
from .contender import (
    BACKENDS,
    MODES,
    OUT_OF_TIME,
    SCOPES,
    Contender,
    Setup,
    allow_graphs,
    unsuitable_reason,
)
from .ideal import ideal
from .model_shapes import CASES, Case, shared_weights_copy
from .transformer_shapes import CASES as TRANSFORMERS
from .transformer_shapes import TransformerCase

DEFAULT_SCOPES = "attention,unet"
DEFAULT_METHODS = "tomesd,tome,tofu,tofu+p,kv:tofu"
TRANSFORMER_DEFAULTS = ("block", "tofu+p,tome+p,tome+p@window=8,kv:tome+p@matching=cells@ratio=0.75")


def bench(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Runs a benchmark.

    Args:
        options: of the command.
        argv: its arguments, for the provenance.

    Returns:
        The results: settings, rows and provenance.
    """
    if options.quick:
        options.case, options.scope, options.rounds = "sd15-512", "attention", 10
    device = pick_device(options.device)
    setups = setups_of(options, pick_dtype(options.dtype, device))
    modes = [None if mode == "no" else mode for mode in choices(options.compile, MODES, "mode of torch.compile")]
    rows: list[dict[str, Any]] = []
    metadata = provenance.begin("eval.bench", argv, device)
    began = time.monotonic()
    dtype = str(setups[0][0].dtype).removeprefix("torch.")
    names = ", ".join(dict.fromkeys(["baseline", "ideal", *(m.name for _, chosen in setups for m in chosen)]))
    print(
        f"timing {names} on {provenance.device_name(device)}, {dtype}, random weights, {options.rounds} rounds",
        file=sys.stderr,
    )
    for setup, chosen in setups:
        for mode in modes:
            if options.minutes and time.monotonic() - began > 60 * options.minutes:
                rows.append({**setup.describe(device), **Contender("all", "all", mode, skipped=OUT_OF_TIME).row({})})
            else:
                rows += measure(setup, chosen, mode, options.rounds, device)
    metadata |= {"process_mib": None, "ended": provenance.now()}
    settings = {"ratio": options.ratio, "batch": options.batch, "rounds": options.rounds,
                "device": provenance.device_name(device), "dtype": dtype,
                "torch": str(torch.__version__)}  # fmt: skip
    return {"schema": SCHEMA, "settings": settings, "rows": rows, "provenance": metadata}


def setups_of(options: argparse.Namespace, dtype: torch.dtype) -> list[tuple[Setup, list[Method]]]:
    """Returns what is measured: each setup, and its methods besides the baseline and the ideal.

    Args:
        options: of the command.
        dtype: of weights and samples.

    Raises:
        EvalError: an unknown name, or a scope that a case does not have.
    """
    backends = choices(options.backend, BACKENDS, "backend")
    setups = []
    for name in choices(options.case, {**CASES, **TRANSFORMERS}, "case"):
        case: Case | TransformerCase = TRANSFORMERS[name] if name in TRANSFORMERS else CASES[name]
        by_default = TRANSFORMER_DEFAULTS if name in TRANSFORMERS else (DEFAULT_SCOPES, DEFAULT_METHODS)
        scopes = choices(options.scope or by_default[0], SCOPES, "scope")
        if name in TRANSFORMERS and "attention" in scopes:
            raise EvalError(f"{name} is a transformer, which has no scope attention: give block or unet")
        methods = parse_methods(options.method or by_default[1], [options.ratio])
        chosen = [method for method in methods if method is not BASELINE]
        setups += [
            (Setup(case, scope, backend, options.ratio, options.batch, dtype), chosen)
            for scope in scopes for backend in backends
        ]  # fmt: skip
    return setups


def measure(
    setup: Setup, chosen: Sequence[Method], mode: str | None, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Measures one setup.

    Args:
        setup: the model and its input.
        chosen: the methods, besides the baseline and the ideal.
        mode: of torch.compile; None for eager.
        rounds: samples of each method.
        device: where it runs.

    Returns:
        The rows: baseline, ideal and every method.
    """
    title = f"{setup.case.title}, {setup.what}" + (f", torch.compile {mode}" if mode else "")
    print(title, file=sys.stderr)
    with (
        tqdm(total=2 + len(chosen) + rounds, unit="phase", file=sys.stderr) as bar,
        torch.no_grad(), BACKENDS[setup.backend](), allow_graphs(2 + len(chosen)), contextlib.ExitStack() as patches,
    ):  # fmt: skip
        bar.set_description("building the model")
        model, call = setup.build(device)
        latent = setup.case.latent if isinstance(setup.case, TransformerCase) else call.sample.shape[-1]
        best = Method("ideal", "ideal", apply=partial(ideal, ratio=setup.ratio, latent=latent))
        torch._dynamo.reset()  # graphs of earlier models count against the limit, beyond which everything runs eagerly
        contenders: list[Contender] = []
        for method in (BASELINE, best, *chosen):
            bar.set_description(f"preparing {method.name}")
            contender = Contender(method.name, method.slug, mode, skipped=unsuitable_reason(method, setup.scope))
            contenders.append(contender)
            if not contender.skipped:
                own_model = shared_weights_copy(model)
                try:
                    patches.enter_context(method.apply(own_model))
                    contender.prepare(own_model, call, method.period, device)
                except Exception as error:  # an error of a method or compiler is a row with that error
                    contender.skipped = " ".join(str(error).split())[:160]
            bar.update()
        running = [contender for contender in contenders if not contender.skipped]
        bar.set_description("timing")
        for turn in range(rounds):
            for i in range(len(running)):  # each round begins with another one
                running[(turn + i) % len(running)].sample(device)
            bar.update()
    base = {contender.method: contender.seconds for contender in running}
    described = setup.describe(device)
    return [{**described, **c.row(base)} for c in contenders]
