"""Predictions of classifiers, with and without token reduction."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from eval.common import provenance
from eval.common.cli import progress
from eval.common.files import write
from eval.images.flops import FORMULAS
from eval.methods.registry import source_hash
from tofu_sd.hosts import timm as host

from .datasets import Labelled
from .methods import Method
from .models import Classifier
from .tables import CALIBRATION

SHOWN = 8  # images of --maps
MIN_SPAN = 4.0  # % of accuracy: the smallest range of the plot


@dataclass(frozen=True)
class Predictions:
    """What one classifier predicts under one method.

    Args:
        correct: [n] bool, whether each image is classified correctly.
        features: [n, C], input of the last linear layer.
        flops: of an image, on average.
        tokens: patch tokens before the last layer, on average.
        settings: of the method, with its thresholds.
    """

    correct: Tensor
    features: Tensor
    flops: float
    tokens: float
    settings: str


@dataclass(frozen=True)
class Evaluation:
    """The images of an evaluation, and its cache of predictions.

    Args:
        data: of which the first n images are evaluated.
        n: how many.
        batch: images at once.
        device: of the classifiers.
        out: folder of the cache.
    """

    data: Labelled
    n: int
    batch: int
    device: torch.device
    out: Path

    def batches(self, n: int) -> DataLoader[Any]:
        """Returns the first n images in batches."""
        return DataLoader(Subset(self.data.images, range(n)), self.batch)

    def calibration_batches(self) -> list[Any]:
        """Returns batches of images to set thresholds by; images that are not evaluated, if there are enough."""
        rest = range(self.n, len(self.data))
        pool = rest if len(rest) >= CALIBRATION else range(len(self.data))
        chosen = [pool[i * len(pool) // CALIBRATION] for i in range(min(CALIBRATION, len(pool)))]
        return list(DataLoader(Subset(self.data.images, chosen), self.batch))

    def predictions(self, one: Classifier, method: Method) -> Predictions:
        """Returns the predictions of a classifier under a method, from the cache if its key is unchanged."""
        weights = provenance.weights_hash(one.model)
        key = {
            "weights": weights, "method": method.settings, "data": self.data.key, "n": self.n, "batch": self.batch,
            "device": self.device.type, "torch": str(torch.__version__), "code": source_hash(),
        }  # fmt: skip
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        path = self.out / "predictions" / f"{name}.safetensors"
        cached = _cached(path, key)
        if cached is None:
            cached = predict(one.model, method, self.batches(self.n))
            metadata = {"key": json.dumps(key), "flops": repr(cached.flops), "tokens": repr(cached.tokens)}
            write(path, save({"correct": cached.correct, "features": cached.features}, metadata))
        return cached

    def groups(self) -> list[str]:
        """Returns the class of each image."""
        return [self.data.classes[label] for label in self.data.labels[: self.n]]


def _cached(path: Path, key: dict[str, Any]) -> Predictions | None:
    """Returns the predictions with this key; None if there are none or the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if json.loads(metadata["key"]) == key:
                correct, features = file.get_tensor("correct"), file.get_tensor("features")
                flops, tokens = float(metadata["flops"]), float(metadata["tokens"])
                return Predictions(correct, features, flops, tokens, key["method"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        pass
    return None


@torch.no_grad()
def predict(model: nn.Module, method: Method, batches: Any) -> Predictions:
    """Runs a classifier on batches of (images, labels) under a method."""
    correct: list[Tensor] = []
    features: list[Tensor] = []
    tokens: list[int] = []
    prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
    like = next(model.parameters())
    last, head = host.find_blocks(model)[-1].layers["block"], cast(nn.Module, model.head)
    with method.apply(model), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        handles = [
            last.register_forward_pre_hook(lambda m, args: tokens.append(len(args[0]) * args[0].shape[1])),
            head.register_forward_pre_hook(lambda m, args: features.append(args[0].float().cpu())),
        ]
        try:
            for _, (images, labels) in zip(progress(range(len(batches)), method.label), batches, strict=True):
                correct.append(model(images.to(like)).argmax(-1).cpu() == labels)
        finally:
            for handle in handles:
                handle.remove()
    n = sum(map(len, correct))
    flops, mean_tokens = counter.get_total_flops() / n, sum(tokens) / n - prefix
    return Predictions(torch.cat(correct), torch.cat(features), flops, mean_tokens, method.settings)
