"""A property of every patched pipeline: no image depends on an earlier one."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch


def check_independence_of_earlier_images(pipe: Any) -> None:
    """Size, prompt, number of steps or interruption of the previous image have no effect."""
    expected = tiny.images(pipe, num_inference_steps=4)
    earlier_calls: list[dict[str, Any]] = [
        {"num_inference_steps": 4, "prompt": "a blue hat"},
        {"num_inference_steps": 1},
        {"num_inference_steps": 4, "guidance_scale": 1.0},
        {"num_inference_steps": 5, "height": 256, "width": 64},
    ]
    for call in earlier_calls:
        tiny.images(pipe, seed=9, **call)
        assert torch.equal(tiny.images(pipe, num_inference_steps=4), expected)

    def stop(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        raise KeyboardInterrupt

    for steps in (50, 4):
        with pytest.raises(KeyboardInterrupt):
            tiny.images(pipe, seed=9, num_inference_steps=steps, callback_on_step_end=stop)
        assert torch.equal(tiny.images(pipe, num_inference_steps=4), expected)
