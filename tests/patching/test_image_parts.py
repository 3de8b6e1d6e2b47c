"""Each forward has its own state: two threads, several parts of an image, second-order samplers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from patcher_host import ForgePatcher, Patcher, UNetModel, attention
from torch import Tensor

import tofu_sd
from tofu_sd import TokenFusionConfig
from tofu_sd.core import matching
from tofu_sd.hosts.programs.model_patcher import patch_model
from tofu_sd.patching import image_parts as step_tracker
from tofu_sd.patching import patch
from tofu_sd.patching.image_parts import ImagePart, ImagePartTracker

OVER_STEPS: dict[str, dict[str, Any]] = {
    "match_interval": {"match_interval": 2},
    "one map a resolution, over steps": {"match_interval": 3, "share_across_blocks": True},
    "threshold": {"threshold": 0.85, "ratio": 0.75},
    "seed": {"seed": 3},
    "window of steps": {"start": 0.2, "end": 0.6},
}
over_steps = pytest.mark.parametrize("options", OVER_STEPS.values(), ids=OVER_STEPS)
TIMES = (900.0, 700.0, 500.0, 300.0)


# --- threads ----------------------------------------------------------------------------------------------------------


def run_interleaved(module: Any, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> list[Tensor]:
    """Results of two threads; the second runs completely while the first waits after `module`."""
    inside, done, results = threading.Event(), threading.Event(), dict[str, Tensor]()

    def pause(*_: Any) -> None:
        if threading.current_thread().name == "first" and not inside.is_set():
            inside.set()
            assert done.wait(60)

    def first() -> None:
        results["first"] = one()

    def second() -> None:
        assert inside.wait(60)
        results["second"] = other()
        done.set()

    handle = module.register_forward_hook(pause)
    threads = [threading.Thread(target=run, name=run.__name__) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    return [results["first"], results["second"]]


@pytest.mark.parametrize(
    "options",
    [{}, {"share_across_blocks": True}, {"proportional": True}, {"kv_only": True}, {"match_on": "normed"},
     {"merge_crossattn": True, "merge_mlp": True}, *OVER_STEPS.values()],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("layer", ["norm1", "attn1"])
def test_two_threads_in_one_block_equal_separate_calls(layer: str, options: dict[str, Any]) -> None:
    """Sizes and timesteps differ, so a partition, map or step of the other thread would change the result."""
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), **{"ratio": 0.5, **options})
    calls = [{"seed": 1, "t": 700.0}, {"seed": 2, "t": 300.0, "h": 24, "w": 16}]
    one, other = (lambda call=call: tiny.predict(unet, **call) for call in calls)
    alone = [tiny.predict(copy.deepcopy(unet), **call) for call in calls]
    module = getattr(unet.down_blocks[0].attentions[0].transformer_blocks[0], layer)
    together = run_interleaved(module, one, other)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_compiled_blocks_serialize_calls_of_threads() -> None:
    """Threads share one partition; one of another size from another thread would leave a block unmerged."""
    torch._dynamo.reset()
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5)
    calls = [{"seed": seed, "h": 16 + 8 * seed} for seed in range(3)]
    alone = [tiny.predict(copy.deepcopy(unet), **call) for call in calls]
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    for call in calls:
        tiny.predict(unet, **call)
    wrong_threads: list[int] = []

    def run(number: int) -> None:
        for _ in range(3):
            if not torch.equal(tiny.predict(unet, **calls[number]), alone[number]):
                wrong_threads.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong_threads == []
    assert all(not module._forward_hooks for module in unet.modules())
    torch._dynamo.reset()


def test_interrupted_call_releases_lock_of_compiled_blocks() -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5)
    spatial_module = unet.down_blocks[0].attentions[0]
    hook = next(hook for hook in spatial_module._forward_pre_hooks.values() if isinstance(hook, patch._PartitionHook))
    lock = hook.one_at_a_time

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    lock.hold(spatial_module)  # as for a compiled block while another thread runs
    handle = spatial_module.proj_in.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.predict(unet)
    handle.remove()
    lock.hold(spatial_module)
    tiny.predict(unet)
    assert not spatial_module._forward_hooks
    assert lock._lock.acquire(blocking=False)


def test_record_maps_separates_calls_of_threads() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    with tofu_sd.record_maps(unet) as records:
        run_interleaved(block.attn1, lambda: tiny.predict(unet), lambda: tiny.predict(unet, h=24))
    assert {(record.call, record.h) for record in records} == {(0, 16), (1, 24)}


# --- parts of an image ------------------------------------------------------------------------------------------------


def predict_parts(
    unet: Any,
    contents: dict[str, Tensor],
    prompts: dict[str, Tensor],
    order: Callable[[int], list[str]],
    times: tuple[float, ...] = TIMES,
) -> dict[tuple[str, int, int], Tensor]:
    """Predictions of several parts of one image, called in sequence in each step.

    Keys are the part, the step, and the number of earlier calls of the part in that step.
    """
    results: dict[tuple[str, int, int], Tensor] = {}
    with torch.no_grad():
        for step, t in enumerate(times):
            for name in order(step):
                repeat = sum(key[:2] == (name, step) for key in results)
                sample = contents[name] + 0.1 * step + 0.01 * repeat
                call = {"timestep": torch.tensor(t), "encoder_hidden_states": prompts[name]}
                results[name, step, repeat] = unet(sample, **call).sample
    return results


def assert_parts_independent(
    unet: Any,
    contents: dict[str, Tensor],
    prompts: dict[str, Tensor],
    order: Callable[[int], list[str]],
    **options: Any,
) -> None:
    """Asserts that each part gives the same result in the sequence of all parts as alone."""
    tofu_sd.apply_patch(unet, **{"ratio": 0.5, **options})
    together = predict_parts(copy.deepcopy(unet), contents, prompts, order)
    for name in contents:
        alone = predict_parts(
            copy.deepcopy(unet), contents, prompts, lambda step, name=name: [n for n in order(step) if n == name]
        )
        for key, value in alone.items():
            assert torch.equal(together[key], value), key


A, B, C = (tiny.noise(2, 4, 16, 16, seed=seed) for seed in (1, 2, 3))
PROMPT, OTHER = tiny.noise(2, 7, 16, seed=4), tiny.noise(2, 7, 16, seed=5)
ONE, BOTH = {"a": PROMPT, "b": PROMPT, "c": PROMPT}, {"a": PROMPT, "b": OTHER}
SEQUENCES: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], Callable[[int], list[str]]]] = {
    "tiles with one prompt": ({"a": A, "b": B, "c": C}, ONE, lambda step: ["a", "b", "c"]),
    "tiles in another order in each step": (
        {"a": A, "b": B, "c": C}, ONE, lambda step: ["a", "b", "c"][:: 1 if step % 2 else -1],
    ),
    "areas with prompts of their own": ({"a": A, "b": B}, BOTH, lambda step: ["a", "b"]),
    "split guidance: one latent, two prompts": ({"a": A, "b": A}, BOTH, lambda step: ["a", "b"]),
    "an area that ends early": ({"a": A, "b": B}, BOTH, lambda step: ["a", "b"][: 2 - step // 2]),
    "Heun: two calls from the second step on": ({"a": A}, ONE, lambda step: ["a"] * (1 + (step > 0))),
    "Heun with split guidance": ({"a": A, "b": A}, BOTH, lambda step: ["a", "b"] * (1 + (step > 0))),
    "sizes that differ": ({"a": A, "b": tiny.noise(2, 4, 24, 16)}, ONE, lambda step: ["a", "b"]),
}  # fmt: skip


@over_steps
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_each_image_part_equals_the_part_alone(sequence: str, options: dict[str, Any]) -> None:
    assert_parts_independent(tiny.shallow_unet(), *SEQUENCES[sequence], **options)


@pytest.mark.parametrize("program", [Patcher, ForgePatcher])
@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("match_interval", [2, 3])
def test_image_parts_are_independent_in_model_patcher_hosts(match_interval: int, sequence: str, program: Any) -> None:
    """ComfyUI calls a model once per area and passes its uuid; the schedule is one tensor in all steps."""
    contents, prompts, order = SEQUENCES[sequence]
    schedule, unet = torch.tensor(TIMES) / 100, UNetModel(tiny.shallow_unet())

    def generated(names: str) -> dict[tuple[str, int, int], Tensor]:
        model, _ = patch_model(program(unet), TokenFusionConfig(0.5, match_interval=match_interval), attention)
        results: dict[tuple[str, int, int], Tensor] = {}
        for step, t in enumerate(TIMES):
            for name in [name for name in order(step) if name in names]:
                repeat = sum(key[:2] == (name, step) for key in results)
                transformer_options = {"sample_sigmas": schedule, "uuids": [id(prompts[name])]}
                sample = contents[name] + 0.1 * step + 0.01 * repeat
                results[name, step, repeat] = model.predict(sample, t, prompts[name], None, **transformer_options)
        return results

    together = generated("abc")
    for name in contents:
        assert all(torch.equal(together[key], value) for key, value in generated(name).items())


@pytest.mark.parametrize("sequence", ["tiles with one prompt", "areas with prompts of their own"])
def test_each_image_part_reuses_its_maps(sequence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above, which would also pass if every call matched."""
    matched, match = [], matching._nearest
    monkeypatch.setattr(matching, "_nearest", lambda *args: (matched.append(1), match(*args))[1])
    contents, prompts, order = SEQUENCES[sequence]
    predict_parts(tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, match_interval=2), contents, prompts, order)
    assert len(matched) == 3 * len(contents) * 2  # blocks, parts, every second of four steps


def test_rising_timesteps_belong_to_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inversion runs from the image to the noise."""
    matched, match = [], matching._nearest
    monkeypatch.setattr(matching, "_nearest", lambda *args: (matched.append(1), match(*args))[1])
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, match_interval=4)
    predict_parts(unet, {"a": A}, {"a": PROMPT}, lambda step: ["a"], TIMES[::-1])
    assert len(matched) == 3


def test_new_noise_in_each_step_is_matched_again_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, messages = ImagePartTracker(), list[str]()
    monkeypatch.setattr(step_tracker.logger, "warning", messages.append)
    results = [tracker.visit(t, tiny.noise(1, 4, 8, 8, seed=int(t)), PROMPT) for t in range(9, 0, -1)]
    assert all(part.step == 0 and first for part, first in results)
    assert len(messages) == 1
    assert messages[0].startswith("match_interval: successive steps are not of the same image part")


def visit_all(tracker: ImagePartTracker, *calls: tuple[float, Tensor, Tensor]) -> list[ImagePart]:
    return [tracker.visit(t, content, prompt)[0] for t, content, prompt in calls]


def test_second_image_with_the_same_prompt_is_a_new_part() -> None:
    """A pipeline creates the conditioning tensor again for each image; here a new one starts later in the schedule."""
    first, second, other = visit_all(ImagePartTracker(), (900, A, PROMPT), (800, A, PROMPT), (700, A, PROMPT.clone()))
    assert first is second
    assert other is not first


def test_one_sampling_compares_conditioning_by_content() -> None:
    calls = [(t, A, PROMPT.clone()) for t in (900, 800, 700)]
    assert len({id(part) for part in visit_all(ImagePartTracker(one_sampling=True), *calls)}) == 1
    assert len({id(part) for part in visit_all(ImagePartTracker(), *calls)}) == 3


def test_new_conditioning_tensors_in_each_call_are_detected_after_a_few_calls() -> None:
    calls = [(t, A, PROMPT.clone()) for t in range(900, 0, -100)]
    assert len({id(part) for part in visit_all(ImagePartTracker(), *calls)}) < len(calls)


@pytest.mark.parametrize("content", [A.clone().fill_(float("nan")), torch.zeros_like(A)], ids=["nan", "zeros"])
def test_nan_and_zero_content_starts_a_new_part(content: Tensor) -> None:
    results = visit_all(ImagePartTracker(), (900, content, PROMPT), (800, content, PROMPT))
    assert results[0] is not results[1]


def test_parts_of_finished_images_are_dropped() -> None:
    tracker = ImagePartTracker()
    for image in range(100):
        visit_all(tracker, *((t, tiny.noise(1, 4, 8, 8, seed=image), PROMPT) for t in (900, 500)))
    assert len(tracker._parts) < 50


def test_part_is_kept_while_99_others_are_called() -> None:
    tracker = ImagePartTracker()
    tiles = [tiny.noise(1, 4, 8, 8, seed=seed) for seed in range(100)]
    steps = [visit_all(tracker, *((t, tile, PROMPT) for tile in tiles)) for t in (900, 500, 100)]
    assert all(a is b is c for a, b, c in zip(*steps, strict=True))
