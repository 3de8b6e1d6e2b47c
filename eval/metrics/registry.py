"""Metrics by the names of --metrics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tofu_sd.utils import did_you_mean

from .. import EvalError
from ..common.cli import choices
from ..common.devices import out_of_memory
from .base import DistributionMetric, Metric, Pairwise, PerImageMetric, Skipped, first_line
from .clip import CLIP, clip
from .demo_classifier import demo_classifier_metrics, kd_demo
from .dino import DINO, dino
from .distribution import fid, inception, kid
from .pairwise import LPIPS_NETS, lpips, ms_ssim, psnr, skipped_for_size, ssim

NAMES = ("psnr", "ssim", "ms-ssim", "lpips", "dino", "clip", "fid", "kid", "demo-classifier")
STANDARD = ("psnr", "ssim", "ms-ssim", "lpips", "fid", "demo-classifier")

METRICS_OF_OPTIONS = {  # options of networks, and the metrics that use them
    "lpips_net": ("lpips",), "lpips_backbone": ("lpips",), "inception_weights": ("fid", "kid"), "clip_model": ("clip",),
    "dino_model": ("dino",),
}  # fmt: skip


@dataclass(frozen=True)
class Nets:
    """Where the networks of metrics come from. Files of weights are None where they are downloaded."""

    lpips: str = "alex"
    lpips_backbone: Path | None = None
    inception: Path | None = None
    clip: str = CLIP
    dino: str = DINO


def parse_metric_names(names: str, nets: Nets) -> list[str]:
    """The names in a list such as "psnr,lpips", "standard" or "all".

    Raises:
        EvalError: an unknown name, or a file of `nets` that is missing.
    """
    groups = {"all": NAMES, "standard": STANDARD}
    parts = [part.strip() for part in names.split(",")]
    parsed = choices(",".join(",".join(groups.get(part, [part])) for part in parts), NAMES, "metric")
    if nets.lpips not in LPIPS_NETS:
        hint = did_you_mean(nets.lpips, LPIPS_NETS)
        raise EvalError(f"unknown LPIPS net {nets.lpips!r}{hint}; known: {', '.join(LPIPS_NETS)}")
    for file in (nets.lpips_backbone, nets.inception):
        if file is not None and not file.is_file():
            raise EvalError(f"there is no file {file.name!r} of weights in {file.parent.name or 'this folder'!r}")
    return parsed


def build_metrics(
    names: str,
    nets: Nets,
    *,
    size: int,
    prompts: Collection[str],
    device: torch.device,
    classifier: nn.Module | None = None,
    unavailable: Sequence[Skipped] = (),
) -> list[Metric]:
    """Loads the metrics of a list such as "psnr,lpips", "standard" or "all".

    Args:
        names: the list.
        nets: where their networks come from.
        size: pixels a side of the images.
        prompts: of the images.
        device: where the networks run.
        classifier: of the embedded model; None for other models.
        unavailable: metrics whose networks could not be loaded before; they are not loaded again.
    """
    parsed = parse_metric_names(names, nets)
    failed = {metric.name: metric for metric in unavailable}
    reason = next((metric.reason for metric in unavailable if metric.name in ("FID", "KID")), None)
    features = cache(lambda: reason or inception(nets.inception, device))  # one network for two metrics
    builders: dict[str, Callable[[], list[Metric]]] = {
        "psnr": lambda: [psnr()],
        "ssim": lambda: [ssim(size)],
        "ms-ssim": lambda: [ms_ssim(size)],
        "lpips": lambda: [failed.get(f"LPIPS-{nets.lpips}") or lpips(nets.lpips, nets.lpips_backbone, device)],
        "dino": lambda: [failed.get("DINO") or dino(nets.dino, device)],
        "clip": lambda: [failed.get("CLIP score") or clip(nets.clip, device)],
        "fid": lambda: [fid(features())],
        "kid": lambda: [kid(features()), *([kd_demo(classifier, device)] if classifier else [])],
        "demo-classifier": lambda: demo_classifier_metrics(classifier, prompts, device),
    }
    if classifier is None and "demo-classifier" in parsed and "demo-classifier" not in names.split(","):
        parsed.remove("demo-classifier")  # it is for the embedded model
    return [metric for name in NAMES if name in parsed for metric in builders[name]()]


def probe_metrics(metrics: Sequence[Metric], images: Tensor, prompts: Sequence[str]) -> list[Metric]:
    """The metrics, each tried on a few images; one that cannot measure them becomes a `Skipped`."""

    def probe(metric: Metric) -> Metric:
        try:
            match metric:
                case Pairwise():
                    metric.compute(images, images)
                case PerImageMetric():
                    metric.compute(images, prompts)
                case DistributionMetric():
                    metric.features.compute(images)
        except Exception as error:  # networks fail in many ways on a wrong size, or if they are of another kind
            if out_of_memory(error):  # which another device, or the same one later, might have
                raise
            return Skipped(metric.name, first_line(error))
        return metric

    return [probe(metric) for metric in metrics]


def too_small(names: str, size: int) -> list[Skipped]:
    """The metrics of a list that cannot measure images of this size, known before any is generated."""
    found = [skipped_for_size(name, size) for name in parse_metric_names(names, Nets())]
    return [skipped for skipped in found if skipped is not None]
