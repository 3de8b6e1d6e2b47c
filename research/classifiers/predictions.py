"""What a classifier says of the images, with and without token reduction."""

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
from eval.common.cli import working
from eval.common.files import write
from eval.images.flops import FORMULAS
from eval.methods.registry import source_hash
from tofu_sd.hosts import timm as host

from .datasets import Labelled
from .methods import Method
from .models import Classifier
from .tables import CALIBRATION

SHOWN = 8  # pictures of --maps
LEAST_SPAN = 4.0  # % of accuracy that a drawing shows at least


@dataclass(frozen=True)
class Judged:
    """What one classifier did under one method. right [n]: bool. seen [n, C]: what its last linear layer was shown.

    flops, tokens: of a picture, on average; tokens: patch tokens that come out of the last layer but one. told: the
    method's settings, thresholds as found.
    """

    right: Tensor
    seen: Tensor
    flops: float
    tokens: float
    told: str


@dataclass(frozen=True)
class Bench:
    """The first n pictures of the data, so many at once. What was judged is kept in `out` by all that decides it."""

    data: Labelled
    n: int
    batch: int
    device: torch.device
    out: Path

    def batches(self, n: int) -> DataLoader[Any]:
        return DataLoader(Subset(self.data.pictures, range(n)), self.batch)

    def held(self) -> list[Any]:
        """Batches of pictures to set thresholds by, of those that are not judged if they are enough."""
        rest = range(self.n, len(self.data))
        pool = rest if len(rest) >= CALIBRATION else range(len(self.data))
        chosen = [pool[i * len(pool) // CALIBRATION] for i in range(min(CALIBRATION, len(pool)))]
        return list(DataLoader(Subset(self.data.pictures, chosen), self.batch))

    def judge(self, one: Classifier, method: Method) -> Judged:
        weights = provenance.weights_hash(one.model)
        made = {
            "weights": weights, "method": method.settings, "data": self.data.key, "n": self.n, "batch": self.batch,
            "device": self.device.type, "torch": str(torch.__version__), "code": source_hash(),
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
        path = self.out / "judged" / f"{key}.safetensors"
        kept = _kept(path, made)
        if kept is None:
            kept = judge(one.model, method, self.batches(self.n))
            told = {"made": json.dumps(made), "flops": repr(kept.flops), "tokens": repr(kept.tokens)}
            write(path, save({"right": kept.right, "seen": kept.seen}, told))
        return kept

    def groups(self) -> list[str]:
        """The class of each picture."""
        return [self.data.classes[label] for label in self.data.labels[: self.n]]


def _kept(path: Path, made: dict[str, Any]) -> Judged | None:
    """What was judged before, and by all of this; None where nothing was, or the file is broken."""
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata()
            if json.loads(told["made"]) == made:
                right, seen = file.get_tensor("right"), file.get_tensor("seen")
                return Judged(right, seen, float(told["flops"]), float(told["tokens"]), made["method"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        pass
    return None


@torch.no_grad()
def judge(model: nn.Module, method: Method, batches: Any) -> Judged:
    """Shows a classifier the pictures under a method."""
    right: list[Tensor] = []
    seen: list[Tensor] = []
    left: list[int] = []
    prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
    like = next(model.parameters())
    last, head = host.find_blocks(model)[-1].layers["block"], cast(nn.Module, model.head)
    with method.apply(model), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        handles = [
            last.register_forward_pre_hook(lambda m, args: left.append(len(args[0]) * args[0].shape[1])),
            head.register_forward_pre_hook(lambda m, args: seen.append(args[0].float().cpu())),
        ]
        try:
            for _, (pictures, labels) in zip(working(range(len(batches)), method.label), batches, strict=True):
                right.append(model(pictures.to(like)).argmax(-1).cpu() == labels)
        finally:
            for handle in handles:
                handle.remove()
    n = sum(map(len, right))
    flops, tokens = counter.get_total_flops() / n, sum(left) / n - prefix
    return Judged(torch.cat(right), torch.cat(seen), flops, tokens, method.settings)
