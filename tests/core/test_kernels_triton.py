"""The kernels agree with the reference that defines them: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tofu_sd import kernels
from tofu_sd.core.partition import partition, windows
from tofu_sd.kernels import reference

pytest.importorskip("triton")
from tofu_sd.kernels import triton as fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(16, 16), (17, 13), (1, 9), (5, 1), (3, 40)]
MERGED = [(10, 10), (9, 7), (1, 9), (5, 1), (3, 20)]  # the interpreter takes a second for a hundred groups
CHANNELS = [40, 96]  # less than a block of channels, and not a whole number of them
NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="Triton's interpreter holds bfloat16 as integers, and multiplies them as such"
)
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)]
sizes = pytest.mark.parametrize(("h", "w"), SIZES)
channels = pytest.mark.parametrize("C", CHANNELS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tokens(h: int, w: int, C: int, seed: int = 0) -> Tensor:
    return torch.randn(2, h * w, C, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def layouts(h: int, w: int) -> list[tuple[Tensor, Tensor]]:
    """Sources and destinations [T, ·] of the whole map, of drawn destinations, and of windows with ragged edges."""
    whole, drawn = (partition(h, w, 2, 2, DEVICE, draw) for draw in (None, torch.tensor(5)))
    near = windows(whole, h, w, 2, 2, 3)
    return [(whole.src[None], whole.dst[None]), (drawn.src[None], drawn.dst[None]), (near.src, near.dst)]


def error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact.double()).abs().max().item()


@sizes
@channels
def test_the_nearest_destination_is_the_references(h: int, w: int, C: int) -> None:
    x = tokens(h, w, C)
    for src, dst in layouts(h, w):
        (best, target), (expected, theirs) = fused.nearest_dst(x, src, dst), reference.nearest_dst(x, src, dst)
        assert torch.equal(target, theirs)
        assert error(best, expected) < 1e-6  # cosines, a few roundings of float32


@dtypes
def test_half_precision_is_matched_as_the_numbers_it_is(dtype: torch.dtype) -> None:
    """Products of half-precision numbers are exact in float32, where both add them up."""
    x = tokens(17, 13, 96).to(dtype)
    for src, dst in layouts(17, 13):
        (best, target), (expected, theirs) = fused.nearest_dst(x, src, dst), reference.nearest_dst(x.float(), src, dst)
        assert torch.equal(target, theirs)
        assert error(best, expected) < 1e-6


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, which the interpreter multiplies with
def test_equal_destinations_fall_to_the_earlier_and_broken_numbers_to_none() -> None:
    parts = partition(16, 16, 2, 2, DEVICE)
    x = torch.ones(1, 256, 40, device=DEVICE)
    best, target = fused.nearest_dst(x, parts.src[None], parts.dst[None])
    assert (target == parts.dst[0]).all()
    x = tokens(16, 16, 40)
    x[0, 7], x[1, 0], x[0, 2] = float("nan"), float("inf"), float("nan")  # a source and two destinations
    (best, target), (expected, theirs) = (
        k.nearest_dst(x, parts.src[None], parts.dst[None]) for k in (fused, reference)
    )
    assert torch.equal(target, theirs)
    assert error(best, expected) < 1e-6


@sizes
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_the_map_is_the_references(h: int, w: int, share: float) -> None:
    for draw in (None, torch.tensor(3)):
        parts = partition(h, w, 2, 2, DEVICE, draw)
        S, D = len(parts.src), len(parts.dst)
        r = int(share * S)
        g = torch.Generator().manual_seed(1)
        best = torch.randint(0, 7, (2, S), generator=g).float().to(DEVICE)  # many ties
        target = parts.dst[torch.randint(0, D, (2, S), generator=g).to(DEVICE)]
        expected = reference.build_map(best, target, *parts, r)
        found = fused.build_map(best, target, *parts, r)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_map_of_more_sources_than_are_looked_at_at_once(share: float) -> None:
    """What is counted is carried over from block to block; cosines of both signs and both zeros are in order."""
    parts = partition(80, 80, 2, 2, DEVICE)
    best = tokens(60, 80, 1)[..., 0].mul(4).round().div(8)  # many ties, of them many zeros
    best = best.where(best != 0, torch.tensor([0.0, -0.0], device=DEVICE).repeat(2, 2400))
    target = parts.dst[torch.randint(0, len(parts.dst), best.shape, generator=torch.Generator().manual_seed(1))]
    expected = reference.build_map(best, target.to(DEVICE), *parts, int(share * best.shape[1]))
    found = fused.build_map(best, target.to(DEVICE), *parts, int(share * best.shape[1]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("largest_norm", [False, True], ids=["mean", "mlerp"])
@pytest.mark.parametrize("K", [1, 3, 70])
def test_groups_of_any_size_are_merged(K: int, largest_norm: bool) -> None:
    """A sky is one large group, read a few rows at a time; a group can begin anywhere among the sorted tokens."""
    x = tokens(20, 30, 24)
    home = torch.cat((torch.arange(K), torch.randint(0, K, (600 - K,), generator=torch.Generator().manual_seed(2))))
    home = home.expand(2, -1).to(DEVICE)
    exact = reference.merge(x.double(), home, K, largest_norm)
    assert error(fused.merge(x, home, K, largest_norm), exact) < 1e-5


def grouped(h: int, w: int, C: int) -> tuple[Tensor, Tensor, int]:
    x, parts = tokens(h, w, C), partition(h, w, 2, 2, DEVICE)
    r = len(parts.src) // 2 + 1
    best, target = (found[:, 0] for found in reference.nearest_dst(x, parts.src[None], parts.dst[None]))
    kept, home = reference.build_map(best, target, *parts, r)
    return x, home, kept.shape[1]


@pytest.mark.parametrize(("h", "w"), MERGED)
@channels
@dtypes
@pytest.mark.parametrize("largest_norm", [False, True], ids=["mean", "mlerp"])
def test_merged_tokens_are_the_references(h: int, w: int, C: int, dtype: torch.dtype, largest_norm: bool) -> None:
    """In half precision no further from float64 than twice the reference's own distance (and a float32 rounding)."""
    x, home, K = grouped(h, w, C)
    x = x.to(dtype)
    exact = reference.merge(x.double(), home, K, largest_norm)
    found, expected = fused.merge(x, home, K, largest_norm), reference.merge(x, home, K, largest_norm)
    assert found.dtype == dtype
    assert error(found, exact) <= 2 * error(expected, exact) + 1e-6


def test_a_mean_without_direction_stays_zero() -> None:
    x = torch.tensor([[[5.0, 0.0], [-5.0, 0.0]]], device=DEVICE)
    home = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)
    assert fused.merge(x, home, 1, True).tolist() == [[[0.0, 0.0]]]


@sizes
@dtypes
def test_taken_tokens_are_copies(h: int, w: int, dtype: torch.dtype) -> None:
    x, home, K = grouped(h, w, 40)
    y = x[:, :K].to(dtype)
    assert torch.equal(fused.take(y, home), reference.take(y, home))


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(1, 4, 2), "on cpu"),
        (torch.zeros(1, 4, 2, dtype=torch.float64, device="meta"), "on meta"),
    ],
    ids=["cpu", "meta"],
)
def test_a_no_is_explained(x: Any, reason: str) -> None:
    assert reason in str(kernels.unavailable_reason(x))
    assert not kernels.can_run(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_run_where_they_can_and_not_where_they_are_told_off() -> None:
    x = torch.zeros(1, 4, 2, device="cuda")
    assert kernels.can_run(x)
    assert "float64" in str(kernels.unavailable_reason(x.double()))
    assert "gradient" in str(kernels.unavailable_reason(x.clone().requires_grad_()))
    with kernels.reference_only():
        assert not kernels.can_run(x)
    assert kernels.can_run(x)
