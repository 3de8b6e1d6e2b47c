"""Maps used more than once: which blocks and steps match for themselves, and that no picture depends on another."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from oracle import blocks

import tofu_sd
from tofu_sd.core import matching


@pytest.fixture
def matched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the batch of every matching that is done."""
    batches: list[int] = []
    match = matching.most_similar

    def counted(x: Any, *rest: Any) -> Any:
        batches.append(len(x))
        return match(x, *rest)

    monkeypatch.setattr(matching, "most_similar", counted)
    return batches


def test_each_block_matches_for_itself_unless_told_otherwise(matched: list[int]) -> None:
    tiny.predict(tofu_sd.apply_patch(tiny.sd15_unet(), 0.5))
    assert matched == [2] * 5


@pytest.mark.parametrize("levels", [1, 2])
def test_one_map_serves_a_resolution(levels: int, matched: list[int]) -> None:
    tiny.predict(tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, share_across_blocks=True, levels=levels))
    assert len(matched) == levels


def test_the_shared_map_is_the_first_blocks() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, share_across_blocks=True)
    sites = [block.attn1._tofu for _, block, _ in blocks(unet)]
    seen = []
    for site in sites:
        pop_map = site.pop_map

        def watched(layer: str, x: Any, pop_map: Any = pop_map) -> Any:
            seen.append(pop_map(layer, x))
            return seen[-1]

        site.pop_map = watched
    tiny.predict(unet)
    assert len(seen) == 5
    assert all(map is seen[0] for map in seen)


def test_a_map_of_one_call_is_gone_in_the_next(matched: list[int]) -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, share_across_blocks=True)
    first = tiny.predict(unet, seed=1)
    tiny.predict(unet, seed=2)
    assert torch.equal(tiny.predict(unet, seed=1), first)
    assert len(matched) == 3


def test_guidance_shares_the_positive_prompts_map(matched: list[int]) -> None:
    """Both halves equal: nothing may change, at half the matching."""
    unet = tiny.sd15_unet()
    call = {name: value[:1].repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value
            for name, value in tiny.inputs(unet).items()}  # fmt: skip
    separate = tiny.predict(tofu_sd.apply_patch(unet, 0.5), **call)
    assert torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.5, share_across_cfg=True), **call), separate)
    assert matched == [2] * 5 + [1] * 5


def test_the_second_half_is_the_one_that_is_matched() -> None:
    """Pipelines put the positive prompt second; its half comes out as it would alone."""
    unet, call = tiny.sd15_unet(), tiny.guided(tiny.inputs(tiny.sd15_unet()))
    alone = {name: value[1:] if value.ndim else value for name, value in call.items()}
    positive = tiny.predict(tofu_sd.apply_patch(unet, 0.5), **alone)
    both = tiny.predict(tofu_sd.apply_patch(unet, 0.5, share_across_cfg=True), **call)
    torch.testing.assert_close(both[1:], positive, rtol=0, atol=1e-4)  # a batch of two is added up in another order
    own = tiny.predict(tofu_sd.apply_patch(unet, 0.5), **call)
    assert (both[:1] - own[:1]).abs().max() > 1e-3


def test_guidance_cannot_share_an_odd_batch() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, share_across_cfg=True)
    with pytest.raises(ValueError, match=r"share_across_cfg .* 3 samples"):
        tiny.predict(unet, batch=3)


def test_guidance_cannot_share_between_two_images() -> None:
    """A batch of two images without guidance (Turbo, LCM): the first would be merged by the second's map."""
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(), 0.5, share_across_cfg=True)
    with pytest.raises(ValueError, match=r"share_across_cfg needs two equal halves .* these 2 differ"):
        pipe(["a fox", "a whale"], num_inference_steps=1, output_type="latent", guidance_scale=1.0)
    for _ in range(2):  # with guidance it may, and it is looked at again for every image
        tiny.images(pipe, prompt=["a fox", "a whale"])
        with pytest.raises(ValueError, match="these 2 differ"):
            pipe(["a fox", "a whale"], num_inference_steps=1, output_type="latent", guidance_scale=1.0)


def test_a_compiled_model_refuses_it_too() -> None:
    torch._dynamo.reset()
    unet = torch.compile(
        tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, share_across_cfg=True), backend="eager", fullgraph=True
    )
    with pytest.raises(RuntimeError, match="share_across_cfg"):
        tiny.predict(unet)
    torch._dynamo.reset()


@pytest.mark.parametrize(("every", "steps"), [(2, 4), (3, 7), (10, 4)])
def test_maps_serve_several_steps(every: int, steps: int, matched: list[int]) -> None:
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(), 0.5, match_interval=every)
    tiny.images(pipe, num_inference_steps=steps)
    assert len(matched) == 5 * -(-steps // every)


def test_a_picture_does_not_depend_on_those_before_it() -> None:
    """Not on its predecessor's size, prompt, number of steps, or its being broken off half-way."""
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(), 0.5, match_interval=3, share_across_blocks=True)
    fresh = tiny.images(pipe, num_inference_steps=4)
    before: list[dict[str, Any]] = [
        {"num_inference_steps": 4, "prompt": "a blue hat"},
        {"num_inference_steps": 1},
        {"num_inference_steps": 4, "guidance_scale": 1.0},
        {"num_inference_steps": 5, "height": 256, "width": 64},
    ]
    for call in before:
        tiny.images(pipe, seed=9, **call)
        assert torch.equal(tiny.images(pipe, num_inference_steps=4), fresh)

    def stop(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        raise KeyboardInterrupt

    for steps in (50, 4):
        with pytest.raises(KeyboardInterrupt):
            tiny.images(pipe, seed=9, num_inference_steps=steps, callback_on_step_end=stop)
        assert torch.equal(tiny.images(pipe, num_inference_steps=4), fresh)


def test_steps_that_are_not_known_to_be_one_pictures_match_for_themselves(matched: list[int]) -> None:
    """New conditioning at a later time: another picture, broken into the schedule as image to image does it."""
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, match_interval=4)
    call = tiny.inputs(unet)
    for t in (900, 800):
        tiny.predict(unet, **{**call, "timestep": torch.tensor(t)})
    assert len(matched) == 5
    tiny.predict(unet, **{**call, "timestep": torch.tensor(700), "encoder_hidden_states": tiny.noise(2, 7, 16)})
    assert len(matched) == 10


def test_sharing_over_steps_needs_regional_compilation() -> None:
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
def test_compiled_models_share_as_eager_ones_do(regional: bool, options: dict[str, Any]) -> None:
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
