"""The expensive steps: `reference` defines each in torch, `triton` computes the same faster where `can_run`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .operators import is_compiling, operator
from .reference import Groups as Groups
from .reference import Length as Length

_enabled = True


@contextmanager
def reference_only() -> Iterator[None]:
    """Disables all kernels inside a `with` block, to compare results or to find a faulty kernel."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def unavailable_reason(x: Tensor) -> str | None:
    """Returns why the Triton kernels cannot run on the tokens x [B, N, C]; None where they can."""
    if not _enabled:
        return "reference_only() is active"
    if x.device.type != "cuda":
        return f"the tokens are on {x.device.type}, the kernels run on cuda"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the tokens are {str(x.dtype).removeprefix('torch.')}, the kernels take float32, float16 and bfloat16"
    if x.requires_grad and torch.is_grad_enabled():
        return "the tokens need a gradient, which the kernels do not have"
    return _fault(x.device, x.dtype)


def can_run(x: Tensor) -> bool:
    """Whether the Triton kernels can run on the tokens x [B, N, C]; see `unavailable_reason`."""
    return unavailable_reason(x) is None


@cache
def _fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Tries the kernels once on a device, and returns what fails: no compiler, too old a GPU, other results."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # two destinations, and sources at distinct angles from them, of which some merge
    angles = torch.tensor([0, 90, 5, 12, 20, 29, 83, 72], device=device).deg2rad()
    x = torch.stack((angles.cos(), angles.sin()), dim=-1)[None].to(dtype)
    src, dst = torch.arange(2, 8, device=device), torch.arange(2, device=device)

    def steps(run: Callable[[str], Callable[..., Any]]) -> list[Tensor]:
        best, target = (values[:, 0] for values in run("nearest_dst")(x, src[None], dst[None]))
        kept_idx, group_idx, *groups = run("build_map")(best, target, src, dst, 3)
        lengths = (Length.LARGEST, Length.PARTIAL)
        merged = run("merge")(x, group_idx, 5, lengths, Groups(*groups) if groups else None)
        cosine, pairs = run("pair_up")(x, torch.arange(8, device=device).view(2, 4))
        in_pairs = run("map_of_groups")(cosine, pairs, 3, src[:0])[:2]
        return [target, kept_idx, group_idx, run("take")(x, kept_idx), *merged, *in_pairs]

    try:
        with torch.no_grad():
            ours, theirs = steps(lambda name: _launcher(name, device)), steps(lambda name: getattr(reference, name))
            # within rounding in half precision; positions are small integers
            same = all(torch.allclose(a, b, rtol=0.01, atol=0.01) for a, b in zip(ours, theirs, strict=True))
        return None if same else "the kernels disagree with the reference here"
    except Exception as error:  # any message of the driver or the compiler is the reason
        return " ".join(f"the kernels do not run here: {error}".split())[:300]


def _launcher(name: str, device: torch.device) -> Callable[..., Any]:
    """Returns a kernel that launches on this device; Triton itself uses the current one."""

    def launch(*args: Any) -> Any:
        from . import triton

        if device.index == torch.cuda.current_device():
            return getattr(triton, name)(*args)
        with torch.cuda.device(device):
            return getattr(triton, name)(*args)

    return launch


def _nearest_shapes(metric: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    shape = (metric.shape[0], *src.shape)
    best = metric.new_empty(shape, dtype=torch.promote_types(metric.dtype, torch.float32))
    return best, metric.new_empty(shape, dtype=torch.long)


@operator("tofu_sd::nearest", "(Tensor metric, Tensor src, Tensor dst) -> (Tensor, Tensor)", _nearest_shapes)
def nearest_dst(metric: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Runs `reference.nearest_dst` or its kernel, as an operator: a compiler would unroll its loop for one size."""
    if can_run(metric):
        return _launcher("nearest_dst", metric.device)(metric, src, dst)
    on_cpu = _enabled and metric.device.type == "cpu" and metric.dtype != torch.float64 and cpu.available()
    return (cpu if on_cpu else reference).nearest_dst(metric, src, dst)


def map_shapes(like: Tensor, B: int, N: int, r: int) -> list[Tensor]:
    """Returns empty tensors like those of a map of B x N tokens that merges r; on CUDA also like its groups'."""
    kept_idx, group_idx = (like.new_empty(B, size, dtype=torch.long) for size in (N - r, N))
    if like.device.type != "cuda":
        return [kept_idx, group_idx]
    order, start = (like.new_empty(B, size, dtype=torch.int32) for size in (N, N - r + 1))
    return [kept_idx, group_idx, order, start, like.new_empty(B, N - r, dtype=torch.float32)]


def with_groups(kept_idx: Tensor, group_idx: Tensor, *groups: Tensor) -> list[Tensor]:
    """Returns the tensors of a map as `map_shapes` declares them: on CUDA groups are listed if no kernel did."""
    if not groups and kept_idx.device.type == "cuda":
        order, start, log_size = reference.sorted_groups(group_idx, kept_idx.shape[1])
        groups = (order.int(), start, log_size)
    return [kept_idx, group_idx, *groups]


def _map_shapes(
    best: Tensor, target: Tensor, src: Tensor, dst: Tensor, r: int, at: Tensor | None = None
) -> list[Tensor]:
    return map_shapes(best, best.shape[0], src.shape[0] + dst.shape[0], r)  # len() would make constants of symbols


@operator(
    "tofu_sd::build_map",
    "(Tensor best, Tensor target, Tensor src, Tensor dst, SymInt r, Tensor? at=None) -> Tensor[]",
    _map_shapes,
)
def _build_map(
    best: Tensor, target: Tensor, src: Tensor, dst: Tensor, r: int, at: Tensor | None = None
) -> list[Tensor]:
    return with_groups(*_chosen("build_map", best)(best, target, src, dst, r, at))


def build_map(
    best: Tensor, target: Tensor, src: Tensor, dst: Tensor, r: int, at: Tensor | None = None
) -> tuple[Tensor, Tensor, Groups | None]:
    """Runs `reference.build_map` or its kernel; compiled, as an operator: Inductor's scans fail on 12,288 sources.

    Returns:
        (kept_idx [B, K], group_idx [B, N], the groups where a kernel made them).
    """
    run = _build_map if is_compiling() else _chosen("build_map", best)
    kept_idx, group_idx, *groups = run(best, target, src, dst, r, at)
    return kept_idx, group_idx, Groups(*groups) if groups else None


def pair_up(x: Tensor, fours: Tensor) -> tuple[Tensor, Tensor]:
    """Runs `reference.pair_up` or its kernel."""
    return _chosen("pair_up", x)(x, fours)


def map_of_groups(similarity: Tensor, members: Tensor, n: int, rest: Tensor) -> tuple[Tensor, Tensor, Groups | None]:
    """Runs `reference.map_of_groups` or its kernel.

    Returns:
        (kept_idx [B, K], group_idx [B, N], the groups where a kernel made them).
    """
    kept_idx, group_idx, *groups = _chosen("map_of_groups", similarity)(similarity, members, n, rest)
    return kept_idx, group_idx, Groups(*groups) if groups else None


def take(x: Tensor, at: Tensor) -> Tensor:
    """Runs `reference.take` or its kernel."""
    return _chosen("take", x)(x, at)


def merge(
    x: Tensor, group_idx: Tensor, K: int, lengths: Sequence[Length], groups: Groups | None = None
) -> list[Tensor]:
    """Runs `reference.merge` or its kernel."""
    return _chosen("merge", x)(x, group_idx, K, lengths, groups)


def _chosen(name: str, x: Tensor) -> Callable[..., Any]:
    """Returns the kernel where it can run now, else the reference, which a compiler compiles itself."""
    if not is_compiling() and can_run(x):
        return _launcher(name, x.device)
    return getattr(reference, name)
