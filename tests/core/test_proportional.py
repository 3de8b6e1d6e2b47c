"""log(n_i) on the keys' logits: one definition, two ways to compute it, and hosts that need not know which."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

import tofu_sd
from tofu_sd.core import proportional
from tofu_sd.core.proportional import KeyBias, by_channel, by_mask, flash_takes, key_bias


def heads(B: int, H: int, N: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[B, H, N, d] as processors lay it out: heads side by side in the channels."""
    return tiny.noise(B, N, H * d, seed=seed).to(dtype).view(B, N, H, d).transpose(1, 2)


def attention(d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(query, key, value, merging sizes) of 2 samples, 3 heads, 33 queries and 21 keys."""
    size = torch.randint(1, 500, (2, 21), generator=torch.Generator().manual_seed(3)).float()
    return heads(2, 3, 33, d, dtype, 0), heads(2, 3, 21, d, dtype, 1), heads(2, 3, 21, d, dtype, 2), size


def definition(query: Tensor, key: Tensor, value: Tensor, size: Tensor, scale: float) -> Tensor:
    """Every key counted as many times as the tokens it stands for, in float64."""
    odds = (query.double() @ key.double().mT * scale).exp() * size.double()[:, None, None]
    return odds / odds.sum(-1, keepdim=True) @ value.double()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("d", [5, 40, 64, 80])
def test_a_channel_says_what_a_mask_says(d: int, scale: float | None) -> None:
    query, key, value, size = attention(d, torch.float64)
    bias = key_bias(size.double(), torch.float64, sdpa=True).unsqueeze(1)
    expected = definition(query, key, value, size, scale or d**-0.5)
    torch.testing.assert_close(by_mask(query, key, value, bias, scale=scale), expected)
    # the number is held in float32, as merging sizes are
    torch.testing.assert_close(by_channel(query, key, value, bias, scale=scale), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [40, 64, 80])
def test_in_half_precision_the_channels_are_nearer_than_the_mask(
    d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their second holds what rounding log n takes from the first; a mask of that type has nowhere to put it."""
    monkeypatch.setattr(proportional, "FLASH_DEVICE", "cpu")
    query, key, value, size = attention(d, dtype)
    bias = key_bias(size, dtype, sdpa=True).unsqueeze(1)
    expected = definition(query, key, value, size, d**-0.5)
    own, masked = (
        (way(query, key, value, bias.as_subclass(Tensor)).double() - expected).abs().mean()
        for way in (by_channel, by_mask)
    )
    assert own < masked / 2


def test_nothing_but_attention_sees_that_a_mask_is_more_than_a_tensor() -> None:
    mask = torch.zeros(2, 1, 5).as_subclass(KeyBias)
    assert type(mask.repeat_interleave(3, dim=0).view(2, 3, -1, 5)) is KeyBias
    for other in (mask + 1, mask.to(torch.float64), torch.baddbmm(mask, torch.ones(2, 4, 3), torch.ones(2, 3, 5))):
        assert type(other) is Tensor


class LooksAtItsMask(AttnProcessor2_0):
    """As xformers does, which takes a plain tensor and no subclass of it."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mask = kwargs.get("attention_mask")
        assert mask is None or (type(mask) is Tensor and mask.dtype == hidden_states.dtype)
        return super().__call__(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize(
    ("query", "options"),
    [
        (torch.empty(1, 1, 4, 40), {}),  # flash has no float32
        (torch.empty(1, 1, 4, 256, dtype=torch.float16), {}),  # and no wider heads
        (torch.empty(1, 1, 4, 40, dtype=torch.float16), {"dropout_p": 0.1}),
        (torch.empty(1, 1, 4, 40, dtype=torch.float16), {"is_causal": True}),
    ],
    ids=["float32", "wide", "dropout", "causal"],
)
def test_what_flash_does_not_take_keeps_the_mask(
    query: Tensor, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proportional, "FLASH_DEVICE", "cpu")
    assert not flash_takes(query, **options)


def test_where_cudnn_takes_the_bias_it_stays_a_bias(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200 the bias cost 1.3 to 1.6 times attention without it, and channels 1.4 to 3.5 times."""
    q, k, v = (tiny.noise(2, 4, 16, 8, seed=i) for i in range(3))
    bias = tiny.noise(2, 1, 1, 16)
    for choice, times in (("FLASH_ATTENTION", 1), ("CUDNN_ATTENTION", 1), ("EFFICIENT_ATTENTION", 2)):
        backend = int(getattr(proportional.SDPBackend, choice))
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, backend=backend, **__: backend)
        torch.testing.assert_close(proportional.attend(q, k, v, bias), by_mask(q, k, v, bias))
        assert len(counted) == times


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On the CPU as where flash is at hand; one entry for each attention that took the channel, its key tokens."""
    calls: list[int] = []

    def noted(query: Tensor, key: Tensor, *args: Any, **more: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            calls.append(key.shape[-2])
        return by_channel(query, key, *args, **more)

    monkeypatch.setattr(proportional, "FLASH_DEVICE", "cpu")
    monkeypatch.setattr(proportional, "FLASH_TYPES", (torch.float32,))
    monkeypatch.setattr(proportional, "flash_takes", lambda query, **more: True)
    monkeypatch.setattr(proportional, "by_channel", noted)
    return calls


@pytest.mark.parametrize(("form", "projections"), [({}, "apart"), ({}, "one"), ({"kv_only": True}, "apart")], ids=str)
def test_a_patched_unet_takes_the_channel_in_every_fused_block(
    form: dict[str, Any], projections: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = tiny.sd15_unet()
    if projections == "one":
        unet.fuse_qkv_projections()
    call = tiny.inputs(unet)
    with tofu_sd.patched(unet, 0.5, proportional=True, **form):
        ours = tiny.predict(unet, **call)
        assert counted == [128] * 5
        monkeypatch.setattr(proportional, "FLASH_DEVICE", "cuda")
        masked = tiny.predict(unet, **call)
    assert counted == [128] * 5
    torch.testing.assert_close(ours, masked, rtol=1e-4, atol=1e-5)  # float32 sums in another order, through 5 blocks


def test_processors_that_know_no_sdpa_see_an_ordinary_mask(counted: list[int]) -> None:
    unet = tiny.sd15_unet()
    call = tiny.inputs(unet)
    with tofu_sd.patched(unet, 0.5, proportional=True):
        unet.set_attn_processor(AttnProcessor2_0())
        expected = tiny.predict(unet, **call)
        assert counted
        counted.clear()
        for use in (
            lambda: unet.set_attn_processor(AttnProcessor()),
            lambda: unet.set_attention_slice(1),
            lambda: unet.set_attn_processor(LooksAtItsMask()),
        ):
            use()
            out = tiny.predict(unet, **call)
            assert type(out) is Tensor
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert not counted


def test_the_channel_compiles(counted: list[int]) -> None:
    unet = tiny.shallow_unet()
    call = tiny.inputs(unet)
    widths: list[int] = []

    def noting(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls = [node for node in graph.graph.nodes if node.target is F.scaled_dot_product_attention]
        widths.extend(node.args[0].meta["example_value"].shape[-1] for node in calls)
        return graph.forward

    with tofu_sd.patched(unet, 0.5, proportional=True):
        expected = tiny.predict(unet, **call)
        compiled = torch.compile(unet, fullgraph=True, backend=noting)
        torch.testing.assert_close(tiny.predict(compiled, **call), expected)
    width = (
        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.out_features
        // unet.config.attention_head_dim
    )
    assert widths.count(width + proportional.EXTRA) == 3  # the fused blocks


def test_gradients_flow_through_the_channel() -> None:
    query, key, value, size = (t.requires_grad_() for t in attention(8, torch.float64))
    both = []
    for way in (by_channel, by_mask):
        out = way(query, key, value, size.log()[:, None, None])
        both.append(torch.autograd.grad(out.square().sum(), (query, key, value, size)))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # the number is held in float32
