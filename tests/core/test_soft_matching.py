"""Properties of soft matching (AdaptiVision Eq. 2-3, for Stable Diffusion): the SoftMap, its functions, and a UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tofu_sd
from tofu_sd import TokenFusionConfig, recipes
from tofu_sd.core.matching import soft_assignment, soft_merge_map
from tofu_sd.core.partition import Windows
from tofu_sd.core.proportional import proportional_attention
from tofu_sd.core.reductions import mean, unmerge
from tofu_sd.core.token_map import SoftMap
from tofu_sd.patching.step_tracker import StepTracker

CPU = torch.device("cpu")
LOW_TEMPERATURE = 1e-7


def make_windows(h: int, w: int, sx: int = 2, sy: int = 2, window: int = 2, seed: int | None = None) -> Windows:
    """Windows of all tokens of an h x w grid, as StepTracker builds them."""
    options = {"early": "mean", "late": "mean", "window": window, "temperature": 1.0, "sx": sx, "sy": sy, "seed": seed}
    tracker = StepTracker(TokenFusionConfig(1 - 1 / (sx * sy), **options))
    tracker.start_step(500)
    layout = tracker.grid(h, w, CPU)
    assert layout is not None
    assert layout.windows is not None
    return layout.windows


@st.composite
def cases(draw: Callable[..., Any]) -> tuple[Tensor, Windows, float]:
    """Tokens x [B, N, C] in float64, windows over odd, thin and indivisible grids, and a temperature."""
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    sx, sy = draw(st.sampled_from([(2, 1), (1, 2), (2, 2), (3, 2)]))
    if h * w == max(1, h // sy) * max(1, w // sx):
        h, w = 2 * h + 1, 2 * w + 1  # otherwise all tokens are centroids and there are no windows
    seed = draw(st.integers(0, 2**31 - 1))
    windows = make_windows(h, w, sx, sy, draw(st.integers(1, 4)), seed if draw(st.booleans()) else None)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(draw(st.integers(1, 2)), h * w, 4, generator=generator, dtype=torch.float64)
    return x, windows, draw(st.floats(0.01, 10))


@settings(deadline=None, max_examples=100)
@given(cases())
def test_soft_weights_sum_to_one_per_token_within_its_window(case: tuple[Tensor, Windows, float]) -> None:
    x, windows, temperature = case
    map = soft_merge_map(x, windows, temperature)
    B, N, _ = x.shape
    assert map.before == (B, N)
    assert map.after == map.size.shape == (B, len(windows.dst_index))
    assert (map.weights >= 0).all()
    torch.testing.assert_close(map.weights.sum(dim=-1).flatten(1)[:, map.src_index], torch.ones(B, N).double())
    torch.testing.assert_close(map.size.sum(dim=1), torch.full((B,), float(N)).double())
    assert (map.size > 0).all()  # otherwise its logarithm is not finite
    assert map.tokens.flatten()[map.src_index].tolist() == list(range(N))


@settings(deadline=None, max_examples=100)
@given(cases())
def test_soft_matching_equals_equations_2_and_3(case: tuple[Tensor, Windows, float]) -> None:
    """Computes Eq. 2 and 3 in a loop over windows; padding of small windows and token order have no effect."""
    x, windows, temperature = case
    map = soft_merge_map(x, windows, temperature)
    y, back = mean(x, map), unmerge(mean(x, map), map)
    n = map.src_index // windows.src.shape[1]  # the window index of each token and of each centroid
    k = windows.dst_index // windows.dst.shape[1]
    for t in range(len(windows.src)):
        z, mu = x[:, n == t], x[:, map.kept_idx[k == t]]
        variance = (z - z.mean(dim=1, keepdim=True)).square().sum(dim=-1).mean(dim=1)[:, None, None]
        a = (-(z[:, :, None] - mu[:, None]).square().sum(dim=-1) / (temperature * variance.clamp_min(1e-300))).softmax(
            -1
        )
        condensed = a.mT @ z / a.sum(dim=1).unsqueeze(-1)
        torch.testing.assert_close(y[:, k == t], condensed)
        torch.testing.assert_close(map.size[:, k == t], a.sum(dim=1))
        torch.testing.assert_close(back[:, n == t], a @ condensed)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_low_temperature_limit_is_nearest_centroid(case: tuple[Tensor, Windows, float]) -> None:
    x, windows, _ = case
    map = soft_merge_map(x, windows, LOW_TEMPERATURE)
    hard = map.argmax_map()
    token = hard.kept_idx.gather(1, hard.group_idx)  # the kept token of each token
    assert torch.equal(hard.group_idx.gather(1, hard.kept_idx), torch.arange(len(windows.dst_index)).expand(len(x), -1))
    here, there = map.src_index // windows.src.shape[1], windows.dst_index // windows.dst.shape[1]
    distances = torch.cdist(x, x[:, map.kept_idx]).masked_fill(here.unsqueeze(1) != there, float("inf"))
    assert torch.equal(token, map.kept_idx[distances.argmin(dim=-1)])
    # exp(-1e5): distances of random tokens differ by more than 1 % of their variance
    torch.testing.assert_close(map.size, hard.size.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(mean(x, map), mean(x, hard), rtol=0, atol=1e-6)
    torch.testing.assert_close(unmerge(x[:, map.kept_idx], map), unmerge(x[:, map.kept_idx], hard), rtol=0, atol=1e-6)
    assert hard.argmax_map() is hard


@settings(deadline=None, max_examples=50)
@given(cases(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_constant_tokens_stay_constant_in_each_dtype(case: tuple[Tensor, Windows, float], dtype: torch.dtype) -> None:
    """A flat sky stays flat; its variance of zero causes no division by zero."""
    x, windows, temperature = case
    flat = x[:, :1].to(dtype).expand_as(x)
    map = soft_merge_map(flat, windows, temperature)
    for y in (mean(flat, map), unmerge(mean(flat, map), map)):
        assert y.dtype == dtype
    # sums of at most about 200 equal float32 numbers, then one rounding to `dtype`
    rtol = max(1e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(unmerge(mean(flat, map), map), flat, rtol=rtol, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(cases(), st.floats(1e-3, 1e3))
def test_soft_weights_are_invariant_to_scale_and_offset(case: tuple[Tensor, Windows, float], scale: float) -> None:
    x, windows, temperature = case
    shifted = x * scale + 3 * scale
    torch.testing.assert_close(
        soft_merge_map(shifted, windows, temperature).weights, soft_merge_map(x, windows, temperature).weights
    )


@settings(deadline=None, max_examples=50)
@given(cases())
def test_proportional_attention_over_windows_of_equal_tokens_equals_full_attention(
    case: tuple[Tensor, Windows, float],
) -> None:
    """With log(size) added to the key logits, merged equal tokens count as much as the separate tokens."""
    x, windows, temperature = case
    q = x[:, windows.src[:, 0]][:, windows.src_index // windows.src.shape[1]]
    map = soft_merge_map(q, windows, temperature)
    full = proportional_attention(q, q, q, 2, torch.zeros(q.shape[:2]))
    merged = mean(q, map)
    # log(size) is float32
    torch.testing.assert_close(
        unmerge(proportional_attention(merged, merged, merged, 2, map.log_size), map), full, rtol=0, atol=1e-5
    )


def test_gradients_pass_gradcheck() -> None:
    """Covers weights, means, unmerging and padded windows; gradients are finite where all tokens are equal."""
    windows = make_windows(3, 5, 2, 1, 2)
    x = torch.randn(2, 15, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def roundtrip(x: Tensor) -> Tensor:
        map = soft_merge_map(x, windows, 0.7)
        return unmerge(mean(x, map), map) + map.size.sum()

    assert torch.autograd.gradcheck(roundtrip, (x,))
    flat = torch.ones(1, 15, 3, requires_grad=True)
    roundtrip(flat).square().sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_repeat_for_cfg_applies_one_map_to_both_halves() -> None:
    windows = make_windows(4, 6)
    x = tiny.noise(1, 24, 4)
    map, repeated = soft_merge_map(x, windows, 0.5), soft_merge_map(x, windows, 0.5).repeat_for_cfg()
    both = soft_merge_map(torch.cat([x, x]), windows, 0.5)
    assert repeated.before == both.before == (2, 24)
    assert torch.equal(mean(torch.cat([x, x]), repeated)[1:], mean(x, map))


def test_half_precision_dtype_is_matched_in_float32() -> None:
    windows, x = make_windows(8, 8), tiny.noise(1, 64, 16)
    for dtype in (torch.float16, torch.bfloat16):
        map = soft_merge_map(x.to(dtype), windows, 0.1)
        assert map.weights.dtype == torch.float32
        assert torch.equal(map.weights, soft_merge_map(x.to(dtype).float(), windows, 0.1).weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(soft_merge_map(x.to(dtype), windows, 0.1).weights, map.weights)
            assert torch.equal(mean(x.to(dtype), map), (mean(x.to(dtype).float(), map)).to(dtype))


def test_soft_assignment_treats_windows_as_batch_samples() -> None:
    z, mu = tiny.noise(2, 3, 5, 4), tiny.noise(2, 3, 2, 4, seed=1)
    used = torch.tensor([[True, True], [True, False], [False, True]])
    whole = soft_assignment(z, mu, 0.5, used)
    for b in range(2):
        torch.testing.assert_close(whole[b], soft_assignment(z[b], mu[b], 0.5, used))


# --- in a model -------------------------------------------------------------------------------------------------------

HALF = recipes.named("condense")


@pytest.fixture(autouse=True)
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_attention_runs_on_one_token_per_cell() -> None:
    unet = tiny.sd15_unet()
    shapes = []
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attn.to_q.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[1]))
    for config, (h, w), K in (
        (HALF, (16, 16), 128), (HALF, (17, 13), 17 * 6),
        (TokenFusionConfig.of(HALF, ratio=0.75, sy=2), (17, 13), 8 * 6),
    ):  # fmt: skip
        tofu_sd.apply_patch(unet, config)
        tiny.predict(unet, h, w)
        assert shapes.pop() == K == tofu_sd.summary(unet, (h, w)).rows[0].after


COMPILED: list[dict[str, Any]] = [
    {},
    {"kv_only": True, "proportional": False},
    {"merge_mlp": True, "merge_crossattn": True, "share_across_blocks": True, "levels": 2},
    {"share_across_cfg": True, "seed": 3, "match_on": "normed"},
]


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compiled_blocks_equal_eager_blocks_with_soft_matching(options: dict[str, Any]) -> None:
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), TokenFusionConfig.of(HALF, **options)) for _ in range(2))
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    for h, w in ((16, 16), (24, 16), (17, 13)):
        call = tiny.guided(tiny.inputs(eager, h, w))
        assert torch.equal(tiny.predict(unet, **call), tiny.predict(eager, **call))
    call = tiny.guided(tiny.inputs(eager))
    assert not torch.equal(tiny.predict(eager, **call), tiny.predict(tiny.shallow_unet(), **call))


def test_whole_compiled_unet_equals_eager_unet_with_soft_matching() -> None:
    """Uses one size: a symbolic number of windows takes the compiler minutes."""
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), HALF) for _ in range(2))
    unet = torch.compile(unet, fullgraph=True, backend="eager")
    assert torch.equal(tiny.predict(unet), tiny.predict(eager))


def test_record_maps_records_argmax_of_soft_maps() -> None:
    """The recorded map assigns each token to the destination of its largest weight."""
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), HALF)
    with tofu_sd.record_maps(unet) as records:
        tiny.predict(unet)
    assert [record.map.kept_idx.shape for record in records] == [(2, 128)] * 5
    assert all(record.map.size.sum() == 512 for record in records)


def test_gradients_reach_layers_before_soft_matching() -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), HALF)
    call = tiny.inputs(unet)
    unet(**call).sample.square().sum().backward()
    norm = unet.down_blocks[0].attentions[0].transformer_blocks[0].norm1
    assert norm.weight.grad.abs().max() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in unet.parameters())


def test_ratio_0_equals_baseline() -> None:
    unet = tiny.sd15_unet()
    baseline = tiny.predict(unet)
    assert torch.equal(tiny.predict(tofu_sd.apply_patch(unet, TokenFusionConfig.of(HALF, ratio=0))), baseline)


def test_condense_recipe_accepts_prefix_and_options() -> None:
    assert recipes.named("condense") == recipes.CONDENSE
    config = recipes.named("kv:condense@temperature=0.5@sy=2@window=4", 0.75)
    assert (config.temperature, config.ratio, config.kv_only) == (0.5, 0.75, True)
    assert config.slug == "kv-mean-r75-w4-soft0.5+p"
    assert len({TokenFusionConfig.of(HALF, temperature=t).slug for t in (0.1, 0.5, 1)}) == 3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature 0": ({"temperature": 0}, "temperature is 0; it must be None or a number > 0"),
    "NaN": ({"temperature": float("nan")}, "temperature is nan; it must be"),
    "a word": ({"temperature": "warm"}, "temperature is 'warm'; it must be"),
    "another ratio": ({"ratio": 0.3}, r"ratio is 0\.3 .* 1 - 1/\(sx\*sy\), here 0\.5; sx=2, sy=1 gives 0\.5"),
    "other cells": ({"sy": 2}, r"ratio is 0\.5 .* each 2 x 2 cell becomes one token, so ratio must be .* here 0\.75"),
    "prune": ({"early": "prune"}, "early, late, kv_early and kv_late must be 'mean'"),
    "partial_mlerp": ({"kv_late": "partial_mlerp"}, "early, late, kv_early and kv_late must be 'mean'"),
    "the whole map": ({"window": None}, "window is None: soft matching needs a window"),
    "a threshold too": ({"threshold": 0.9}, r"threshold is 0\.9: set only one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_soft_matching_options_raise_with_their_value(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        TokenFusionConfig.of(HALF, **options)


def test_soft_map_compares_by_value() -> None:
    map = soft_merge_map(tiny.noise(1, 24, 4), make_windows(4, 6), 0.5)
    assert isinstance(map, SoftMap)
    assert map == SoftMap(*map)
