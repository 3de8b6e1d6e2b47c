"""Proportional attention adds log(n_i) to the logits of key i, through a mask or through extra channels; both agree."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

import tofu_sd
from tofu_sd.core import attention_by_size, proportional
from tofu_sd.core.proportional import KeyBias, by_channel, by_mask, flash_takes, key_bias


def random_heads(B: int, H: int, N: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random [B, H, N, d] in the memory layout of diffusers' processors: heads side by side in the channels."""
    return tiny.noise(B, N, H * d, seed=seed).to(dtype).view(B, N, H, d).transpose(1, 2)


def random_attention_inputs(d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(query, key, value, group sizes) of 2 samples, 3 heads, 33 queries and 21 keys."""
    size = torch.randint(1, 500, (2, 21), generator=torch.Generator().manual_seed(3)).float()
    return (
        random_heads(2, 3, 33, d, dtype, 0),
        random_heads(2, 3, 21, d, dtype, 1),
        random_heads(2, 3, 21, d, dtype, 2),
        size,
    )


def exact_attention(query: Tensor, key: Tensor, value: Tensor, size: Tensor, scale: float) -> Tensor:
    """Attention in float64 that counts each key as often as the number of tokens it represents."""
    odds = (query.double() @ key.double().mT * scale).exp() * size.double()[:, None, None]
    return odds / odds.sum(-1, keepdim=True) @ value.double()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("d", [5, 40, 64, 80])
def test_bias_channel_equals_mask(d: int, scale: float | None) -> None:
    query, key, value, size = random_attention_inputs(d, torch.float64)
    bias = key_bias(size.double().log(), torch.float64, sdpa=True).unsqueeze(1)
    expected = exact_attention(query, key, value, size, scale or d**-0.5)
    torch.testing.assert_close(by_mask(query, key, value, bias, scale=scale), expected)
    # the bias is stored in float32, as group sizes are
    torch.testing.assert_close(by_channel(query, key, value, bias, scale=scale), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [40, 64, 80])
def test_bias_channels_are_more_accurate_than_mask_in_half_precision_dtype(
    d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second channel stores the rounding error of log n in the first; a half-precision mask loses it."""
    monkeypatch.setattr(proportional, "FLASH_DEVICE", "cpu")
    query, key, value, size = random_attention_inputs(d, dtype)
    bias = key_bias(size.log(), dtype, sdpa=True).unsqueeze(1)
    expected = exact_attention(query, key, value, size, d**-0.5)
    channel_error, mask_error = (
        (way(query, key, value, bias.as_subclass(Tensor)).double() - expected).abs().mean()
        for way in (by_channel, by_mask)
    )
    assert channel_error < mask_error / 2


def test_key_bias_subclass_survives_only_reshaping() -> None:
    mask = torch.zeros(2, 1, 5).as_subclass(KeyBias)
    assert type(mask.repeat_interleave(3, dim=0).view(2, 3, -1, 5)) is KeyBias
    for other in (mask + 1, mask.to(torch.float64), torch.baddbmm(mask, torch.ones(2, 4, 3), torch.ones(2, 3, 5))):
        assert type(other) is Tensor


class RequiresPlainMask(AttnProcessor2_0):
    """Requires a plain tensor as mask, as xformers does: subclasses are rejected."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mask = kwargs.get("attention_mask")
        assert mask is None or (type(mask) is Tensor and mask.dtype == hidden_states.dtype)
        return super().__call__(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize(
    ("query", "options"),
    [
        (torch.empty(1, 1, 4, 40), {}),  # flash supports no float32
        (torch.empty(1, 1, 4, 256, dtype=torch.float16), {}),  # nor heads this wide
        (torch.empty(1, 1, 4, 40, dtype=torch.float16), {"dropout_p": 0.1}),
        (torch.empty(1, 1, 4, 40, dtype=torch.float16), {"is_causal": True}),
    ],
    ids=["float32", "wide", "dropout", "causal"],
)
def test_inputs_unsupported_by_flash_keep_the_mask(
    query: Tensor, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proportional, "FLASH_DEVICE", "cpu")
    assert not flash_takes(query, **options)


def test_bias_stays_a_mask_for_flash_and_cudnn_backends(
    channel_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H200, attention with a bias takes 1.3x to 1.6x the time without one; channels take 1.4x to 3.5x."""
    q, k, v = (tiny.noise(2, 4, 16, 8, seed=i) for i in range(3))
    bias = tiny.noise(2, 1, 1, 16)
    for choice, times in (("FLASH_ATTENTION", 1), ("CUDNN_ATTENTION", 1), ("EFFICIENT_ATTENTION", 2)):
        backend = int(getattr(attention_by_size.SDPBackend, choice))
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, backend=backend, **__: backend)
        torch.testing.assert_close(proportional.attend(q, k, v, bias), by_mask(q, k, v, bias))
        assert len(channel_calls) == times


@pytest.fixture
def channel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the CPU take the path of flash attention; records the number of keys of each call that uses the channel."""
    calls: list[int] = []

    def recorded_by_channel(query: Tensor, key: Tensor, *args: Any, **more: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            calls.append(key.shape[-2])
        return by_channel(query, key, *args, **more)

    monkeypatch.setattr(proportional, "FLASH_DEVICE", "cpu")
    monkeypatch.setattr(proportional, "FLASH_TYPES", (torch.float32,))
    monkeypatch.setattr(proportional, "flash_takes", lambda query, **more: True)
    monkeypatch.setattr(proportional, "by_channel", recorded_by_channel)
    return calls


@pytest.mark.parametrize(("form", "projections"), [({}, "apart"), ({}, "one"), ({"kv_only": True}, "apart")], ids=str)
def test_patched_unet_uses_bias_channel_in_every_merged_block(
    form: dict[str, Any], projections: str, channel_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = tiny.sd15_unet()
    if projections == "one":
        unet.fuse_qkv_projections()
    call = tiny.inputs(unet)
    with tofu_sd.patched(unet, 0.5, proportional=True, **form):
        ours = tiny.predict(unet, **call)
        assert channel_calls == [128] * 5
        monkeypatch.setattr(proportional, "FLASH_DEVICE", "cuda")
        with_mask = tiny.predict(unet, **call)
    assert channel_calls == [128] * 5
    # 5 blocks of float32 sums in a different order
    torch.testing.assert_close(ours, with_mask, rtol=1e-4, atol=1e-5)


def test_processors_without_sdpa_get_a_plain_mask(channel_calls: list[int]) -> None:
    unet = tiny.sd15_unet()
    call = tiny.inputs(unet)
    with tofu_sd.patched(unet, 0.5, proportional=True):
        unet.set_attn_processor(AttnProcessor2_0())
        expected = tiny.predict(unet, **call)
        assert channel_calls
        channel_calls.clear()
        for use in (
            lambda: unet.set_attn_processor(AttnProcessor()),
            lambda: unet.set_attention_slice(1),
            lambda: unet.set_attn_processor(RequiresPlainMask()),
        ):
            use()
            out = tiny.predict(unet, **call)
            assert type(out) is Tensor
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert not channel_calls


def test_bias_channel_compiles_in_one_graph(channel_calls: list[int]) -> None:
    unet = tiny.shallow_unet()
    call = tiny.inputs(unet)
    widths: list[int] = []

    def record_widths(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls = [node for node in graph.graph.nodes if node.target is F.scaled_dot_product_attention]
        widths.extend(node.args[0].meta["example_value"].shape[-1] for node in calls)
        return graph.forward

    with tofu_sd.patched(unet, 0.5, proportional=True):
        expected = tiny.predict(unet, **call)
        compiled = torch.compile(unet, fullgraph=True, backend=record_widths)
        torch.testing.assert_close(tiny.predict(compiled, **call), expected)
    width = (
        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.out_features
        // unet.config.attention_head_dim
    )
    assert widths.count(width + proportional.EXTRA) == 3  # the merged blocks


def test_gradients_flow_through_bias_channel() -> None:
    query, key, value, size = (t.requires_grad_() for t in random_attention_inputs(8, torch.float64))
    both = []
    for way in (by_channel, by_mask):
        out = way(query, key, value, size.log()[:, None, None])
        both.append(torch.autograd.grad(out.square().sum(), (query, key, value, size)))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # the bias is stored in float32
