"""Blocks with fewer than min_tokens tokens are skipped; 'auto' times the attention that runs, once."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

import tofu_sd
from tofu_sd.patching import autotune
from tofu_sd.patching.patch import patch_of


@pytest.fixture(autouse=True)
def _clear_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_measured", {})


@pytest.fixture
def faster_from(monkeypatch: pytest.MonkeyPatch) -> Any:
    """faster_from(n) makes merged attention the faster one from n tokens on and returns the list of timed sizes."""
    timed: list[int] = []

    def rule(n: int) -> list[int]:
        def seconds(run: Any, device: torch.device) -> float:
            merged, x, _ = run.__defaults__
            timed.append(x.shape[1])
            run()
            return 0.001 if merged == (x.shape[1] >= n) else 0.002

        monkeypatch.setattr(autotune, "_seconds", seconds)
        return timed

    return rule


@pytest.mark.parametrize(("min_tokens", "merged"), [(0, True), (256, True), (257, False)])
def test_blocks_below_min_tokens_are_skipped(min_tokens: int, merged: bool) -> None:
    unet = tiny.sd15_unet()
    baseline = tiny.predict(unet)  # 16 x 16
    tofu_sd.apply_patch(unet, 0.5, min_tokens=min_tokens)
    assert torch.equal(tiny.predict(unet), baseline) != merged
    assert tofu_sd.summary(unet).rows[0].skipped != merged
    larger = tiny.predict(unet, 24, 16)
    assert not torch.equal(larger, tiny.predict(tofu_sd.remove_patch(unet), 24, 16))


def test_summary_lists_skipped_blocks() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, levels=2, min_tokens=65)
    headline = tofu_sd.summary(unet).headline
    assert "on 5 of 16 transformer blocks, tokens 256 -> 128, 64 skipped (fewer than 65) at" in headline


def test_auto_min_tokens_is_the_first_of_two_faster_sizes(faster_from: Any) -> None:
    timed = faster_from(256)
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens="auto")
    assert {row.min_tokens for row in tofu_sd.summary(unet).rows} == {256}
    assert sorted(set(timed)) == [64, 144, 256, 576]


def test_auto_min_tokens_exceeds_timed_sizes_where_none_is_faster(
    faster_from: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster_from(10**9)
    monkeypatch.setattr(autotune, "SIDES", (8, 12))
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens="auto")
    assert tofu_sd.summary(unet).rows[0].min_tokens == 145


def test_same_attention_is_timed_once_per_dtype(faster_from: Any) -> None:
    timed = faster_from(144)
    for _ in range(2):
        tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens="auto")
    calls_per_dtype = len(timed)
    tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens="auto")
    assert len(timed) == calls_per_dtype
    tofu_sd.apply_patch(tiny.sd15_unet().double(), 0.5, min_tokens="auto")
    assert len(timed) == 2 * calls_per_dtype


def test_timing_changes_neither_output_nor_global_rng(faster_from: Any) -> None:
    """The image equals that of the same explicit min_tokens; the global generator stays unchanged."""
    faster_from(144)
    auto = tiny.sd15_unet()
    before = torch.get_rng_state()
    tofu_sd.apply_patch(auto, 0.5, min_tokens="auto", share_across_blocks=True)
    assert torch.equal(torch.get_rng_state(), before)
    explicit = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens=144, share_across_blocks=True)
    assert torch.equal(tiny.predict(auto), tiny.predict(explicit))


def test_timing_stops_after_about_one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elapsed time, not the list of sizes, ends the timing; warm-up and compilation in the first calls do not count."""
    calls: dict[int, int] = {}

    def seconds(run: Any, device: torch.device) -> float:
        tokens = run.__defaults__[1].shape[1]
        calls[tokens] = calls.get(tokens, 0) + 1
        return 100.0 if calls[tokens] <= 2 else 0.15  # neither is faster; four timed calls per size

    monkeypatch.setattr(autotune, "_seconds", seconds)
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens="auto")
    assert tofu_sd.summary(unet).rows[0].min_tokens == 12 * 12 + 1  # 0.6 s, then 1.2 s


def test_auto_min_tokens_with_offloading_raises_and_keeps_the_previous_patch() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.25)
    before = patch_of(unet)
    nn.Module.__setattr__(unet.down_blocks[0], "_hf_hook", object())
    with pytest.raises(ValueError, match=r"min_tokens is 'auto'.*offloading"):
        tofu_sd.apply_patch(unet, 0.5, min_tokens="auto")
    assert patch_of(unet).config == before.config


def test_attention_with_other_head_count_is_timed_again(faster_from: Any) -> None:
    timed = faster_from(144)
    for heads in (2, 4):
        tofu_sd.apply_patch(tiny.sd15_unet(attention_head_dim=heads), 0.5, min_tokens="auto")
    assert timed[: len(timed) // 2] == timed[len(timed) // 2 :]


def test_auto_min_tokens_raises_without_merge_attn_or_for_float8_dtype() -> None:
    with pytest.raises(ValueError, match="merge_attn is False"):
        tofu_sd.TokenFusionConfig(min_tokens="auto", merge_attn=False, merge_mlp=True)
    with pytest.raises(ValueError, match=r"these are torch\.float8_e4m3fn"):
        tofu_sd.apply_patch(tiny.sd15_unet().to(torch.float8_e4m3fn), 0.5, min_tokens="auto")


def test_numpy_integer_min_tokens_is_accepted() -> None:
    numpy = pytest.importorskip("numpy")
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens=numpy.int64(257))
    assert all(row.skipped for row in tofu_sd.summary(unet).rows)


@pytest.mark.parametrize("value", [-1, 1.5, True, "always", None])
def test_invalid_min_tokens_raises_with_its_value(value: Any) -> None:
    with pytest.raises(ValueError, match=r"min_tokens is .*; it must be 'auto' or an integer >= 0"):
        tofu_sd.TokenFusionConfig(min_tokens=value)
