"""The window of steps in which tokens are merged."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)

import tofu_sd


def record_merged_calls(unet: Any) -> list[bool]:
    """Returns a list that records, for every later call of the UNet, whether its first block ran on merged tokens."""
    calls: list[bool] = []
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    to_q, full = attn.to_q, unet.config.sample_size**2
    to_q.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1] < full))
    return calls


@pytest.mark.parametrize(
    ("window", "merged"),
    [
        ((0.0, 1.0), [True] * 5),
        ((0.0, 0.5), [True, True, False, False, False]),
        ((0.5, 1.0), [False, False, True, True, True]),
        ((0.3, 0.7), [False, True, True, False, False]),
        ((0.999, 1.0), [False, False, False, False, True]),
    ],
)
def test_step_window_starts_and_ends_at_its_steps(window: tuple[float, float], merged: list[bool]) -> None:
    """DDIM's timesteps for 5 steps are 801, 601, 401, 201, 1: progress .199, .399, .599, .799, .999."""
    pipe = tiny.sd15_pipe()
    calls = record_merged_calls(pipe.unet)
    tofu_sd.apply_patch(pipe, 0.5, start=window[0], end=window[1])
    tiny.images(pipe, num_inference_steps=5)
    assert calls == merged


def test_step_window_of_img2img_starts_midway() -> None:
    """Progress follows the noise level, not the number of calls: strength 0.6 starts at 40 %."""
    pipe = tiny.sd15_pipe(StableDiffusionImg2ImgPipeline)
    calls = record_merged_calls(pipe.unet)
    tofu_sd.apply_patch(pipe, 0.5, start=0.0, end=0.5)
    call = {"image": tiny.noise(1, 3, 128, 128).sigmoid(), "num_inference_steps": 5}
    tiny.images(pipe, strength=0.6, **call)  # timesteps 401, 201, 1
    assert calls == [False, False, False]
    calls.clear()
    tiny.images(pipe, strength=1.0, **call)  # 801, 601, 401, 201, 1
    assert calls == [True, True, False, False, False]


def test_outside_the_step_window_equals_baseline() -> None:
    unet = tiny.shallow_unet()
    baseline = tiny.predict(unet, t=900)
    tofu_sd.apply_patch(unet, 0.5, start=0.5)
    assert torch.equal(tiny.predict(unet, t=900), baseline)
    assert torch.equal(tiny.predict(unet, timestep=900), baseline)
    assert not torch.equal(tiny.predict(unet, t=100), tiny.predict(tofu_sd.remove_patch(unet), t=100))


def test_step_window_without_end_includes_timestep_0() -> None:
    """The last timestep of many schedules is 0, which is progress 1."""
    pipe = tiny.sd15_pipe()
    pipe.scheduler = DDIMScheduler(**tiny.BETAS, set_alpha_to_one=False)  # 800, 600, 400, 200, 0
    calls = record_merged_calls(pipe.unet)
    tofu_sd.apply_patch(pipe, 0.5, start=0.5)
    tiny.images(pipe, num_inference_steps=5)
    assert calls == [False, False, True, True, True]


def test_step_window_raises_for_unsupported_timesteps() -> None:
    """A scheduler that passes functions of the noise level as timesteps would start the window at wrong steps."""
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, end=0.5)
    with pytest.raises(ValueError, match=r"timestep 1500 is outside 0\.\.1000"):
        tiny.predict(unet, t=1500)
    pipe = tiny.sd15_pipe()
    for scheduler in (EulerDiscreteScheduler(timestep_type="continuous"), EDMEulerScheduler()):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=r"start is 0 and end is 0\.5: .* scheduler"):
            tofu_sd.apply_patch(pipe, 0.5, end=0.5)
        tofu_sd.remove_patch(tofu_sd.apply_patch(pipe, 0.5))  # without a window any scheduler works
