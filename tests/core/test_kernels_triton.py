"""Triton kernels agree with the reference implementation, on a GPU or else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tofu_sd import kernels
from tofu_sd.core.cells import make_cells
from tofu_sd.core.partition import partition, windows
from tofu_sd.kernels import reference

pytest.importorskip("triton")
from tofu_sd.kernels import triton as triton_kernels
from tofu_sd.kernels.triton import nearest
from tofu_sd.kernels.triton.rows import as_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(16, 16), (17, 13), (1, 9), (5, 1), (3, 40)]
MERGED = [(10, 10), (9, 7), (1, 9), (5, 1), (3, 20)]  # smaller: the interpreter takes about 1 s per 100 groups
CHANNELS = [40, 96]  # less than one channel block, and not a multiple of one
NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="Triton's interpreter stores bfloat16 as integers and multiplies the integers"
)
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)]
sizes = pytest.mark.parametrize(("h", "w"), SIZES)
channels = pytest.mark.parametrize("C", CHANNELS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tokens(h: int, w: int, C: int, seed: int = 0) -> Tensor:
    return torch.randn(2, h * w, C, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def partitions(h: int, w: int) -> list[tuple[Tensor, Tensor]]:
    """Sources and destinations [T, ·] of the full grid, of random destinations, and of windows with ragged edges."""
    full_grid, random_grid = (partition(h, w, 2, 2, DEVICE, draw) for draw in (None, torch.tensor(5)))
    window_grid = windows(full_grid, h, w, 2, 2, 3)
    return [
        (full_grid.src[None], full_grid.dst[None]),
        (random_grid.src[None], random_grid.dst[None]),
        (window_grid.src, window_grid.dst),
    ]


def max_error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute difference."""
    return (result.double() - exact.double()).abs().max().item()


@sizes
@channels
def test_nearest_dst_equals_reference(h: int, w: int, C: int) -> None:
    x = tokens(h, w, C)
    for src, dst in partitions(h, w):
        (best, target), (expected, expected_target) = (
            triton_kernels.nearest_dst(x, src, dst),
            reference.nearest_dst(x, src, dst),
        )
        assert torch.equal(target, expected_target)
        assert max_error(best, expected) < 1e-6  # cosines: a few float32 rounding errors


@dtypes
def test_half_precision_dtype_matches_as_its_float32_values(dtype: torch.dtype) -> None:
    """Products of half-precision numbers are exact in float32, and both implementations sum in float32."""
    x = tokens(17, 13, 96).to(dtype)
    for src, dst in partitions(17, 13):
        (best, target), (expected, expected_target) = (
            triton_kernels.nearest_dst(x, src, dst),
            reference.nearest_dst(x.float(), src, dst),
        )
        assert torch.equal(target, expected_target)
        assert max_error(best, expected) < 1e-6


@pytest.mark.filterwarnings("ignore:invalid value")  # from numpy, which the interpreter multiplies with
def test_ties_pick_the_earlier_destination_and_nan_equals_reference() -> None:
    parts = partition(16, 16, 2, 2, DEVICE)
    x = torch.ones(1, 256, 40, device=DEVICE)
    best, target = triton_kernels.nearest_dst(x, parts.src[None], parts.dst[None])
    assert (target == parts.dst[0]).all()
    x = tokens(16, 16, 40)
    x[0, 7], x[1, 0], x[0, 2] = float("nan"), float("inf"), float("nan")  # a source and two destinations
    (best, target), (expected, expected_target) = (
        k.nearest_dst(x, parts.src[None], parts.dst[None]) for k in (triton_kernels, reference)
    )
    assert torch.equal(target, expected_target)
    assert max_error(best, expected) < 1e-6


def test_tokens_are_read_in_the_middle_of_a_longer_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the image's are between text and references. A copy of them would cost as much as merging saves."""
    sequence = tokens(24, 25, 40)
    image, small = sequence[:, 7 : 7 + 576], sequence[:, 7 : 7 + 100]
    assert as_rows(image) is image
    parts = partition(24, 24, 2, 2, DEVICE)
    fours = torch.arange(100, device=DEVICE).view(25, 4)
    group_idx = (torch.arange(100, device=DEVICE) % 20).expand(2, -1)

    def results(image: Tensor, small: Tensor) -> list[Tensor]:
        found = [triton_kernels.take(small, group_idx), *triton_kernels.pair_up(small, fours)]
        found += triton_kernels.merge(small, group_idx, 20, (reference.Length.LARGEST,))
        for bound in (0, nearest.LAUNCH_BOUND):  # with and without a launch for the lengths
            monkeypatch.setattr(nearest, "LAUNCH_BOUND", bound)
            found += triton_kernels.nearest_dst(image, parts.src[None], parts.dst[None])
        return found

    copies = results(image.clone(), small.clone())
    assert all(torch.equal(*pair) for pair in zip(results(image, small), copies, strict=True))
    other_layout = sequence[:, :40].mT
    at = torch.zeros(2, 3, dtype=torch.long, device=DEVICE)
    assert torch.equal(triton_kernels.take(other_layout, at), other_layout[:, :1].expand(-1, 3, -1))


def assert_same_map(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The map is the same, and each group lists its own tokens, in any order."""
    assert all(tensor.is_contiguous() for tensor in result)
    kept_idx, group_idx, order, start, log_size = result
    assert torch.equal(kept_idx, expected[0])
    assert torch.equal(group_idx, expected[1])
    groups = reference.sorted_groups(group_idx, kept_idx.shape[1])
    assert torch.equal(start, groups.start)
    assert max_error(log_size, groups.log_size) < 1e-6
    assert torch.equal(group_idx.gather(1, order.long()), group_idx.gather(1, groups.order))  # group by group
    assert torch.equal(order.sort(dim=1).values[0].long(), torch.arange(order.shape[1], device=DEVICE))  # each once


@sizes
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_build_map_equals_reference(h: int, w: int, share: float) -> None:
    for draw in (None, torch.tensor(3)):
        parts = partition(h, w, 2, 2, DEVICE, draw)
        S, D = len(parts.src), len(parts.dst)
        r = int(share * S)
        g = torch.Generator().manual_seed(1)
        best = torch.randint(0, 7, (2, S), generator=g).float().to(DEVICE)  # many ties
        target = parts.dst[torch.randint(0, D, (2, S), generator=g).to(DEVICE)]
        expected = reference.build_map(best, target, *parts, r)
        result = triton_kernels.build_map(best, target, *parts, r)
        assert_same_map(result, expected)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_build_map_over_several_blocks_of_sources_equals_reference(share: float) -> None:
    """Counts carry over from block to block; cosines of both signs, 0.0 and -0.0 sort correctly."""
    parts = partition(80, 80, 2, 2, DEVICE)
    best = tokens(60, 80, 1)[..., 0].mul(4).round().div(8)  # many ties, many of them at zero
    best = best.where(best != 0, torch.tensor([0.0, -0.0], device=DEVICE).repeat(2, 2400))
    target = parts.dst[torch.randint(0, len(parts.dst), best.shape, generator=torch.Generator().manual_seed(1))]
    expected = reference.build_map(best, target.to(DEVICE), *parts, int(share * best.shape[1]))
    result = triton_kernels.build_map(best, target.to(DEVICE), *parts, int(share * best.shape[1]))
    assert_same_map(result, expected)


@sizes
@channels
@dtypes
def test_pair_up_equals_reference(h: int, w: int, C: int, dtype: torch.dtype) -> None:
    x, cells = tokens(h, w, C).to(dtype), make_cells(h, w, DEVICE)
    if len(cells.tokens):
        x[0, 0], x[0, 1], x[1, cells.tokens[-1, 2]] = 0, float("nan"), float("inf")  # of no direction, not finite
    (cosine, pairs), (expected, expected_pairs) = (k.pair_up(x, cells.tokens) for k in (triton_kernels, reference))
    assert torch.equal(pairs, expected_pairs)
    assert not cosine.numel() or max_error(cosine, expected) < 1e-6


@sizes
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [2, 4])
def test_map_of_groups_equals_reference(h: int, w: int, share: float, size: int) -> None:
    """Groups of two or four tokens, of which none, some or all are merged; many are equally similar."""
    cells = make_cells(h, w, DEVICE)
    groups = cells.tokens.numel() // size
    g = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(cells.tokens.numel(), generator=g) for _ in range(2)]).to(DEVICE)
    members = cells.tokens.flatten()[order].view(2, groups, size)
    similarity = torch.randint(-3, 4, (2, groups), generator=g).float().to(DEVICE)
    call = (similarity, members, int(share * groups), cells.rest)
    assert_same_map(triton_kernels.map_of_groups(*call), reference.map_of_groups(*call))


@pytest.mark.parametrize("length", list(reference.Length), ids=str)
@pytest.mark.parametrize("K", [1, 3, 70])
def test_merge_handles_any_group_size(K: int, length: reference.Length) -> None:
    """A sky is one large group, read a few rows at a time; a group can start anywhere among the sorted tokens."""
    x = tokens(20, 30, 24)
    group_idx = torch.cat(
        (torch.arange(K), torch.randint(0, K, (600 - K,), generator=torch.Generator().manual_seed(2)))
    )
    group_idx = group_idx.expand(2, -1).to(DEVICE)
    (exact,) = reference.merge(x.double(), group_idx, K, [length])
    (merged,) = triton_kernels.merge(x, group_idx, K, [length])
    assert max_error(merged, exact) < 1e-5


def test_merge_does_not_depend_on_the_order_within_a_group() -> None:
    """The kernel that lists a group's tokens uses atomic additions, so their order differs from run to run."""
    x, K = tokens(20, 30, 24), 3
    group_idx = torch.randint(0, K, (2, 600), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    groups = reference.sorted_groups(group_idx, K)
    ends = groups.start[:, 1:].tolist()
    backwards = torch.stack([torch.cat([part.flip(0) for part in order.tensor_split(end[:-1])])
                             for order, end in zip(groups.order, ends, strict=True)])  # fmt: skip
    lengths = [reference.Length.OWN, reference.Length.LARGEST]
    expected, result = (
        triton_kernels.merge(x, group_idx, K, lengths, groups._replace(order=order))
        for order in (groups.order, backwards)
    )
    assert not torch.equal(groups.order, backwards)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("first", list(reference.Length), ids=str)
@pytest.mark.parametrize("second", list(reference.Length), ids=str)
def test_two_lengths_at_once_equal_each_alone(first: reference.Length, second: reference.Length) -> None:
    x, group_idx, K = merged_groups(9, 7, 40)
    both = triton_kernels.merge(x, group_idx, K, [first, second])
    alone = [triton_kernels.merge(x, group_idx, K, [length])[0] for length in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))


def merged_groups(h: int, w: int, C: int) -> tuple[Tensor, Tensor, int]:
    """Tokens, the group index of each token, and the number of groups."""
    x, parts = tokens(h, w, C), partition(h, w, 2, 2, DEVICE)
    r = len(parts.src) // 2 + 1
    best, target = (t[:, 0] for t in reference.nearest_dst(x, parts.src[None], parts.dst[None]))
    kept_idx, group_idx = reference.build_map(best, target, *parts, r)
    return x, group_idx, kept_idx.shape[1]


@pytest.mark.parametrize(("h", "w"), MERGED)
@channels
@dtypes
@pytest.mark.parametrize("length", list(reference.Length), ids=str)
def test_merge_equals_reference_within_dtype_rounding(
    h: int, w: int, C: int, dtype: torch.dtype, length: reference.Length
) -> None:
    """The error against float64 is at most twice the reference's error (plus a float32 rounding)."""
    x, group_idx, K = merged_groups(h, w, C)
    x = x.to(dtype)
    (exact,) = reference.merge(x.double(), group_idx, K, [length])
    (result,), (expected,) = (kernel.merge(x, group_idx, K, [length]) for kernel in (triton_kernels, reference))
    assert result.dtype == dtype
    assert max_error(result, exact) <= 2 * max_error(expected, exact) + 1e-6


def test_mlerp_of_opposite_tokens_is_zero() -> None:
    x = torch.tensor([[[5.0, 0.0], [-5.0, 0.0]]], device=DEVICE)
    group_idx = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)
    (merged,) = triton_kernels.merge(x, group_idx, 1, [reference.Length.LARGEST])
    assert merged.tolist() == [[[0.0, 0.0]]]


@sizes
@dtypes
def test_take_equals_reference_for_each_dtype(h: int, w: int, dtype: torch.dtype) -> None:
    x, group_idx, K = merged_groups(h, w, 40)
    y = x[:, :K].to(dtype)
    assert torch.equal(triton_kernels.take(y, group_idx), reference.take(y, group_idx))


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(1, 4, 2), "on cpu"),
        (torch.zeros(1, 4, 2, dtype=torch.float64, device="meta"), "on meta"),
    ],
    ids=["cpu", "meta"],
)
def test_unavailable_reason_names_the_device(x: Any, reason: str) -> None:
    assert reason in str(kernels.unavailable_reason(x))
    assert not kernels.can_run(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_can_run_excludes_float64_dtype_gradients_and_reference_only() -> None:
    x = torch.zeros(1, 4, 2, device="cuda")
    assert kernels.can_run(x)
    assert "float64" in str(kernels.unavailable_reason(x.double()))
    assert "gradient" in str(kernels.unavailable_reason(x.clone().requires_grad_()))
    with kernels.reference_only():
        assert not kernels.can_run(x)
    assert kernels.can_run(x)
