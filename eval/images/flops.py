"""FLOPs of an image by torch's own counter: what a method saves, whatever the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..common.cli import progress, quiet_patches
from ..common.files import digest, read_json, write_json
from ..methods.method import Method
from .generate import batches, generate_batch
from .requests import Request
from .settings import Settings, config_hash

FOLDER = "flops"
IMAGES = 8  # that are counted where they differ in cost


def count(out: Path, pipe: Any, methods: Sequence[Method], settings: Settings, requests: Sequence[Request]) -> None:
    """Counts the FLOPs of each method that has not been counted: OUT/flops/<method's slug>.json.

    The first image is counted, as all images cost the same. Under a threshold they do not: then it is the mean of the
    first images, in the batches of the run, since a threshold applies to a batch as a whole.
    """
    for method in progress([m for m in methods if load_count(out, settings, m) is None], "FLOPs"):
        counted = batches(requests[:IMAGES], settings) if method.varies else [requests[:1]]
        images = sum(map(len, counted))
        flops = sum(count_batch(pipe, method, settings, batch) for batch in counted) // images
        write_json(
            out / FOLDER / f"{method.slug}.json", {**_version(settings, method), "flops": flops, "images": images}
        )


def load_count(out: Path, settings: Settings, method: Method) -> int | None:
    """The FLOPs that `count` found for this configuration."""
    found = read_json(out / FOLDER / f"{method.slug}.json")
    if not isinstance(found, dict) or not _version(settings, method).items() <= found.items():
        return None
    flops = found.get("flops")
    return flops if isinstance(flops, int) and not isinstance(flops, bool) else None


def _version(settings: Settings, method: Method) -> dict[str, str]:
    return {"config_hash": config_hash(settings, method), "code_hash": digest(Path(__file__))}


def count_batch(pipe: Any, method: Method, settings: Settings, requests: Sequence[Request]) -> int:
    """FLOPs of matrix products and convolutions in a batch: multiplications and additions, each counted as one."""
    with quiet_patches(), method.apply(pipe), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        generate_batch(pipe, requests, method, settings, steps=settings.steps)
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _nearest(metric: Any, src: Any, dst: Any, *_: Any, **__: Any) -> int:
    """Similarities of all sources and destinations in each of T windows; metric [B, N, C], src [T, S], dst [T, D]."""
    (B, _, C), (T, S), D = metric, src, dst[1]
    return int(2 * B * T * S * D * C)


def _distances(x1: Any, x2: Any, *_: Any, **__: Any) -> int:
    """Distances of all tokens [..., P, C] to all centroids [..., R, C], as one product of matrices."""
    *batch, P, C = x1
    return int(2 * math.prod(batch) * P * x2[-2] * C)


FORMULAS = {
    torch.ops.tofu_sd.nearest: _nearest,
    torch.ops.aten._euclidean_dist: _distances,  # of cdist, from 26 tokens on
    torch.ops.aten._cdist_forward: _distances,
    # older torch counts attention on a GPU alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
