"""Floating-point operations of a picture by torch's own counter: what a method saves on any machine, time aside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..common.cli import quiet_patches, working
from ..common.files import digest, read_json, write_json
from ..methods.method import Method
from .generate import batches, draw
from .requests import Request
from .settings import Settings, identity

FOLDER = "flops"


SEVERAL = 8  # pictures that are counted where each costs what is in it


def count(out: Path, pipe: Any, methods: Sequence[Method], settings: Settings, requests: Sequence[Request]) -> None:
    """Counts for each method that has not been counted: OUT/flops/<method's key>.json.

    The first picture, for one is like another; under a threshold the mean of the first ones, in batches as they are
    drawn, since a batch decides together.
    """
    due = [method for method in methods if counted(out, settings, method) is None]
    for method in working(due, "operations"):
        varies = method.fusion is not None and method.fusion.threshold is not None
        turns = batches(requests[:SEVERAL], settings) if varies else [requests[:1]]
        pictures = sum(map(len, turns))
        flops = sum(of_pictures(pipe, method, settings, turn) for turn in turns) // pictures
        told = {**_made(settings, method), "flops": flops, "pictures": pictures}
        write_json(out / FOLDER / f"{method.slug}.json", told)


def counted(out: Path, settings: Settings, method: Method) -> int | None:
    """What `count` found for this very method."""
    told = read_json(out / FOLDER / f"{method.slug}.json")
    made = _made(settings, method)
    flops = told["flops"] if isinstance(told, dict) and made.items() <= told.items() and "flops" in told else None
    return flops if isinstance(flops, int) and not isinstance(flops, bool) else None


def _made(settings: Settings, method: Method) -> dict[str, str]:
    return {"made": identity(settings, method), "counted": digest(Path(__file__))}


def of_pictures(pipe: Any, method: Method, settings: Settings, requests: Sequence[Request]) -> int:
    """Multiplications and additions, each counted as one, of matrices and convolutions in drawing a batch."""
    with quiet_patches(), method.apply(pipe), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        draw(pipe, requests, method, settings, steps=settings.steps)
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _nearest(metric: Any, src: Any, dst: Any, *_: Any, **__: Any) -> int:
    """Scores of all sources and destinations of each of T windows; metric [B, N, C], src [T, S], dst [T, D]."""
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
