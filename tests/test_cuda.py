"""What only a CUDA device can show: sums whose order does not vary, and half precision on the real kernels."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from oracle import oracle

import tofu_sd
from tofu_sd.match import bipartite_soft_matching, partition
from tofu_sd.reduce import REDUCTIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_repeat_bit_for_bit_and_agree_with_the_cpu(name: str) -> None:
    """Atomic additions would give other last bits, and so other pictures, on every run."""
    x = tiny.noise(2, 4096, 64)
    map = bipartite_soft_matching(x, partition(64, 64, 2, 2, x.device), 2048)
    on_gpu = type(map)(map.kept.cuda(), map.home.cuda())
    runs = [REDUCTIONS[name](x.cuda(), on_gpu) for _ in range(5)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    # float32 sums of a group in another order
    torch.testing.assert_close(runs[0].cpu(), REDUCTIONS[name](x, map), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"proportional": True}, {"keys_only": True}, {"seed": 3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_unet_fuses_and_repeats(dtype: torch.dtype, options: dict[str, Any]) -> None:
    unet = tiny.sd15_unet().to("cuda", dtype)
    call = {name: value.to("cuda", dtype if value.ndim else None) for name, value in tiny.inputs(unet).items()}
    plain = tiny.predict(unet, **call)
    if "seed" not in options:
        with oracle(unet, **options):
            expected = tiny.predict(unet, **call)
    with tofu_sd.patched(unet, 0.5, **options):
        fused = tiny.predict(unet, **call)
        assert torch.equal(tiny.predict(unet, **call), fused)
        if "proportional" in options and dtype != torch.float32:  # by channels where the oracle has a mask
            torch.testing.assert_close(fused, expected, rtol=0.05, atol=0.05)
        elif "seed" not in options:
            assert torch.equal(fused, expected)
    assert not torch.equal(fused, plain)
    assert torch.equal(tiny.predict(unet, **call), plain)
