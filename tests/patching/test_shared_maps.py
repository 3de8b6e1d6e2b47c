"""Shared maps: which blocks and steps match again, and that no image depends on another."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from image_independence import check_independence_of_earlier_images
from oracle import blocks

import tofu_sd
from tofu_sd.core import matching


@pytest.fixture
def matched_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the batch size of every matching."""
    batches: list[int] = []
    match = matching._nearest

    def count_match(x: Any, *rest: Any) -> Any:
        batches.append(len(x))
        return match(x, *rest)

    monkeypatch.setattr(matching, "_nearest", count_match)
    return batches


def test_each_block_matches_independently_by_default(matched_batches: list[int]) -> None:
    tiny.predict(tofu_sd.apply_patch(tiny.sd15_unet(), 0.5))
    assert matched_batches == [2] * 5


@pytest.mark.parametrize("levels", [1, 2])
def test_share_across_blocks_matches_once_per_resolution(levels: int, matched_batches: list[int]) -> None:
    tiny.predict(tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, share_across_blocks=True, levels=levels))
    assert len(matched_batches) == levels


def test_shared_map_is_the_map_of_the_first_block() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, share_across_blocks=True)
    states = [block.attn1._tofu for _, block, _ in blocks(unet)]
    maps = []
    for state in states:
        pop_map = state.pop_map

        def record_map(layer: str, x: Any, pop_map: Any = pop_map) -> Any:
            maps.append(pop_map(layer, x))
            return maps[-1]

        state.pop_map = record_map
    tiny.predict(unet)
    assert len(maps) == 5
    assert all(map is maps[0] for map in maps)


def test_shared_map_is_dropped_after_each_call(matched_batches: list[int]) -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, share_across_blocks=True)
    first = tiny.predict(unet, seed=1)
    tiny.predict(unet, seed=2)
    assert torch.equal(tiny.predict(unet, seed=1), first)
    assert len(matched_batches) == 3


def test_share_across_cfg_matches_one_half(matched_batches: list[int]) -> None:
    """With two equal halves, the output is unchanged and half as many samples are matched."""
    unet = tiny.sd15_unet()
    call = {name: value[:1].repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value
            for name, value in tiny.inputs(unet).items()}  # fmt: skip
    separate = tiny.predict(tofu_sd.apply_patch(unet, 0.5), **call)
    assert torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.5, share_across_cfg=True), **call), separate)
    assert matched_batches == [2] * 5 + [1] * 5


def test_share_across_cfg_uses_the_positive_prompt() -> None:
    """Pipelines put the positive prompt second; its half gives the same result as alone."""
    unet, call = tiny.sd15_unet(), tiny.guided(tiny.inputs(tiny.sd15_unet()))
    alone = {name: value[1:] if value.ndim else value for name, value in call.items()}
    positive = tiny.predict(tofu_sd.apply_patch(unet, 0.5), **alone)
    both = tiny.predict(tofu_sd.apply_patch(unet, 0.5, share_across_cfg=True), **call)
    torch.testing.assert_close(both[1:], positive, rtol=0, atol=1e-4)  # a batch of two is summed in a different order
    own = tiny.predict(tofu_sd.apply_patch(unet, 0.5), **call)
    assert (both[:1] - own[:1]).abs().max() > 1e-3


def test_share_across_cfg_raises_for_an_odd_batch() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, share_across_cfg=True)
    with pytest.raises(ValueError, match=r"share_across_cfg .* 3 samples"):
        tiny.predict(unet, batch=3)


def test_share_across_cfg_raises_without_guidance() -> None:
    """In a batch of two images without guidance (Turbo, LCM), the first would be merged by the map of the second."""
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(), 0.5, share_across_cfg=True)
    with pytest.raises(ValueError, match=r"share_across_cfg needs two equal halves .* these 2 differ"):
        pipe(["a fox", "a whale"], num_inference_steps=1, output_type="latent", guidance_scale=1.0)
    for _ in range(2):  # with guidance it works; the check runs again for every image
        tiny.images(pipe, prompt=["a fox", "a whale"])
        with pytest.raises(ValueError, match="these 2 differ"):
            pipe(["a fox", "a whale"], num_inference_steps=1, output_type="latent", guidance_scale=1.0)


def test_share_across_cfg_raises_after_compile() -> None:
    torch._dynamo.reset()
    unet = torch.compile(
        tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, share_across_cfg=True), backend="eager", fullgraph=True
    )
    with pytest.raises(RuntimeError, match="share_across_cfg"):
        tiny.predict(unet)
    torch._dynamo.reset()


@pytest.mark.parametrize(("interval", "steps"), [(2, 4), (3, 7), (10, 4)])
def test_match_interval_matches_once_per_interval(interval: int, steps: int, matched_batches: list[int]) -> None:
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(), 0.5, match_interval=interval)
    tiny.images(pipe, num_inference_steps=steps)
    assert len(matched_batches) == 5 * -(-steps // interval)


def test_image_is_independent_of_earlier_images() -> None:
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(), 0.5, match_interval=3, share_across_blocks=True)
    check_independence_of_earlier_images(pipe)


def test_new_conditioning_is_matched_again(matched_batches: list[int]) -> None:
    """New conditioning at a later timestep means another image, as image-to-image starts within the schedule."""
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, match_interval=4)
    call = tiny.inputs(unet)
    for t in (900, 800):
        tiny.predict(unet, **{**call, "timestep": torch.tensor(t)})
    assert len(matched_batches) == 5
    tiny.predict(unet, **{**call, "timestep": torch.tensor(700), "encoder_hidden_states": tiny.noise(2, 7, 16)})
    assert len(matched_batches) == 10


def test_match_interval_requires_regional_compile() -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, match_interval=2)
    with pytest.raises(RuntimeError, match=r"match_interval needs .* compile_repeated_blocks\(\)"):
        tiny.predict(torch.compile(unet, backend="eager", fullgraph=True))
    torch._dynamo.reset()


SHARING: list[dict[str, Any]] = [{"share_across_blocks": True}, {"share_across_cfg": True}, {"window": 2}]


@pytest.mark.parametrize(
    ("regional", "options"),
    [*((whole, options) for options in SHARING for whole in (False, True)), (True, {"match_interval": 2})],
    ids=str,
)
def test_compiled_models_share_maps_like_eager_models(regional: bool, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, **options) for _ in range(2))
    if regional:
        unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        unet = torch.compile(unet, fullgraph=True, backend="eager")
    call = tiny.guided(tiny.inputs(unet))
    for t in (900, 800, 700, 900):
        step = {**call, "timestep": torch.tensor(t)}
        with torch.no_grad():
            assert torch.equal(unet(**step).sample, eager(**step).sample)
    torch._dynamo.reset()
