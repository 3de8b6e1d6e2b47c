"""The steps that cost: `reference` defines each in torch, `triton` computes the same faster where `can_fuse` allows."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, reference

_enabled = True


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside, no kernel runs: to compare with, and to find out whether one is at fault."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def why_not(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take the tokens x [B, N, C]; None where they can."""
    if not _enabled:
        return "reference_only() is in force"
    if x.device.type != "cuda":
        return f"the tokens are on {x.device.type}, the kernels run on cuda"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the tokens are {str(x.dtype).removeprefix('torch.')}, the kernels take float32, float16 and bfloat16"
    if x.requires_grad and torch.is_grad_enabled():
        return "the tokens carry a gradient, which the kernels do not"
    return None


def can_fuse(x: Tensor) -> bool:
    """Whether the Triton kernels can take the tokens x [B, N, C]; `why_not` says why they cannot."""
    return why_not(x) is None


@cache
def _triton() -> ModuleType:
    from . import triton

    return triton


@torch.library.custom_op(
    "tofu_sd::nearest", mutates_args=(), schema="(Tensor metric, Tensor src, Tensor dst) -> (Tensor, Tensor)"
)
def nearest(metric: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.nearest`, as an operator: a compiler would unroll its loop over chunks for one size alone."""
    if can_fuse(metric):
        return _triton().nearest(metric, src, dst)
    on_cpu = _enabled and metric.device.type == "cpu" and metric.dtype != torch.float64 and cpu.available()
    return (cpu if on_cpu else reference).nearest(metric, src, dst)


@nearest.register_fake
def _(metric: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    shape = (metric.shape[0], *src.shape)
    best = metric.new_empty(shape, dtype=torch.promote_types(metric.dtype, torch.float32))
    return best, metric.new_empty(shape, dtype=torch.long)


def assemble(best: Tensor, target: Tensor, src: Tensor, dst: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """`reference.assemble`."""
    return (_triton() if _eager(best) else reference).assemble(best, target, src, dst, r)


def take(x: Tensor, at: Tensor) -> Tensor:
    """`reference.take`."""
    return (_triton() if _eager(x) else reference).take(x, at)


def merge(x: Tensor, home: Tensor, K: int, largest_norm: bool) -> Tensor:
    """`reference.merge`."""
    return (_triton() if _eager(x) else reference).merge(x, home, K, largest_norm)


def _eager(x: Tensor) -> bool:
    """Whether a kernel is to be launched here and now: a compiler makes its own of the reference."""
    return not torch.compiler.is_compiling() and can_fuse(x)
