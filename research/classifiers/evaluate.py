"""What token reduction costs a classifier: the work behind `python -m research.classifiers.classify`.

Accuracy, operations and images a second of each method at each r, over all classifiers that a name stands for: the
tables of ToFu (1 to 3) and ATM (1). Thresholds, which know of no r, are set to the operations that ToMe has at it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from eval import EvalError
from eval.common import provenance
from eval.common.cli import finite, working, written
from eval.common.devices import pick_device, pick_dtype
from eval.common.files import png, write, write_results
from eval.metrics.statistics import bootstrap
from tofu_sd.hosts import timm as host
from tofu_sd.hosts import timm_linearity
from tofu_sd.patching.autotune import synchronize

from ..demo_training.recipe import TEST_SEED
from . import datasets as labelled
from . import models as classifiers
from .datasets import Labelled
from .figures import maps, plot
from .methods import FULL, Method, parse
from .models import Classifier
from .predictions import Bench, Judged, judge
from .tables import CALIBRATION, CURVES, FRESH, RS, SCHEMA, spread

SCALES, HALVINGS = (1e-6, 1.0), 10  # of a curve, on a logarithmic scale
TAKES = {"table": ("rows", "plot"), "linearity": ("plot",)}  # what parts of a folder's results take


def refuse_idle(options: argparse.Namespace, typed: Collection[str]) -> None:
    """EvalError for options that would do nothing beside what is asked for."""
    shown = next((name for name in TAKES if getattr(options, name)), None)
    for name in sorted(typed):
        if shown and name not in (shown, *TAKES[shown]):
            raise EvalError(f"{written(name)} says nothing of --{shown}")
    if "rows" in typed and not shown:
        raise EvalError("--rows is of --table alone")
    if "plot" in typed and options.stress:
        raise EvalError("--plot draws methods at several r, and --stress finds one of each")


def run(options: argparse.Namespace, argv: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """(what classify.json holds, the folder). EvalError for what cannot be, before anything is measured."""
    device = pick_device(options.device)
    told = provenance.begin("research.classifiers.classify", argv, device)
    dtype = pick_dtype(options.dtype, device)
    models = classifiers.load(options.model, device, dtype)
    try:
        layers = min(len(host.find_blocks(one.model)) for one in models)
    except ValueError as error:
        raise EvalError(f"--model {options.model}: {error}") from error
    tried = sorted({0, *(options.r or all_of(models[0].model))}) if options.stress else None
    chosen = parse(options.method, [max(tried)] if tried else options.r or RS, layers)
    for method in chosen if tried else ():
        if "@r=" in method.name or (method.adaptive and method.r is None):
            what = "thresholds" if method.adaptive else "r"
            raise EvalError(f"--stress finds {what} itself, and {method.name!r} gives it")
    data = pictures_for(models[0], options.data, options.noise)
    n = min(options.limit or len(data), len(data))
    for method in chosen:
        # thresholds are set to the operations of ToMe, which has to fit too
        own = [method, *(parse("tome", [method.r], layers) if method.adaptive and method.r is not None else [])]
        for one, asked in product(models, own):
            try:
                with asked.apply(one.model):
                    pass
            except (ValueError, TypeError) as error:
                raise EvalError(f"method {method.name!r} does not fit {one.name!r}: {error}") from error
    out = options.out or Path("runs") / f"classify-{Path(options.model.partition(',')[0]).name}"
    bench = Bench(data, n, options.batch, device, out)
    if tried:
        full = Entry.of(bench, models, FULL)
        best = [most_saving(bench, models, method, full, tried) for method in chosen if method is not FULL]
        entries = [full, *best]
    else:
        entries = [Entry.of(bench, models, method) for method in dict.fromkeys([FULL, *chosen])]
    time_in_turns(bench, models[0], entries, options.rounds)
    rows = [entry.row(entries, bench.groups(), min(n, options.batch)) for entry in entries]
    told |= {"process_mib": None, "ended": provenance.now()}
    settings = {
        "model": ", ".join(dict.fromkeys(one.name for one in models)),
        "classifiers": len(models), "seeds": [one.seed for one in models],
        "weights": [provenance.weights_hash(one.model) for one in models],
        "data": data.name, "n": n, "classes": len(data.classes), "batch": options.batch, "side": models[0].side,
        "stress": options.stress, "tried": tried, "rounds": options.rounds, "dtype": str(dtype).removeprefix("torch."),
        "linearity_of": "MLP with the norm before it",
        "device": provenance.device_name(device), "torch": str(torch.__version__), "timm": timm.__version__,
    }  # fmt: skip
    held = next(iter(DataLoader(Subset(data.pictures, range(min(CALIBRATION, n))), CALIBRATION)))[0].to(device)
    # what half precision rounds away would be taken for a bend
    straight = [timm_linearity.linearity(deepcopy(one.model).float(), held).mean(dim=1).tolist() for one in models]
    found = {"schema": SCHEMA, "settings": settings, "rows": rows, "linearity": straight, "provenance": told}
    write_results(out / "classify.json", found)
    if not options.stress:
        drawing = plot(found)
        write(out / "plot.svg", drawing)
        if options.plot:
            write(options.plot, drawing)
    if options.maps:
        write(options.maps, png(maps(bench, models[0], [entry.settled[0] for entry in entries[1:]])))
    return found, out


def deviation(text: str) -> float:
    """A standard deviation of noise, as an argument's type."""
    sigma = finite(text)
    if sigma < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is below 0")
    return sigma


def pictures_for(classifier: Classifier, name: str, noise: float = 0) -> Labelled:
    """The pictures that a classifier is judged by, under noise of a deviation.

    EvalError where their classes are not as many as it knows, or noise is to lie on what is no longer 0..1.
    """
    if noise and not classifier.own:
        raise EvalError(f"--noise is {noise:g}; it takes pictures in 0..1, which {classifier.name!r} does not")
    if name == "scenes":
        data = labelled.rendered(classifier.side, FRESH, TEST_SEED)
    elif classifier.own:
        data = labelled.folder(Path(name), labelled.plain(classifier.side))
    else:
        config = timm.data.resolve_model_data_config(classifier.model)
        data = labelled.folder(Path(name), timm.data.create_transform(**config))
    knows = getattr(classifier.model, "num_classes", None)
    if knows is not None and knows != len(data.classes):
        raise EvalError(f"{data.name!r} has {len(data.classes)} classes, and {classifier.name!r} tells {knows} apart")
    return labelled.noisy(data, noise) if noise else data


@dataclass(frozen=True)
class Entry:
    """One row in the making: a method, as it is for each classifier, and what each did under it."""

    method: Method
    settled: list[Method]
    judged: list[Judged]
    seconds: list[float] = field(default_factory=list)  # of the first classifier's timed batches

    @classmethod
    def of(cls, bench: Bench, models: Sequence[Classifier], method: Method) -> Entry:
        settled = [settle(bench, one, method) for one in models]
        return cls(method, settled, [bench.judge(one, own) for one, own in zip(models, settled, strict=True)])

    @property
    def rights(self) -> Tensor:
        """Which pictures each classifier names right: float64 [classifiers, n] of 0 and 1."""
        return torch.stack([each.right for each in self.judged]).double()

    def moved(self, full: Entry) -> Tensor:
        """How far what the last linear layer is shown lies from the full model's, 1 - cosine, by picture: [n].

        The mean over the classifiers. It tells methods apart where accuracy no longer does (ATM Fig. 2 measures it).
        """
        pairs = zip(self.judged, full.judged, strict=True)
        return torch.stack([apart(own.seen, whole.seen) for own, whole in pairs]).mean(0)

    def row(self, entries: Sequence[Entry], groups: Sequence[str], batch: int) -> dict[str, Any]:
        """Of the results. entries: all of them, the full model's first. groups: the class of each picture."""
        tome = next((e for e in entries if (e.method.name, e.method.r) == ("tome", self.method.r)), None)
        rates = [batch / seconds for seconds in self.seconds]
        ratios = [full / own for full, own in zip(entries[0].seconds, self.seconds, strict=True)]
        ahead = None
        if tome is not None and tome is not self and self.method.r is not None:
            ahead = interval((self.rights - tome.rights).mean(0), groups)
        return {
            "method": self.method.name, "r": self.method.r, "label": self.method.label,
            "told": [each.told for each in self.judged],
            "accuracy": {**interval(self.rights.mean(0), groups), "by_classifier": self.rights.mean(1).tolist()},
            "ahead_of_tome": ahead,
            "moved": None if self is entries[0] else interval(self.moved(entries[0]), groups),
            "flops": mean(each.flops for each in self.judged), "tokens": mean(each.tokens for each in self.judged),
            "images_per_second": spread(rates) if rates else None, "speedup": spread(ratios) if ratios else None,
        }  # fmt: skip


def interval(values: Tensor, groups: Sequence[str]) -> dict[str, float | None]:
    """The mean of values [n] and its 95 % interval over classes."""
    low, high = bootstrap(values, groups) or (None, None)
    return {"value": values.mean().item(), "low": low, "high": high}


@torch.no_grad()
def settle(bench: Bench, one: Classifier, method: Method) -> Method:
    """A method whose thresholds are set to ToMe's operations at its r; any other as it is.

    ATM's authors sweep three parameters for each amount of operations, and keep what names most pictures right. Here no
    label is looked at: each of `CURVES` is scaled until it has ToMe's operations on pictures held apart, and the one by
    which their features move least is taken.
    """
    if not method.adaptive or method.r is None:
        return method
    if method.r == 0:
        return FULL
    held = bench.held()

    def judged(asked: Method) -> Judged:
        return judge(one.model, asked, held)

    def scaled(curve: tuple[float, float]) -> Method:
        low, high = (math.log(scale) for scale in SCALES)  # hardly anything is fused, all that can be
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            few = judged(method.falling(curve, math.exp(middle))).flops > aim
            low, high = (middle, high) if few else (low, middle)
        return method.falling(curve, math.exp(high))

    aim = judged(parse("tome", [method.r], len(host.find_blocks(one.model)))[0]).flops
    full = judged(FULL).seen
    tried = [(m, judged(m)) for m in map(scaled, CURVES)]
    reached = [(m, found) for m, found in tried if found.flops <= aim]  # one that cannot fuse as much moves less
    if not reached:
        return min(tried, key=lambda each: each[1].flops)[0]
    return min(reached, key=lambda each: apart(each[1].seen, full).mean().item())[0]


def apart(own: Tensor, full: Tensor) -> Tensor:
    """How far features [n, C] lie from the full model's, 1 - cosine: float64 [n]. Equal ones may round beyond 1."""
    return (1 - F.cosine_similarity(own.double(), full.double(), dim=-1)).clamp_min(0)


def most_saving(bench: Bench, models: Sequence[Classifier], method: Method, full: Entry, tried: Sequence[int]) -> Entry:
    """A method at the largest r of those `tried`, rising from 0, at which its accuracy over all classifiers, as ATM's
    table 1 prints it, is the full model's; thresholds at the operations that ToMe has at that r.

    From the largest down, not by halving: accuracy falls and rises by a picture or two from one r to the next.
    """

    def printed(entry: Entry) -> float:
        return round(100 * entry.rights.mean().item(), 1)

    entries = (Entry.of(bench, models, method.at(r)) for r in reversed(tried))
    return next(entry for entry in entries if printed(entry) >= printed(full))  # at 0 at last, where nothing is fused


def all_of(model: Any) -> list[int]:
    """The r of the stress test where none are given: each with which ToMe's patch tokens last to the last layer, and on
    in steps of a quarter to half of the tokens.
    """
    tokens, most = model.patch_embed.num_patches, model.patch_embed.num_patches // 2
    rs = list(range(1 + min(most, math.ceil(tokens / max(1, len(model.blocks) - 1)))))
    while rs[-1] < most:
        rs.append(min(most, math.ceil(1.25 * rs[-1])))
    return rs


@torch.no_grad()
def time_in_turns(bench: Bench, one: Classifier, entries: Sequence[Entry], rounds: int) -> None:
    """Gives each entry its seconds for one batch, once a round. All run in turns, so that what else the machine does
    falls on all alike.
    """  # fmt: skip
    pictures, _ = next(iter(bench.batches(min(bench.n, bench.batch))))
    pictures = pictures.to(next(one.model.parameters()))
    for turn in working(range(rounds + 1 if rounds else 0), "rounds"):
        for i in range(len(entries)):
            entry = entries[(i + turn) % len(entries)]
            with entry.settled[0].apply(one.model):
                synchronize(bench.device)
                start = time.perf_counter()
                one.model(pictures)
                synchronize(bench.device)
            if turn:  # the first warms up
                entry.seconds.append(time.perf_counter() - start)
