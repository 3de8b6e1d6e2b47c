"""What token reduction costs a classifier: the work behind `python -m research.classifiers.classify`.

It measures accuracy, FLOPs and images per second of each method at each r, over all classifiers of a name, as in the
tables of ToFu (1 to 3) and ATM (1). Thresholds, which have no r, are set to ToMe's FLOPs at the same r.
"""

from __future__ import annotations

import argparse
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
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from eval import EvalError
from eval.common import provenance
from eval.common.cli import finite, flag, progress
from eval.common.devices import pick_device, pick_dtype
from eval.common.files import png, write, write_results
from eval.common.schema_changes import SCHEMA
from eval.metrics.statistics import bootstrap
from tofu_sd.hosts import timm as host
from tofu_sd.hosts import timm_linearity
from tofu_sd.timing import synchronize

from ..demo_training.recipe import TEST_SEED
from . import datasets as labelled
from . import models as classifiers
from .calibration import calibrate_thresholds, candidate_rs, cosine_distance, largest_at_full_accuracy
from .datasets import Labelled
from .figures import maps, plot
from .methods import BASELINE, Method, parse
from .models import Classifier
from .predictions import Evaluation, Predictions
from .tables import CALIBRATION, FRESH, RS, spread

APPLICABLE = {"table": ("rows", "plot"), "linearity": ("plot",)}  # the options beside --table and --linearity


def refuse_idle(options: argparse.Namespace, typed: Collection[str]) -> None:
    """Raises EvalError for options that would have no effect beside the others."""
    shown = next((name for name in APPLICABLE if getattr(options, name)), None)
    for name in sorted(typed):
        if shown and name not in (shown, *APPLICABLE[shown]):
            raise EvalError(f"{flag(name)} has no effect with --{shown}")
    if "rows" in typed and not shown:
        raise EvalError("--rows needs --table")
    if "plot" in typed and options.stress:
        raise EvalError("--plot draws methods at several r, and --stress finds one for each")


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is evaluated: checked before anything is measured.

    Args:
        models: the classifiers.
        methods: to be evaluated; the baseline is always evaluated too.
        tried: the r of the stress test, rising from 0; None without it.
        evaluation: the images.
    """

    models: list[Classifier]
    methods: list[Method]
    tried: list[int] | None
    evaluation: Evaluation


def run(options: argparse.Namespace, argv: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """Returns (the content of classify.json, the folder). EvalError, before anything is measured, for bad options."""
    device = pick_device(options.device)
    record = provenance.begin("research.classifiers.classify", argv, device)
    plan = make_plan(options, device)
    results = evaluate(plan)
    time_interleaved(plan.evaluation, plan.models[0], results, options.rounds)
    groups, batch = plan.evaluation.groups(), min(plan.evaluation.n, options.batch)
    record |= {"process_mib": None, "ended": provenance.now()}
    content = {
        "schema": SCHEMA, "settings": settings_of(plan, options, device),
        "rows": [result.row(results, groups, batch) for result in results],
        "linearity": linearity_of(plan, device), "provenance": record,
    }  # fmt: skip
    write_outputs(content, plan, results, options)
    return content, plan.evaluation.out


def make_plan(options: argparse.Namespace, device: torch.device) -> Plan:
    """Loads classifiers and images, and checks that each method fits. EvalError where one does not."""
    models = classifiers.load(options.model, device, pick_dtype(options.dtype, device))
    try:
        layers = min(len(host.find_blocks(one.model)) for one in models)
    except ValueError as error:
        raise EvalError(f"--model {options.model}: {error}") from error
    tried = sorted({0, *(options.r or candidate_rs(models[0].model))}) if options.stress else None
    methods = parse(options.method, [max(tried)] if tried else options.r or RS, layers)
    if tried:
        _check_stress(methods)
    data = images_for(models[0], options.data, options.noise)
    _check_fit(models, methods, layers)
    n = min(options.limit or len(data), len(data))
    out = options.out or Path("runs") / f"classify-{Path(options.model.partition(',')[0]).name}"
    return Plan(models, methods, tried, Evaluation(data, n, options.batch, device, out))


def _check_stress(methods: Sequence[Method]) -> None:
    """Raises EvalError for methods that set what the stress test searches."""
    for method in methods:
        if "@r=" in method.name or (method.adaptive and method.r is None):
            what = "thresholds" if method.adaptive else "r"
            raise EvalError(f"--stress searches {what} itself, and {method.name!r} sets it")


def _check_fit(models: Sequence[Classifier], methods: Sequence[Method], layers: int) -> None:
    """Raises EvalError for a method that does not fit a classifier."""
    for method in methods:
        # thresholds are set to ToMe's FLOPs, so ToMe has to fit too
        own = [method, *(parse("tome", [method.r], layers) if method.adaptive and method.r is not None else [])]
        for one, candidate in product(models, own):
            try:
                with candidate.apply(one.model):
                    pass
            except (ValueError, TypeError) as error:
                raise EvalError(f"method {method.name!r} does not fit {one.name!r}: {error}") from error


def evaluate(plan: Plan) -> list[MethodResult]:
    """Returns the results of all methods, the baseline first; in a stress test at the largest r of full accuracy."""
    baseline = MethodResult.of(plan.evaluation, plan.models, BASELINE)
    others = dict.fromkeys(method for method in plan.methods if method is not BASELINE)
    if plan.tried:
        return [baseline, *(max_r_at_full_accuracy(plan, method, baseline) for method in others)]
    return [baseline, *(MethodResult.of(plan.evaluation, plan.models, method) for method in others)]


def max_r_at_full_accuracy(plan: Plan, method: Method, baseline: MethodResult) -> MethodResult:
    """Returns a method's result at the largest r at which its accuracy is the baseline's (ATM's table 1)."""
    results: dict[int, MethodResult] = {}

    def accuracy_at(r: int) -> float:
        results[r] = MethodResult.of(plan.evaluation, plan.models, method.at(r))
        return results[r].correct.mean().item()

    assert plan.tried is not None
    return results[largest_at_full_accuracy(plan.tried, accuracy_at, baseline.correct.mean().item())]


def settings_of(plan: Plan, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Returns the settings in classify.json."""
    models, data = plan.models, plan.evaluation.data
    dtype = str(pick_dtype(options.dtype, device)).removeprefix("torch.")
    return {
        "model": ", ".join(dict.fromkeys(one.name for one in models)),
        "classifiers": len(models), "seeds": [one.seed for one in models],
        "weights": [provenance.weights_hash(one.model) for one in models],
        "data": data.name, "n": plan.evaluation.n, "classes": len(data.classes), "batch": options.batch,
        "side": models[0].side, "stress": options.stress, "tried": plan.tried, "rounds": options.rounds,
        "dtype": dtype, "linearity_of": "MLP with the norm before it",
        "device": provenance.device_name(device), "torch": str(torch.__version__), "timm": timm.__version__,
    }  # fmt: skip


def linearity_of(plan: Plan, device: torch.device) -> list[list[float]]:
    """Returns the functional linearity of each layer's MLP on a few images, for each classifier."""
    count = min(CALIBRATION, plan.evaluation.n)
    images = next(iter(DataLoader(Subset(plan.evaluation.data.images, range(count)), CALIBRATION)))[0].to(device)
    # in float32: rounding in half precision would count as curvature
    return [timm_linearity.linearity(deepcopy(one.model).float(), images).mean(dim=1).tolist() for one in plan.models]


def write_outputs(
    content: dict[str, Any], plan: Plan, results: Sequence[MethodResult], options: argparse.Namespace
) -> None:
    """Writes classify.json, the plot and the maps."""
    write_results(plan.evaluation.out / "classify.json", content)
    if not options.stress:
        drawing = plot(content)
        write(plan.evaluation.out / "plot.svg", drawing)
        if options.plot:
            write(options.plot, drawing)
    if options.maps:
        methods = [result.calibrated[0] for result in results[1:]]
        write(options.maps, png(maps(plan.evaluation, plan.models[0], methods)))


def deviation(text: str) -> float:
    """Parses a standard deviation of noise, for argparse."""
    sigma = finite(text)
    if sigma < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is below 0")
    return sigma


def images_for(classifier: Classifier, name: str, noise: float = 0) -> Labelled:
    """Returns the images that a classifier is evaluated on.

    Args:
        classifier: its size and transform are used.
        name: "scenes", or a folder with a folder for each class.
        noise: standard deviation of Gaussian noise.

    Raises:
        EvalError: the number of classes is not the classifier's, or noise is given for images that are not in 0..1.
    """
    if noise and not classifier.own:
        raise EvalError(f"--noise is {noise:g}; it needs images in 0..1, which {classifier.name!r} does not take")
    if name == "scenes":
        data = labelled.rendered(classifier.side, FRESH, TEST_SEED)
    elif classifier.own:
        data = labelled.folder(Path(name), labelled.plain(classifier.side))
    else:
        config = timm.data.resolve_model_data_config(classifier.model)
        data = labelled.folder(Path(name), timm.data.create_transform(**config))
    classes = getattr(classifier.model, "num_classes", None)
    if classes is not None and classes != len(data.classes):
        raise EvalError(f"{data.name!r} has {len(data.classes)} classes, and {classifier.name!r} has {classes}")
    return labelled.noisy(data, noise) if noise else data


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodResult:
    """A method, as calibrated for each classifier, and its predictions.

    Args:
        method: as on the command line.
        calibrated: for each classifier, with its thresholds.
        predictions: of each classifier.
        seconds: of the first classifier's timed batches.
    """

    method: Method
    calibrated: list[Method]
    predictions: list[Predictions]
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, evaluation: Evaluation, models: Sequence[Classifier], method: Method) -> MethodResult:
        """Evaluates a method on all classifiers."""
        calibrated = [calibrate_thresholds(evaluation, one, method) for one in models]
        pairs = zip(models, calibrated, strict=True)
        return cls(method, calibrated, [evaluation.predictions(one, own) for one, own in pairs])

    @property
    def correct(self) -> Tensor:
        """Which images each classifier classifies correctly: float64 [classifiers, n] of 0 and 1."""
        return torch.stack([each.correct for each in self.predictions]).double()

    def feature_shift(self, baseline: MethodResult) -> Tensor:
        """Returns the feature shift (1 - cosine) of each image, the mean over the classifiers: [n].

        Features are the input of the last linear layer. They separate methods of equal accuracy (ATM Fig. 2).
        """
        pairs = zip(self.predictions, baseline.predictions, strict=True)
        return torch.stack([cosine_distance(own.features, full.features) for own, full in pairs]).mean(0)

    def row(self, results: Sequence[MethodResult], groups: Sequence[str], batch: int) -> dict[str, Any]:
        """Returns the row in classify.json.

        Args:
            results: all results, the baseline's first.
            groups: the class of each image.
            batch: images in a timed batch.
        """
        tome = next((e for e in results if (e.method.name, e.method.r) == ("tome", self.method.r)), None)
        rates = [batch / seconds for seconds in self.seconds]
        ratios = [full / own for full, own in zip(results[0].seconds, self.seconds, strict=True)]
        ahead = None
        if tome is not None and tome is not self and self.method.r is not None:
            ahead = interval((self.correct - tome.correct).mean(0), groups)
        return {
            "method": self.method.name, "r": self.method.r, "label": self.method.label,
            "settings": [each.settings for each in self.predictions],
            "accuracy": {**interval(self.correct.mean(0), groups), "by_classifier": self.correct.mean(1).tolist()},
            "ahead_of_tome": ahead,
            "feature_shift": None if self is results[0] else interval(self.feature_shift(results[0]), groups),
            "flops": mean(each.flops for each in self.predictions),
            "tokens": mean(each.tokens for each in self.predictions),
            "images_per_second": spread(rates) if rates else None, "speedup": spread(ratios) if ratios else None,
        }  # fmt: skip


def interval(values: Tensor, groups: Sequence[str]) -> dict[str, float | None]:
    """Returns the mean of values [n] and its 95 % interval over classes."""
    low, high = bootstrap(values, groups) or (None, None)
    return {"value": values.mean().item(), "low": low, "high": high}


@torch.no_grad()
def time_interleaved(evaluation: Evaluation, one: Classifier, results: Sequence[MethodResult], rounds: int) -> None:
    """Times one batch of each method in each round. Methods run interleaved, so that other load affects all equally."""
    images, _ = next(iter(evaluation.batches(min(evaluation.n, evaluation.batch))))
    images = images.to(next(one.model.parameters()))
    for turn in progress(range(rounds + 1 if rounds else 0), "rounds"):
        for i in range(len(results)):
            result = results[(i + turn) % len(results)]
            with result.calibrated[0].apply(one.model):
                synchronize(evaluation.device)
                start = time.perf_counter()
                one.model(images)
                synchronize(evaluation.device)
            if turn:  # the first warms up
                result.seconds.append(time.perf_counter() - start)
