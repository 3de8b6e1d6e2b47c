"""Tests that need a CUDA device: deterministic sums, half precision, compiled kernels and peak memory."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from oracle import oracle
from torch import Tensor

import tofu_sd
from tofu_sd.core.attention_by_size import attend_by_size
from tofu_sd.core.matching import bipartite_soft_matching
from tofu_sd.core.partition import partition
from tofu_sd.core.proportional import attend, by_channel, by_mask
from tofu_sd.core.reductions import REDUCTIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_deterministic_and_agree_with_cpu(name: str) -> None:
    """Atomic additions would change the last bits, and therefore the images, in every run."""
    x = tiny.noise(2, 4096, 64)
    map = bipartite_soft_matching(x, partition(64, 64, 2, 2, x.device), 2048)
    on_gpu = type(map)(map.kept_idx.cuda(), map.group_idx.cuda())
    runs = [REDUCTIONS[name](x.cuda(), on_gpu) for _ in range(5)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    # float32 sums of a group in a different order
    torch.testing.assert_close(runs[0].cpu(), REDUCTIONS[name](x, map), rtol=1e-5, atol=1e-5)


def on_gpu(unet: Any, dtype: torch.dtype, side: int = 16) -> tuple[Any, dict[str, Any]]:
    """Moves the model to the GPU; returns it and the arguments of one step on a side x side latent."""
    inputs = tiny.inputs(unet, side, side)
    call = {name: value.to("cuda", dtype if value.ndim else None) for name, value in inputs.items()}
    return unet.to("cuda", dtype), call


def mean_difference(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("options", [{}, {"proportional": True}, {"kv_only": True}, {"seed": 3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merged_unet_is_deterministic_in_each_dtype(dtype: torch.dtype, options: dict[str, Any]) -> None:
    unet, call = on_gpu(tiny.sd15_unet(), dtype)
    baseline = tiny.predict(unet, **call)
    if "seed" not in options:
        with oracle(unet, **options):
            expected = tiny.predict(unet, **call)
        with oracle(unet, **{**options, "proportional": False}):
            without_proportional = tiny.predict(unet, **call)
    with tofu_sd.patched(unet, 0.5, **options):
        merged = tiny.predict(unet, **call)
        assert torch.equal(tiny.predict(unet, **call), merged)
        if "proportional" in options and dtype != torch.float32:
            # channels instead of the oracle's mask: rounding differs, so later blocks match a few tokens differently
            assert mean_difference(merged, expected) < 0.2 * mean_difference(without_proportional, expected)
        elif "seed" not in options:
            assert torch.equal(merged, expected)
    assert not torch.equal(merged, baseline)
    assert torch.equal(tiny.predict(unet, **call), baseline)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_unet_of_16384_tokens_agrees_with_eager(mode: str) -> None:
    """Inductor once failed to compile a map of 16,384 tokens; reduce-overhead mode replays blocks as CUDA graphs."""
    unet, call = on_gpu(tiny.shallow_unet(), torch.float16, side=128)
    baseline = tiny.predict(unet, **call)
    with tofu_sd.patched(unet, 0.5):
        eager = tiny.predict(unet, **call)
        torch._dynamo.reset()
        compiled = torch.compile(unet, mode=mode)
        for _ in range(3):  # a graph is recorded in the second call and replayed in the third
            output = tiny.predict(compiled, **call)
            assert mean_difference(output, eager) < 0.2 * mean_difference(baseline, eager)


def test_proportional_attention_paths_agree_with_float64() -> None:
    q, k, v = (tiny.noise(2, 4, 64, 40, seed=i).to("cuda", torch.float16) for i in range(3))
    bias = tiny.noise(2, 4, 1, 64).abs().cuda()
    exact = by_mask(q.double(), k.double(), v.double(), bias.double())
    for attend_path in (attend, by_mask, by_channel):
        assert (attend_path(q, k, v, bias).double() - exact).abs().max() < 2e-3  # values are below 4, in half precision


def test_peak_memory_excludes_the_baseline_unet() -> None:
    from eval.images import generate
    from eval.images.requests import Request
    from eval.methods import registry as methods

    settings = generate.Settings("m", "p", "own", "h", 0, 64, 2, None, 1, "cuda", "float32", "a", "t", "d", "tf")
    pipe, requests = tiny.sd15_pipe().to("cuda"), [Request("0000", "a fox", 0)]
    pipe.set_progress_bar_config(disable=True)
    (method,) = methods.parse("tofu", [0.5])

    class Large(torch.nn.Module):
        def forward(self, *_: Any, **__: Any) -> None:
            torch.empty(2**28, device="cuda")

    with method.apply(pipe):
        results = [
            generate.generate_batch(pipe, requests, method, settings, steps=2, baseline_unet=b)[1]
            for b in (None, None, Large())
        ]
    assert results[2]["peak_bytes"] == results[1]["peak_bytes"] > 0
    assert results[2]["baseline_denoiser_seconds"] > 0
    assert results[1]["reserved_bytes"] >= 0
    assert results[2]["reserved_bytes"] is None


@pytest.mark.parametrize("d", [40, 64])
@pytest.mark.parametrize("counts", [(64, 128), (77, 1, 19)], ids=str)
def test_attention_by_size_agrees_with_float64(d: int, counts: tuple[int, ...]) -> None:
    """With whichever kernel torch chooses: flash or cuDNN, whose operators return the log-sum-exp."""
    K, classes = sum(counts), tuple(zip(counts, (4, 2, 1)[-len(counts) :], strict=True))
    q, k, v = (tiny.noise(2, 4, n, d, seed=n).to("cuda", torch.float16) for n in (133, K, K))
    size = torch.cat([torch.full((count,), float(size)) for count, size in classes]).cuda()
    exact = by_mask(q.double(), k.double(), v.double(), size.log().double().expand(2, 4, 1, -1))
    assert (attend_by_size(q, k, v, classes).double() - exact).abs().max() < 2e-3
