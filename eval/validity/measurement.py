"""Measures a model for the criteria: two evaluations, the statistics of its images, and its tokens."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..common import provenance
from ..common.devices import pick_device
from ..common.schema_changes import SCHEMA
from ..evaluation.execute import run
from ..evaluation.options import parse
from ..images.model import load_model
from ..images.requests import default_prompts, load_requests, select
from ..images.settings import image_dir
from ..methods.method import BASELINE
from ..methods.registry import parse as parse_methods
from ..reporting import results
from . import criteria, image_statistics, photographs, token_similarity

GUIDANCE, STRONG_GUIDANCE = 3.0, 7.5
STRONG_STEPS = 50  # of ToFu's Table 5
TOKEN_IMAGES = 8  # images whose tokens are compared


def measure(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Returns the content of validity.json. An interrupted evaluation resumes.

    Args:
        options: of `eval.validate`.
        argv: its arguments, for the record.
    """
    device = pick_device(options.device)
    record = provenance.begin("eval.validate", argv, device)
    order, strong = options.out / "guidance-3", options.out / "guidance-7.5"
    for arguments in (*_order_runs(options, order), _strong_run(options, strong)):
        run(parse(arguments), arguments)
    psnr, prompts = _values(order, "PSNR")
    ms_ssim, _ = _values(order, "MS-SSIM")
    pipe, _ = load_model(options.model, device, torch.float32)
    settings = results.read(order)[0]["settings"]
    rows = [
        *criteria.error_grows(psnr, prompts),
        criteria.magnitude(*_strong_figures(strong)),
        *criteria.spectra(*_spectra(order, pipe, device)),
        criteria.token_similarity(_cosines(options, pipe, settings)),
        criteria.order_of_methods("PSNR", psnr),
        criteria.order_of_methods("MS-SSIM", ms_ssim),
    ]
    return {
        "schema": SCHEMA,
        "settings": {name: settings[name] for name in ("model", "n", "steps", "size", "device", "dtype", "torch")},
        "rows": [row.row() for row in rows],
        "provenance": {**record, "process_mib": provenance.process_mib(), "ended": provenance.now()},
    }


def _common(options: argparse.Namespace, out: Path) -> list[str]:
    lpips = (
        ["--lpips-net", "squeeze", "--lpips-backbone", str(options.lpips_backbone)] if options.lpips_backbone else []
    )
    metrics = "psnr,ms-ssim" + ",lpips" * bool(lpips)
    own = ["--model", options.model, "--limit", str(options.limit), "--device", options.device, "--out", str(out)]
    own += ["--timed", "0"]  # a criterion is about quality
    return [*own, "--metrics", metrics, *lpips]


def _order_runs(options: argparse.Namespace, out: Path) -> Iterator[list[str]]:
    """The evaluations of all methods at guidance 3, the folder of which grows."""
    guidance = ["--guidance", str(GUIDANCE)]
    yield [*_common(options, out), *guidance, "--method", ",".join(criteria.GROWING), "--ratio", "0.25,0.5,0.75"]
    for ratio in sorted({one.ratio for one in photographs.METHODS}):
        methods = [one.method for one in photographs.METHODS if one.ratio == ratio]
        yield [*_common(options, out), *guidance, "--method", ",".join(methods), "--ratio", str(ratio)]


def _strong_run(options: argparse.Namespace, out: Path) -> list[str]:
    """The evaluation of ToMe, and of no attention, at the guidance and the steps of ToFu's Table 5."""
    sampling = ["--guidance", str(STRONG_GUIDANCE), "--steps", str(STRONG_STEPS)]
    return [*_common(options, out), *sampling, "--method", "tome,no-attention", "--ratio", "0.5"]


def _values(out: Path, metric: str) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Returns (a metric of each image by "method ratio", the prompt of each image)."""
    _, images = results.read(out)
    wanted = [(method, ratio) for method in criteria.GROWING for ratio in criteria.RATIOS]
    wanted += [(one.method, one.ratio) for one in photographs.METHODS]
    slugs = {f"{method} {ratio}": parse_methods(method, [ratio])[0].slug for method, ratio in wanted}
    by_slug: dict[str, dict[str, float]] = {}
    for image in images:
        if image[metric]:
            by_slug.setdefault(image["key"], {})[image["id"]] = float(image[metric])
    return {name: by_slug[slug] for name, slug in slugs.items()}, {image["id"]: image["prompt"] for image in images}


def _strong_figures(out: Path) -> list[dict[str, Any]]:
    """Returns the figures of ToMe, then those without attention, by metric."""
    report, _ = results.read(out)
    return [row["metrics"] for row in report["rows"] if row["key"] != BASELINE.slug]


@torch.no_grad()
def _spectra(out: Path, pipe: Any, device: torch.device) -> tuple[float, float, float]:
    """Returns (mean spectral slope of the baseline's images, of their latents, kurtosis of their gradients)."""
    images = _images(image_dir(out, BASELINE.slug))
    latents = torch.cat(
        [pipe.vae.encode(part.to(device) * 2 - 1).latent_dist.mode().float().cpu() for part in torch.split(images, 4)]
    )
    slopes = [image_statistics.spectral_slope(x).mean().item() for x in (images, latents)]
    return slopes[0], slopes[1], image_statistics.gradient_kurtosis(images)


def _images(folder: Path) -> Tensor:
    """Returns all images of a folder: float [n, 3, H, W] in 0..1."""
    arrays = []
    for file in sorted(folder.glob("*.png")):
        with Image.open(file) as image:
            arrays.append(np.asarray(image.convert("RGB")))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def _cosines(options: argparse.Namespace, pipe: Any, settings: dict[str, Any]) -> list[float]:
    requests = select(load_requests(default_prompts(options.model)), 1, None, TOKEN_IMAGES)
    sampling = {"num_inference_steps": settings["steps"], "guidance_scale": GUIDANCE}
    size = {"height": settings["size"], "width": settings["size"]}
    return list(token_similarity.measure(pipe, requests, **sampling, **size).values())
