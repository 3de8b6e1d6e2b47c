"""Where merging does not pay, nothing is merged: decided by timing the model's own attention, and remembered."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import cpu_offload

import tofu_sd
from tofu_sd import TokenFusionConfig, recipes, timing_cache
from tofu_sd.patching import autotune
from tofu_sd.patching.patch import patch_of, rules_of
from tofu_sd.timing_cache import Timing, TimingCache, cache_folder

CPU = torch.device("cpu")
FULL = 1.0  # seconds of full attention on the fake clock


@pytest.fixture(autouse=True)
def _merging_pays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replaces the fixture of all other tests: here attention is timed, and remembered in a file of the test."""
    monkeypatch.setattr(timing_cache, "cache", TimingCache(tmp_path / "times.json"))
    monkeypatch.setattr(autotune, "_reported", set())


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """takes(1.2): merging takes 1.2 times as long on a fake clock. Returns the list of calls that were timed."""

    def rule(ratio: float | Callable[[], float], match: float = 0.0) -> list[str]:
        timed: list[str] = []

        def seconds(run: Callable[[], None], device: torch.device) -> float:
            timed.append(run.__name__)
            run()
            if run.__name__ == "merged":
                return FULL * (ratio() if callable(ratio) else ratio)
            return FULL if run.__name__ == "full" else match

        monkeypatch.setattr(autotune, "seconds", seconds)
        return timed

    return rule


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "merged"), [(0.5, True), (0.96, True), (0.98, False), (1.2, False)])
def test_default_merges_only_where_that_is_faster(takes: Any, ratio: float, merged: bool) -> None:
    """A map that is not merged gives the output of the unpatched model, bit for bit."""
    takes(ratio)
    unet = tiny.sd15_unet()
    baseline = tiny.predict(unet)
    tofu_sd.apply_patch(unet, 0.5)
    assert torch.equal(tiny.predict(unet), baseline) != merged
    assert all(row.skipped != merged for row in tofu_sd.summary(unet).rows)


@pytest.mark.parametrize(("min_tokens", "merged"), [(0, True), (256, True), (257, False)])
def test_a_number_of_tokens_decides_without_timing(takes: Any, min_tokens: int, merged: bool) -> None:
    timed = takes(5.0)
    unet = tiny.sd15_unet()
    baseline = tiny.predict(unet)  # 16 x 16
    tofu_sd.apply_patch(unet, 0.5, min_tokens=min_tokens)
    assert torch.equal(tiny.predict(unet), baseline) != merged
    assert timed == []


def test_merged_image_is_that_of_min_tokens_0(takes: Any) -> None:
    """The first call, which measures, included; nor does measuring draw from the global random state."""
    takes(0.5)
    auto, explicit = (
        tofu_sd.apply_patch(tiny.sd15_unet(), 0.5),
        tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens=0),
    )
    before = torch.get_rng_state()
    outputs = [tiny.predict(auto), tiny.predict(auto), tiny.predict(explicit)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_size_batch_and_method_is_decided_once(takes: Any) -> None:
    """ToFu's blocks prune or use MLERP: two decisions for a size."""
    timed = takes(0.5)
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5)
    for _ in range(2):
        tiny.predict(unet)
    assert timed.count("full") == 2
    tiny.predict(unet, 24, 16)
    assert timed.count("full") == 4
    tiny.predict(unet, batch=4)
    assert timed.count("full") == 6
    tiny.predict(tofu_sd.apply_patch(tiny.sd15_unet(), 0.25))
    assert timed.count("full") == 8
    tiny.predict(tofu_sd.apply_patch(tiny.sd15_unet(), 0.5))  # another model of the same shapes
    assert timed.count("full") == 8


@pytest.mark.parametrize("other", [{"attention_head_dim": 4}, {"block_out_channels": (48, 64, 64, 64)}])
def test_other_heads_or_widths_are_timed_again(takes: Any, other: dict[str, Any]) -> None:
    timed = takes(0.5)
    tiny.predict(tofu_sd.apply_patch(tiny.sd15_unet(), 0.5))
    before = len(timed)
    tiny.predict(tofu_sd.apply_patch(tiny.sd15_unet(**other), 0.5))
    assert len(timed) == 2 * before


def test_other_types_are_timed_again(takes: Any) -> None:
    timed = takes(0.5)
    for dtype in (torch.float32, torch.float64):
        unet = tofu_sd.apply_patch(tiny.sd15_unet().to(dtype), 0.5)
        call = {
            name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x
            for name, x in tiny.inputs(unet).items()
        }
        unet(**call)
    assert timed.count("full") == 4


def test_nothing_is_timed_outside_of_the_step_window(takes: Any) -> None:
    timed = takes(0.5)
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, end=0.5)
    tiny.predict(unet, t=100)
    assert timed == []


def test_a_map_that_several_calls_use_counts_by_its_share(takes: Any) -> None:
    """Merging with its matching takes 1.05; matching 0.3 of that, in one of three steps: 1.05 - 0.2 = 0.85."""
    takes(1.05, match=0.3)
    every, third = (tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, match_interval=steps) for steps in (1, 3))
    for unet in (every, third):
        tiny.predict(unet)
    assert all(row.skipped for row in tofu_sd.summary(every).rows)
    assert not any(row.skipped for row in tofu_sd.summary(third).rows)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_clear_first_round_decides_alone_and_a_close_one_is_repeated(
    takes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "BUDGET", 100.0)
    for ratio, rounds in ((2.0, 1), (1.01, autotune.ROUNDS)):
        timed = takes(ratio)
        tiny.predict(tofu_sd.apply_patch(tiny.sd15_unet(), replace(recipes.TOME, ratio=ratio / 4)))
        assert timed == rounds * ["full", "merged"]


def test_rounds_end_with_the_budget(takes: Any) -> None:
    timed = takes(1.01)  # a round takes 2 seconds, more than the budget
    tiny.predict(tofu_sd.apply_patch(tiny.sd15_unet(), recipes.TOME))
    assert timed == ["full", "merged"]


def test_the_fastest_round_counts(takes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process slows some rounds down; none is faster than the machine allows."""
    monkeypatch.setattr(autotune, "BUDGET", 100.0)
    ratios = iter([1.2, 0.9, 1.2, 1.2, 1.2])
    takes(lambda: next(ratios))
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), recipes.TOME)
    tiny.predict(unet)
    assert not any(row.skipped for row in tofu_sd.summary(unet).rows)


def test_real_attention_is_timed_and_left_as_it_was() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5)
    layers = [rule.attention for rule in rules_of(patch_of(unet)).values()]
    before = [dict(vars(layer)) for layer in layers]
    tiny.predict(unet)
    assert [dict(vars(layer)) for layer in layers] == before
    timings = json.loads(timing_cache.cache.file.read_text())["timings"]
    assert len(timings) == 2
    assert all(full > 0 and merged > 0 for full, merged in timings.values())
    tiny.predict(tofu_sd.remove_patch(unet))


def test_quantized_attention_is_timed_with_the_type_of_its_tokens() -> None:
    unet = torch.ao.quantization.quantize_dynamic(tiny.shallow_unet(), {torch.nn.Linear}, dtype=torch.qint8)
    tiny.predict(tofu_sd.apply_patch(unet, 0.5))
    assert json.loads(timing_cache.cache.file.read_text())["timings"]


def test_offloaded_attention_is_timed_where_it_runs(takes: Any) -> None:
    """accelerate's hook moves the weights for each forward; when the model is patched they are elsewhere."""
    timed = takes(0.5)
    pipe = tiny.sd15_pipe()
    cpu_offload(pipe.unet, torch.device("cpu"))
    tiny.predict(tofu_sd.apply_patch(pipe.unet, 0.5))
    assert timed


def test_attention_that_cannot_be_timed_is_merged_as_requested(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of measuring must not stop the image, and is not remembered."""

    def fails(*_: Any) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(autotune, "seconds", fails)
    unet = tiny.sd15_unet()
    baseline = tiny.predict(unet)
    assert not torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.5)), baseline)
    assert "cannot be timed here, so it is merged as requested (RuntimeError: out of memory)" in caplog.text
    assert not timing_cache.cache.file.exists()


# --- what the user reads ----------------------------------------------------------------------------------------------


def test_a_skipped_map_is_reported_once_in_plain_words(takes: Any, caplog: pytest.LogCaptureFixture) -> None:
    takes(1.12)
    caplog.set_level(logging.INFO, "tofu_sd")
    for _ in range(2):
        unet = tofu_sd.apply_patch(tiny.sd15_unet(), recipes.TOME)
        tiny.predict(unet)
    (message,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert message.startswith("maps of 16 x 16 tokens in batches of 2 on ")
    assert message.endswith(
        "self-attention takes 1.12 times as long with mean-r50 (mean), so they are not merged; "
        "min_tokens=0 merges them anyway"
    )
    assert "256 skipped (slower with merging)" in tofu_sd.summary(unet).headline


def test_summary_lists_skipped_blocks() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, levels=2, min_tokens=65)
    headline = tofu_sd.summary(unet).headline
    assert "on 5 of 16 transformer blocks, tokens 256 -> 128, 64 skipped (fewer than 65) at" in headline


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_same_machine_decides_the_same_tomorrow(takes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = takes(1.2)
    tiny.predict(tofu_sd.apply_patch(tiny.sd15_unet(), 0.5))
    monkeypatch.setattr(timing_cache, "cache", TimingCache(timing_cache.cache.file))  # of a new process
    timed.clear()
    other = takes(0.5)
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5)
    tiny.predict(unet)
    assert timed == other == []
    assert all(row.skipped for row in tofu_sd.summary(unet).rows)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 2, "timings": {}}', '{"format": 1}', '{"format": 1, "timings": []}',
     '{"format": 1, "timings": {"a": "fast"}}', '{"format": 1, "timings": {"a": [0, 1]}}',
     '{"format": 1, "timings": {"a": [NaN, 1]}}', '{"format": 1, "timings": {"a": [1, 2, 3]}}', "\x00"],
)  # fmt: skip
def test_a_damaged_file_is_ignored_and_replaced(content: str, tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    file.write_text(content)
    cache = TimingCache(file)
    assert cache.get("a") is None
    cache.put("b", Timing(2.0, 1.0))
    assert TimingCache(file).get("b") == Timing(2.0, 1.0)


def test_a_damaged_entry_loses_no_other(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    file.write_text('{"format": 1, "timings": {"bad": [-1, 1], "good": [2, 1]}}')
    assert TimingCache(file).get("good") == Timing(2.0, 1.0)


def test_processes_that_share_the_file_keep_each_others_timings(tmp_path: Path) -> None:
    first, second = TimingCache(tmp_path / "times.json"), TimingCache(tmp_path / "times.json")
    assert first.get("a") is second.get("b") is None
    first.put("a", Timing(2.0, 1.0))
    second.put("b", Timing(3.0, 1.0))
    third = TimingCache(tmp_path / "times.json")
    assert (third.get("a"), third.get("b")) == (Timing(2.0, 1.0), Timing(3.0, 1.0))


def test_without_a_file_timings_last_for_the_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = TimingCache(tmp_path / "file" / "times.json")
    cache.put("a", Timing(2.0, 1.0))
    assert cache.get("a") == Timing(2.0, 1.0)


def test_an_interrupted_write_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TimingCache(tmp_path / "times.json")
    cache.put("a", Timing(2.0, 1.0))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dump", stop)
    with pytest.raises(KeyboardInterrupt):
        cache.put("b", Timing(2.0, 1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]
    assert TimingCache(tmp_path / "times.json").get("a") == Timing(2.0, 1.0)


def test_the_oldest_timings_leave_a_full_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tofu_sd.timing_cache.MOST", 2)
    cache = TimingCache(tmp_path / "times.json")
    for key in "abc":
        cache.put(key, Timing(2.0, 1.0))
    assert [TimingCache(tmp_path / "times.json").get(key) is None for key in "abc"] == [True, False, False]


def test_the_folder_is_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "tofu_sd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "tofu_sd"


# --- compiled models --------------------------------------------------------------------------------------------------


@pytest.fixture
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_reset_dynamo")
@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize(("ratio", "merged"), [(0.5, True), (1.2, False)])
def test_a_compiled_model_decides_on_its_own_size(takes: Any, ratio: float, merged: bool, patch_first: bool) -> None:
    """It is measured when the model is compiled, as compiled code cannot measure. Smaller maps are not merged."""
    timed = takes(ratio)
    unet = tiny.shallow_unet()
    side = unet.config.sample_size
    expected = [tiny.predict(unet, n, n) for n in (side, side - 8, side + 8)]
    if patch_first:
        tofu_sd.apply_patch(unet, 0.5)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    if not patch_first:
        tofu_sd.apply_patch(compiled, 0.5)
    assert timed == []
    outputs = [tiny.predict(compiled, n, n) for n in (side, side - 8, side + 8)]
    assert [not torch.equal(*pair) for pair in zip(outputs, expected, strict=True)] == [merged, False, merged]
    assert timed.count("full") == 2


@pytest.mark.usefixtures("_reset_dynamo")
@pytest.mark.parametrize(("ratio", "merged"), [(0.5, True), (1.2, False)])
def test_compiled_blocks_are_decided_for_every_size(takes: Any, ratio: float, merged: bool) -> None:
    """With compile_repeated_blocks() the hook that decides runs outside of compiled code."""
    takes(ratio)
    unet = tiny.shallow_unet()
    baseline = tiny.predict(unet)
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    tofu_sd.apply_patch(unet, 0.5)
    assert torch.equal(tiny.predict(unet), baseline) != merged


def test_copies_and_pickles_decide_for_themselves(takes: Any) -> None:
    takes(1.2)
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5)
    baseline = tiny.predict(unet)
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(tiny.predict(other), baseline)
        ours, theirs = (next(iter(rules_of(patch_of(model)).values())) for model in (unet, other))
        assert ours.number != theirs.number
        assert theirs.attention is not ours.attention


# --- options ----------------------------------------------------------------------------------------------------------


def test_without_self_attention_nothing_is_timed(takes: Any) -> None:
    timed = takes(5.0)
    unet = tiny.sd15_unet()
    baseline = tiny.predict(unet)
    tofu_sd.apply_patch(unet, 0.5, merge_attn=False, merge_mlp=True)
    assert not torch.equal(tiny.predict(unet), baseline)
    assert timed == []


def test_min_tokens_is_no_part_of_a_methods_name() -> None:
    """Figures are measured with 0, users have 'auto': the rows are the same method."""
    config = TokenFusionConfig()
    assert config.min_tokens == "auto"
    assert config.slug == replace(config, min_tokens=0).slug == "tofu-r50"
    assert replace(config, min_tokens=1024).slug == "tofu-r50-min1024"


def test_numpy_integer_min_tokens_is_accepted() -> None:
    numpy = pytest.importorskip("numpy")
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, min_tokens=numpy.int64(257))
    assert all(row.skipped for row in tofu_sd.summary(unet).rows)


@pytest.mark.parametrize("value", [-1, 1.5, True, "always", None])
def test_invalid_min_tokens_raises_with_its_value(value: Any) -> None:
    with pytest.raises(ValueError, match=r"min_tokens is .*; it must be 'auto' or an integer >= 0"):
        TokenFusionConfig(min_tokens=value)
