"""Merging by a threshold (ATM sections 3.2 and 3.4, for Stable Diffusion): how many tokens, and in which steps.

A block merges the same tokens as with a fixed ratio; the threshold selects the ratio.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from anatomy import anatomy
from hypothesis import given, settings
from hypothesis import strategies as st
from image_independence import check_independence_of_earlier_images
from oracle import blocks
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import tofu_sd
from tofu_sd import TokenFusionConfig, recipes
from tofu_sd.config import BUCKETS, BlockReductions, layer_threshold
from tofu_sd.core.matching import count_above_threshold
from tofu_sd.core.reductions import prune
from tofu_sd.patching import block_state, hooks, patch
from tofu_sd.patching.image_parts import ImagePart
from tofu_sd.vit.methods import AdaptiveReduction

ALL = {"threshold": -1}  # every cosine is above it
NONE = {"threshold": 1.5}
SOME = {"threshold": 0.85, "ratio": 0.75}  # merges none to most tokens, by block and step, in these random models


@pytest.fixture(autouse=True)
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def predict_steps(
    unet: Any, steps: tuple[float, ...] = (900, 700, 500, 300), seed: int = 0, h: int = 16
) -> list[Tensor]:
    """Predictions of the steps of one image: timesteps fall, the conditioning is one tensor."""
    call = tiny.guided(tiny.inputs(unet, h, 16, seed=seed))
    with torch.no_grad():
        return [unet(**{**call, "timestep": torch.tensor(t)}).sample for t in steps]


def all_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def block_states(unet: Any) -> list[patch.BlockState]:
    return [block.attn1._tofu for _, block, _ in blocks(unet) if hasattr(block.attn1, "_tofu")]


# --- merge counts -----------------------------------------------------------------------------------------------------


@given(st.floats(-1, 2), st.floats(0, 1), st.floats(-1, 1), st.integers(0, 100))
def test_threshold_decays_with_depth_to_threshold_min_as_in_the_classifiers(
    alpha: float, beta: float, threshold_min: float, layer: int
) -> None:
    """One formula (ATM Eq. 1) serves both."""
    config = TokenFusionConfig(threshold=alpha, threshold_decay=beta, threshold_min=threshold_min)
    here, deeper = config.threshold_at(layer), config.threshold_at(layer + 1)
    assert here is not None
    assert deeper is not None
    assert here == layer_threshold(alpha, beta, threshold_min, layer)
    assert here == AdaptiveReduction(alpha=alpha, beta=beta, least=threshold_min).threshold(layer)
    assert threshold_min <= deeper <= here
    assert config.threshold_at(0) == max(alpha, threshold_min)
    rising = TokenFusionConfig(threshold=alpha, threshold_decay=-beta, threshold_min=threshold_min)
    assert (rising.threshold_at(layer + 1) or 0) >= (rising.threshold_at(layer) or 0) >= max(alpha, threshold_min)


@given(st.integers(0, 5000), st.floats(0, 6000))
def test_bucket_is_a_multiple_of_one_eighth_and_at_most_the_count_above_threshold(
    max_merged: int, num_similar: float
) -> None:
    config = TokenFusionConfig(threshold=0.5)
    r = config.bucket(max_merged, num_similar)
    assert r in {max_merged * eighth // BUCKETS for eighth in range(BUCKETS + 1)}
    assert r <= num_similar
    assert r <= max_merged
    assert r == max_merged or r + -(-max_merged // BUCKETS) > num_similar  # the next bucket is too large
    assert config.bucket(max_merged, num_similar + 1) >= r


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 30), st.floats(-1, 1))
def test_count_above_threshold_is_the_batch_mean(seed: int, batch: int, sources: int, threshold: float) -> None:
    best = torch.rand(batch, sources, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    counts = [sum(cosine > threshold for cosine in row) for row in best.tolist()]
    assert count_above_threshold(best, threshold).item() == pytest.approx(sum(counts) / batch)


@pytest.mark.parametrize("options", [{}, {"kv_only": True}, {"window": 2}, {"levels": 2, "merge_mlp": True}], ids=str)
def test_threshold_above_1_equals_baseline_exactly(options: dict[str, Any]) -> None:
    unet = tiny.sd15_unet()
    baseline = predict_steps(unet)
    assert all_equal(predict_steps(tofu_sd.apply_patch(unet, 0.75, **NONE, **options)), baseline)


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_only": True, "proportional": True}, {"window": 2, "seed": 3}, {"share_across_cfg": True}],
    ids=str,
)
def test_threshold_minus_1_equals_fixed_ratio_from_the_second_step(options: dict[str, Any]) -> None:
    unet = tiny.sd15_unet()
    baseline = predict_steps(unet)
    fixed = predict_steps(tofu_sd.apply_patch(unet, 0.5, **options))
    adaptive = predict_steps(tofu_sd.apply_patch(unet, 0.5, **ALL, **options))
    assert all_equal(adaptive[1:], fixed[1:])
    assert torch.equal(adaptive[0], baseline[0])  # the first step has no count yet


@pytest.mark.parametrize("eighth", range(BUCKETS + 1))
def test_each_bucket_equals_the_fixed_ratio_with_the_same_token_count(
    eighth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = tiny.sd15_unet()
    r = 192 * eighth // BUCKETS
    fixed = tiny.predict(tofu_sd.apply_patch(unet, r / 256, proportional=True))
    tofu_sd.apply_patch(unet, 0.75, threshold=0.5, proportional=True)
    for state in block_states(unet):
        state.current.num_similar = float(r)
    monkeypatch.setattr(hooks, "recall_counts", lambda *_: None)
    assert torch.equal(tiny.predict(unet), fixed)


def test_each_block_merges_the_count_of_the_previous_step() -> None:
    """Counts by hand from the input of each block's norm in the previous step."""
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), early="mean", late="mean", threshold_decay=0.005, **SOME)
    states, norm_inputs = block_states(unet), dict[int, list[Tensor]]()
    for number, (_, block, _) in enumerate(blocks(unet)):
        if hasattr(block.attn1, "_tofu"):
            block.norm1.register_forward_pre_hook(
                lambda m, args, n=number: norm_inputs.setdefault(n, []).append(args[0])
            )
    with tofu_sd.record_maps(unet) as maps:
        predict_steps(unet)
    rows = tofu_sd.summary(unet).rows
    assert len(states) == len(rows) == 5
    merged_counts = set()
    for row, (_, inputs) in zip(rows, sorted(norm_inputs.items()), strict=True):
        for step in (1, 2, 3):
            x = torch.nn.functional.normalize(inputs[step - 1].double(), dim=-1).view(2, 8, 2, 8, 2, -1)
            cells = x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)  # [B, cells, 4, C], destinations first
            best = (cells[:, :, 1:].flatten(1, 2) @ cells[:, :, 0].mT).amax(dim=-1)
            expected = TokenFusionConfig(threshold=0.85).bucket(192, (best > (row.threshold or 0)).sum().item() / 2)
            block_maps = [m for m in maps if m.call == step and m.block == row.name]
            assert (256 - block_maps[0].map.kept_idx.shape[1] if block_maps else 0) == expected
            merged_counts.add(expected)
    assert len(merged_counts) > 1  # otherwise the test shows little
    assert not any(m.call == 0 for m in maps)


# --- steps ------------------------------------------------------------------------------------------------------------


def test_image_is_independent_of_counts_of_earlier_images() -> None:
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(), **SOME)
    merged = tiny.images(pipe, num_inference_steps=4)
    assert not torch.equal(merged, tiny.images(tofu_sd.remove_patch(pipe), num_inference_steps=4))
    tofu_sd.apply_patch(pipe, **SOME)
    assert torch.equal(tiny.images(pipe, num_inference_steps=4), merged)
    check_independence_of_earlier_images(pipe)


def test_step_of_an_unknown_image_is_a_first_step() -> None:
    unet = tiny.sd15_unet()
    baseline, call = predict_steps(unet, (900, 800)), tiny.inputs(unet)
    tofu_sd.apply_patch(unet, **SOME)
    assert torch.equal(predict_steps(unet, (900,))[0], baseline[0])
    assert torch.equal(predict_steps(unet, (800,))[0], baseline[1])  # later, but with new conditioning
    first = tiny.predict(unet, **call)
    assert torch.equal(tiny.predict(unet, **call), first)  # the same step again


def test_late_step_window_begins_with_a_first_step() -> None:
    unet = tiny.sd15_unet()
    baseline = predict_steps(unet)
    with tofu_sd.patched(unet, start=0.4, **SOME):
        late = predict_steps(unet)
        assert all_equal(late[:3], baseline[:3])  # inactive at 900 and 700, counted at 500
        assert not torch.equal(late[3], baseline[3])


@pytest.mark.parametrize("options", [SOME, {"temperature": 0.1, "early": "mean", "late": "mean", "window": 3, "sy": 1}])
def test_remove_patch_undoes_threshold_and_soft_matching(options: dict[str, Any]) -> None:
    unet = tiny.sd15_unet()
    before, baseline = anatomy(unet), predict_steps(unet)
    assert not all_equal(predict_steps(tofu_sd.apply_patch(unet, **{"ratio": 0.5, **options})), baseline)
    tofu_sd.remove_patch(unet)
    assert anatomy(unet) == before
    assert all_equal(predict_steps(unet), baseline)


def test_skipped_block_keeps_its_count() -> None:
    states = run_block, skipped_block = [
        patch.BlockState(TokenFusionConfig(threshold=0.5), BlockReductions(prune, prune), threshold=0.5)
        for _ in range(2)
    ]
    part = ImagePart(None, 900, torch.zeros(1), None)

    def step(*best: Tensor | None, first: bool = False) -> tuple[float, float]:
        block_state.recall_counts(states, part, first)
        counted = run_block.current.num_similar, skipped_block.current.num_similar
        for state, block_best in zip(states, best, strict=True):
            state.current.best = block_best
        block_state.keep_best(states, part)
        return counted

    some = torch.tensor([[0.9, 0.6, 0.1], [0.7, 0.1, 0.1]])
    assert step(some, some, first=True) == (0, 0)
    assert step(torch.zeros(2, 3), None) == (1.5, 1.5)
    assert step(torch.ones(2, 3), None) == (0, 1.5)
    assert step(None, None) == (3, 1.5)


def test_copies_count_independently() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), **SOME)
    expected = predict_steps(unet)
    other = copy.deepcopy(unet)
    assert all_equal(predict_steps(other), expected)
    assert all(state.current == block_state.ForwardState() for state in block_states(copy.deepcopy(unet)))


# --- compiled ---------------------------------------------------------------------------------------------------------


def count_graphs(config: TokenFusionConfig) -> int:
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), config) for _ in range(2))
    counter = CompileCounter()
    unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    merged = set()
    for h in (16, 24):
        for seed in range(3):
            with tofu_sd.record_maps(eager) as records:
                expected = predict_steps(eager, seed=seed, h=h)
            merged |= {(h, s.map.kept_idx.shape[1]) for s in records}
            assert all_equal(predict_steps(unet, seed=seed, h=h), expected)
    assert config.threshold is None or len(merged) > 3
    return int(counter.frame_count)


@pytest.mark.parametrize("decay", [0, 0.01])
def test_regional_compile_adds_one_graph_for_all_buckets(decay: float) -> None:
    """Any merge count shares one graph and merging nothing is another; thresholds are not in the graph."""
    fixed = TokenFusionConfig(0.75, early="mean", late="mean", proportional=True)
    torch._dynamo.reset()
    fixed_graphs = count_graphs(fixed)
    torch._dynamo.reset()
    assert count_graphs(TokenFusionConfig.of(fixed, threshold=0.85, threshold_decay=decay)) <= fixed_graphs + 1


def test_threshold_raises_for_whole_unet_compile() -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), threshold=0.5)
    with pytest.raises(RuntimeError, match=r"threshold needs .* compile_repeated_blocks\(\)"):
        tiny.predict(torch.compile(unet, backend="eager", fullgraph=True))


# --- messages ---------------------------------------------------------------------------------------------------------


def test_summary_states_that_the_ratio_is_a_maximum() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, threshold=0.9, threshold_decay=0.01)
    summary = tofu_sd.summary(unet)
    assert "tofu-r50-above0.9-decay0.01 on 5 of 16 transformer blocks, tokens 256 -> at least 128" in summary.headline
    assert str(summary).splitlines()[1].endswith("prune, above 0.9")
    assert str(summary).splitlines()[-1].endswith(f"mlerp, above {layer_threshold(0.9, 0.01, -1, 15):g}")


def test_adaptive_recipe_accepts_prefix_and_options() -> None:
    assert recipes.named("adaptive") == recipes.ADAPTIVE
    config = recipes.named("kv:adaptive+p@threshold=0.8@threshold_decay=0.02@threshold_min=0.7", 0.75)
    assert (config.threshold, config.threshold_decay, config.threshold_min) == (0.8, 0.02, 0.7)
    assert config.kv_only
    assert config.proportional
    assert config.ratio == 0.75


def test_slugs_of_different_thresholds_differ() -> None:
    variants: list[dict[str, Any]] = [
        {}, {"threshold": 0.9}, {"threshold": 0}, {"threshold": 0.9, "threshold_decay": 0.1},
        {"threshold": 0.9, "threshold_min": 0.1}, {"threshold": 0.9, "ratio": 0.75},
    ]  # fmt: skip
    assert len({TokenFusionConfig(**options).slug for options in variants}) == len(variants)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "below -1": ({"threshold": -1.5}, r"threshold is -1\.5; it must be None or a number from -1 to 2"),
    "a word": ({"threshold": "high"}, "threshold is 'high'; it must be None or a number from -1 to 2"),
    "NaN": ({"threshold": float("nan")}, "threshold is nan; it must be"),
    "rising": ({"threshold": 0.9, "threshold_decay": -1.5}, r"threshold_decay is -1\.5; it must be a number"),
    "infinite": ({"threshold": 0.9, "threshold_decay": float("inf")}, "threshold_decay is inf; it must be a number"),
    "threshold_min above 2": (
        {"threshold": 0.9, "threshold_min": 3},
        "threshold_min is 3; it must be a number from -1 to 2",
    ),
    "decay of nothing": ({"threshold_decay": 0.1}, r"threshold_decay is 0\.1 and threshold is None"),
    "over steps": ({"threshold": 0.9, "match_interval": 3}, r"match_interval is 3 and threshold is 0\.9"),
    "over blocks": (
        {"threshold": 0.9, "share_across_blocks": True},
        r"share_across_blocks is True and threshold is 0\.9",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_threshold_options_raise_with_their_value(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        TokenFusionConfig(**options)
