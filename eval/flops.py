"""Floating-point operations of a picture by torch's own counter: what a method saves on any machine, time aside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .files import digest, read_json, write_json
from .generate import Settings, draw, identity
from .methods import Method
from .options import quiet_patches, working
from .prompts import Request

FOLDER = "flops"


def count(out: Path, pipe: Any, methods: Sequence[Method], settings: Settings, request: Request) -> None:
    """Counts for each method that has not been counted: OUT/flops/<method's key>.json."""
    due = [method for method in methods if counted(out, settings, method) is None]
    for method in working(due, "operations"):
        flops = of_picture(pipe, method, settings, request)
        write_json(out / FOLDER / f"{method.key}.json", {**_made(settings, method), "flops": flops})


def counted(out: Path, settings: Settings, method: Method) -> int | None:
    """What `count` found for this very method."""
    told = read_json(out / FOLDER / f"{method.key}.json")
    made = _made(settings, method)
    return told["flops"] if isinstance(told, dict) and made.items() <= told.items() else None


def _made(settings: Settings, method: Method) -> dict[str, str]:
    return {"made": identity(settings, method), "counted": digest(Path(__file__))}


def of_picture(pipe: Any, method: Method, settings: Settings, request: Request) -> int:
    """Multiplications and additions, each counted as one, of matrices and convolutions in drawing one picture."""
    with quiet_patches(), method.applied(pipe), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        draw(pipe, [request], method, settings, steps=settings.steps)
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _nearest(metric: Any, src: Any, dst: Any, *_: Any, **__: Any) -> int:
    """Scores of all sources and destinations of each of T windows; metric [B, N, C], src [T, S], dst [T, D]."""
    (B, _, C), (T, S), D = metric, src, dst[1]
    return int(2 * B * T * S * D * C)


FORMULAS = {
    torch.ops.tofu_sd.nearest: _nearest,
    # older torch counts attention on a GPU alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
