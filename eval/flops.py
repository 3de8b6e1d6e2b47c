"""Floating-point operations of a picture by torch's own counter: what a method saves on any machine, time aside."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .generate import Settings, draw, quiet_patches
from .methods import Method
from .prompts import Request


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
