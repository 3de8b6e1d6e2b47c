"""Maps too small to pay are left alone; what pays is measured once, on the attention that will run."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

import tofu_sd
from tofu_sd.patching import autotune as calibrate
from tofu_sd.patching.patch import patch_of


@pytest.fixture(autouse=True)
def _nothing_measured_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_measured", {})


@pytest.fixture
def pays_from(monkeypatch: pytest.MonkeyPatch) -> Any:
    """pays_from(n): lets fused attention be the faster one from n tokens on; gives the sizes that were timed."""
    timed: list[int] = []

    def rule(n: int) -> list[int]:
        def seconds(run: Any, device: torch.device) -> float:
            fused, x, _ = run.__defaults__
            timed.append(x.shape[1])
            run()
            return 0.001 if fused == (x.shape[1] >= n) else 0.002

        monkeypatch.setattr(calibrate, "_seconds", seconds)
        return timed

    return rule


@pytest.mark.parametrize(("least", "fused"), [(0, True), (256, True), (257, False)])
def test_smaller_maps_are_left_alone(least: int, fused: bool) -> None:
    unet = tiny.sd15_unet()
    plain = tiny.predict(unet)  # 16 x 16
    tofu_sd.apply_patch(unet, 0.5, min_tokens=least)
    assert torch.equal(tiny.predict(unet), plain) != fused
    assert tofu_sd.summary(unet).rows[0].skipped != fused
    larger = tiny.predict(unet, 24, 16)
    assert not torch.equal(larger, tiny.predict(tofu_sd.remove_patch(unet), 24, 16))


def test_the_summary_says_what_is_left_alone() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, levels=2, min_tokens=65)
    headline = tofu_sd.summary(unet).headline
    assert "on 5 of 16 transformer blocks, tokens 256 -> 128, 64 skipped (fewer than 65) at" in headline


def test_auto_is_the_first_of_two_sizes_that_pay(pays_from: Any) -> None:
    timed = pays_from(256)
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens="auto")
    assert {row.min_tokens for row in tofu_sd.summary(unet).rows} == {256}
    assert sorted(set(timed)) == [64, 144, 256, 576]


def test_what_never_pays_is_fused_only_beyond_what_was_tried(pays_from: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pays_from(10**9)
    monkeypatch.setattr(calibrate, "SIDES", (8, 12))
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens="auto")
    assert tofu_sd.summary(unet).rows[0].min_tokens == 145


def test_the_same_attention_is_measured_once(pays_from: Any) -> None:
    timed = pays_from(144)
    for _ in range(2):
        tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens="auto")
    once = len(timed)
    tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens="auto")
    assert len(timed) == once
    tofu_sd.apply_patch(tiny.sd15_unet().double(), 0.5, min_tokens="auto")
    assert len(timed) == 2 * once


def test_measuring_leaves_no_trace(pays_from: Any) -> None:
    """The same picture as with the number that it finds; nothing drawn from the global generator."""
    pays_from(144)
    auto = tiny.sd15_unet()
    before = torch.get_rng_state()
    tofu_sd.apply_patch(auto, 0.5, min_tokens="auto", share_across_blocks=True)
    assert torch.equal(torch.get_rng_state(), before)
    told = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens=144, share_across_blocks=True)
    assert torch.equal(tiny.predict(auto), tiny.predict(told))


def test_it_takes_about_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time spent, not the list of sizes, ends it; what a first call takes to warm up and compile is not counted."""
    called: dict[int, int] = {}

    def seconds(run: Any, device: torch.device) -> float:
        tokens = run.__defaults__[1].shape[1]
        called[tokens] = called.get(tokens, 0) + 1
        return 100.0 if called[tokens] <= 2 else 0.15  # neither is faster; four timed calls a size

    monkeypatch.setattr(calibrate, "_seconds", seconds)
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens="auto")
    assert tofu_sd.summary(unet).rows[0].min_tokens == 12 * 12 + 1  # 0.6 s, then 1.2 s


def test_offloaded_weights_cannot_be_timed_and_the_patch_before_stays() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.25)
    before = patch_of(unet)
    nn.Module.__setattr__(unet.down_blocks[0], "_hf_hook", object())
    with pytest.raises(ValueError, match=r"min_tokens is 'auto'.*offloading"):
        tofu_sd.apply_patch(unet, 0.5, min_tokens="auto")
    assert patch_of(unet).config == before.config


def test_other_heads_are_another_attention(pays_from: Any) -> None:
    timed = pays_from(144)
    for heads in (2, 4):
        tofu_sd.apply_patch(tiny.sd15_unet(attention_head_dim=heads), 0.5, min_tokens="auto")
    assert timed[: len(timed) // 2] == timed[len(timed) // 2 :]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="merge_attn is False"):
        tofu_sd.TokenFusionConfig(min_tokens="auto", merge_attn=False, merge_mlp=True)
    with pytest.raises(ValueError, match=r"these are torch\.float8_e4m3fn"):
        tofu_sd.apply_patch(tiny.sd15_unet().to(torch.float8_e4m3fn), 0.5, min_tokens="auto")


def test_numpy_numbers_count() -> None:
    numpy = pytest.importorskip("numpy")
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens=numpy.int64(257))
    assert all(row.skipped for row in tofu_sd.summary(unet).rows)


@pytest.mark.parametrize("value", [-1, 1.5, True, "always", None])
def test_bad_values_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"min_tokens is .*; it must be 'auto' or an integer >= 0"):
        tofu_sd.TokenFusionConfig(min_tokens=value)
