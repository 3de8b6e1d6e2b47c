"""oneDNN's product in place of MKL's: the same matches."""

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
def test_the_nearest_destination_is_the_references(h: int, w: int, C: int, dtype: torch.dtype) -> None:
    whole = partition(h, w, 2, 2, CPU)
    near = windows(whole, h, w, 2, 2, 3)
    x = torch.randn(2, h * w, C, generator=torch.Generator().manual_seed(0)).to(dtype)
    for src, dst in ((whole.src[None], whole.dst[None]), (near.src, near.dst)):
        (best, target), (expected, theirs) = cpu.nearest_dst(x, src, dst), reference.nearest_dst(x, src, dst)
        assert torch.equal(target, theirs)
        assert (best - expected).abs().max() < 1e-6  # cosines, a few roundings of float32


def test_it_is_used_unless_told_off_and_never_for_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Double precision is asked for where roundings matter; the reference alone keeps it."""
    used = []
    plain = cpu.nearest_dst
    monkeypatch.setattr(cpu, "nearest_dst", lambda *args: used.append(args[0].dtype) or plain(*args))
    parts = partition(4, 4, 2, 2, CPU)
    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    for tokens in (x, x.half(), x.double()):
        kernels.nearest_dst(tokens, parts.src[None], parts.dst[None])
    with kernels.reference_only():
        kernels.nearest_dst(x, parts.src[None], parts.dst[None])
    assert used == [torch.float32, torch.float16]
