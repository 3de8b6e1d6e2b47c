"""Matching with oneDNN's matrix product gives the same matches as with MKL's."""

from __future__ import annotations

import pytest
import torch

from tofu_sd import kernels
from tofu_sd.core.partition import partition, windows
from tofu_sd.kernels import cpu, reference

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not cpu.available(), reason="this build of torch has no oneDNN product")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("h", "w", "C"), [(16, 16, 40), (17, 13, 96), (1, 9, 8), (3, 40, 320), (1, 2, 4)])
def test_onednn_nearest_dst_equals_reference_for_each_dtype(h: int, w: int, C: int, dtype: torch.dtype) -> None:
    full_grid = partition(h, w, 2, 2, CPU)
    window_grid = windows(full_grid, h, w, 2, 2, 3)
    x = torch.randn(2, h * w, C, generator=torch.Generator().manual_seed(0)).to(dtype)
    for src, dst in ((full_grid.src[None], full_grid.dst[None]), (window_grid.src, window_grid.dst)):
        (best, target), (expected, expected_target) = cpu.nearest_dst(x, src, dst), reference.nearest_dst(x, src, dst)
        assert torch.equal(target, expected_target)
        assert (best - expected).abs().max() < 1e-6  # cosines: a few float32 rounding errors


def test_onednn_dispatch_excludes_float64_dtype_and_reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 is requested where rounding matters; only the reference computes in it."""
    used = []
    original = cpu.nearest_dst
    monkeypatch.setattr(cpu, "nearest_dst", lambda *args: used.append(args[0].dtype) or original(*args))
    parts = partition(4, 4, 2, 2, CPU)
    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    for tokens in (x, x.half(), x.double()):
        kernels.nearest_dst(tokens, parts.src[None], parts.dst[None])
    with kernels.reference_only():
        kernels.nearest_dst(x, parts.src[None], parts.dst[None])
    assert used == [torch.float32, torch.float16]
