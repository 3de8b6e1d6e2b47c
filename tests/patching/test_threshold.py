"""Laws of fusion by a threshold (ATM sections 3.2 and 3.4, for Stable Diffusion): how much, when, and what is fused.

What a block fuses in a step is what a fixed ratio would; the threshold decides which ratio.
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
from oracle import blocks
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import tofu_sd
from tofu_sd import TokenFusionConfig, recipes
from tofu_sd.config import BUCKETS, layer_threshold
from tofu_sd.core.matching import count_above_threshold
from tofu_sd.core.reductions import prune
from tofu_sd.patching import block_state, hooks, patch
from tofu_sd.patching.image_parts import ImagePart
from tofu_sd.vit.methods import AdaptiveReduction

ALL = {"threshold": -1}  # every cosine is above it
NONE = {"threshold": 1.5}
SOME = {"threshold": 0.85, "ratio": 0.75}  # from none to most, by block and step, in these models of noise


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def picture(unet: Any, steps: tuple[float, ...] = (900, 700, 500, 300), seed: int = 0, h: int = 16) -> list[Tensor]:
    """The predictions of the steps of one picture: time falls, the conditioning is one tensor."""
    call = tiny.guided(tiny.inputs(unet, h, 16, seed=seed))
    with torch.no_grad():
        return [unet(**{**call, "timestep": torch.tensor(t)}).sample for t in steps]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def states(unet: Any) -> list[patch.BlockState]:
    return [block.attn1._tofu for _, block, _ in blocks(unet) if hasattr(block.attn1, "_tofu")]


# --- how much ---------------------------------------------------------------------------------------------------------


@given(st.floats(-1, 2), st.floats(0, 1), st.floats(-1, 1), st.integers(0, 100))
def test_the_threshold_falls_with_depth_to_its_least_and_is_the_classifiers(
    alpha: float, beta: float, least: float, layer: int
) -> None:
    """ATM Eq. 1, one formula for both."""
    fusion = TokenFusionConfig(threshold=alpha, threshold_decay=beta, threshold_min=least)
    here, deeper = fusion.threshold_at(layer), fusion.threshold_at(layer + 1)
    assert here is not None
    assert deeper is not None
    assert here == layer_threshold(alpha, beta, least, layer)
    assert here == AdaptiveReduction(alpha=alpha, beta=beta, least=least).threshold(layer)
    assert least <= deeper <= here
    assert fusion.threshold_at(0) == max(alpha, least)
    rising = TokenFusionConfig(threshold=alpha, threshold_decay=-beta, threshold_min=least)
    assert (rising.threshold_at(layer + 1) or 0) >= (rising.threshold_at(layer) or 0) >= max(alpha, least)


@given(st.integers(0, 5000), st.floats(0, 6000))
def test_a_bucket_is_an_eighth_of_the_most_and_never_more_than_is_alike(most: int, found: float) -> None:
    fusion = TokenFusionConfig(threshold=0.5)
    r = fusion.bucket(most, found)
    assert r in {most * eighth // BUCKETS for eighth in range(BUCKETS + 1)}
    assert r <= found
    assert r <= most
    assert r == most or r + -(-most // BUCKETS) > found  # the next would be too many
    assert fusion.bucket(most, found + 1) >= r


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 30), st.floats(-1, 1))
def test_what_is_alike_is_the_mean_over_the_batch(seed: int, batch: int, sources: int, threshold: float) -> None:
    best = torch.rand(batch, sources, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    by_hand = [sum(cosine > threshold for cosine in row) for row in best.tolist()]
    assert count_above_threshold(best, threshold).item() == pytest.approx(sum(by_hand) / batch)


@pytest.mark.parametrize("options", [{}, {"kv_only": True}, {"window": 2}, {"levels": 2, "merge_mlp": True}], ids=str)
def test_above_1_nothing_is_fused_bit_for_bit(options: dict[str, Any]) -> None:
    unet = tiny.sd15_unet()
    plain = picture(unet)
    assert equal(picture(tofu_sd.apply_patch(unet, 0.75, **NONE, **options)), plain)


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_only": True, "proportional": True}, {"window": 2, "seed": 3}, {"share_across_cfg": True}],
    ids=str,
)
def test_at_minus_1_it_is_the_fixed_ratio_from_the_second_step_on(options: dict[str, Any]) -> None:
    unet = tiny.sd15_unet()
    plain = picture(unet)
    fixed = picture(tofu_sd.apply_patch(unet, 0.5, **options))
    adaptive = picture(tofu_sd.apply_patch(unet, 0.5, **ALL, **options))
    assert equal(adaptive[1:], fixed[1:])
    assert torch.equal(adaptive[0], plain[0])  # of which nothing is known yet


@pytest.mark.parametrize("eighth", range(BUCKETS + 1))
def test_each_bucket_is_the_fixed_ratio_of_as_many_tokens(eighth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny.sd15_unet()
    r = 192 * eighth // BUCKETS
    fixed = tiny.predict(tofu_sd.apply_patch(unet, r / 256, proportional=True))
    tofu_sd.apply_patch(unet, 0.75, threshold=0.5, proportional=True)
    for state in states(unet):
        state.current.num_similar = float(r)
    monkeypatch.setattr(hooks, "recall_counts", lambda *_: None)
    assert torch.equal(tiny.predict(unet), fixed)


def test_each_block_fuses_what_the_step_before_counted() -> None:
    """The count by hand, from the tokens that each block's norm was shown in the step before."""
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), early="mean", late="mean", threshold_decay=0.005, **SOME)
    sites, seen = states(unet), dict[int, list[Tensor]]()
    for number, (_, block, _) in enumerate(blocks(unet)):
        if hasattr(block.attn1, "_tofu"):
            block.norm1.register_forward_pre_hook(lambda m, args, n=number: seen.setdefault(n, []).append(args[0]))
    with tofu_sd.record_maps(unet) as maps:
        picture(unet)
    rows = tofu_sd.summary(unet).rows
    assert len(sites) == len(rows) == 5
    numbers = set()
    for row, (_, shown) in zip(rows, sorted(seen.items()), strict=True):
        for step in (1, 2, 3):
            x = torch.nn.functional.normalize(shown[step - 1].double(), dim=-1).view(2, 8, 2, 8, 2, -1)
            cells = x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)  # [B, cells, 4, C], destinations first
            best = (cells[:, :, 1:].flatten(1, 2) @ cells[:, :, 0].mT).amax(dim=-1)
            wanted = TokenFusionConfig(threshold=0.85).bucket(192, (best > (row.threshold or 0)).sum().item() / 2)
            made = [m for m in maps if m.call == step and m.block == row.name]
            assert (256 - made[0].map.kept_idx.shape[1] if made else 0) == wanted
            numbers.add(wanted)
    assert len(numbers) > 1  # else this shows little
    assert not any(m.call == 0 for m in maps)


# --- when -------------------------------------------------------------------------------------------------------------


def test_a_picture_does_not_inherit_the_count_of_the_one_before() -> None:
    """Not of its size, prompt or number of steps, nor of one broken off."""
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(), **SOME)
    fresh = tiny.images(pipe, num_inference_steps=4)
    assert not torch.equal(fresh, tiny.images(tofu_sd.remove_patch(pipe), num_inference_steps=4))
    tofu_sd.apply_patch(pipe, **SOME)
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

    with pytest.raises(KeyboardInterrupt):
        tiny.images(pipe, seed=9, num_inference_steps=4, callback_on_step_end=stop)
    assert torch.equal(tiny.images(pipe, num_inference_steps=4), fresh)


def test_a_step_that_is_not_known_to_go_on_is_a_first_one() -> None:
    unet = tiny.sd15_unet()
    plain, call = picture(unet, (900, 800)), tiny.inputs(unet)
    tofu_sd.apply_patch(unet, **SOME)
    assert torch.equal(picture(unet, (900,))[0], plain[0])
    assert torch.equal(picture(unet, (800,))[0], plain[1])  # later, but with conditioning of its own
    first = tiny.predict(unet, **call)
    assert torch.equal(tiny.predict(unet, **call), first)  # the same step again


def test_a_window_of_steps_that_opens_late_begins_with_a_first_step() -> None:
    unet = tiny.sd15_unet()
    plain = picture(unet)
    with tofu_sd.patched(unet, start=0.4, **SOME):
        late = picture(unet)
        assert equal(late[:3], plain[:3])  # closed at 900 and 700, counted at 500
        assert not torch.equal(late[3], plain[3])


@pytest.mark.parametrize("options", [SOME, {"temperature": 0.1, "early": "mean", "late": "mean", "window": 3, "sy": 1}])
def test_remove_patch_leaves_nothing(options: dict[str, Any]) -> None:
    unet = tiny.sd15_unet()
    before, plain = anatomy(unet), picture(unet)
    assert not equal(picture(tofu_sd.apply_patch(unet, **{"ratio": 0.5, **options})), plain)
    tofu_sd.remove_patch(unet)
    assert anatomy(unet) == before
    assert equal(picture(unet), plain)


def test_a_block_that_is_passed_over_keeps_its_count() -> None:
    sites = ran, passed = [patch.BlockState(TokenFusionConfig(threshold=0.5), prune, threshold=0.5) for _ in range(2)]
    part = ImagePart(None, 900, torch.zeros(1), None)

    def step(*best: Tensor | None, first: bool = False) -> tuple[float, float]:
        block_state.recall_counts(sites, part, first)
        counted = ran.current.num_similar, passed.current.num_similar
        for site, found in zip(sites, best, strict=True):
            site.current.best = found
        block_state.keep_best(sites, part)
        return counted

    some = torch.tensor([[0.9, 0.6, 0.1], [0.7, 0.1, 0.1]])
    assert step(some, some, first=True) == (0, 0)
    assert step(torch.zeros(2, 3), None) == (1.5, 1.5)
    assert step(torch.ones(2, 3), None) == (0, 1.5)
    assert step(None, None) == (3, 1.5)


def test_copies_count_for_themselves() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), **SOME)
    expected = picture(unet)
    other = copy.deepcopy(unet)
    assert equal(picture(other), expected)
    assert all(state.current == block_state.ForwardState() for state in states(copy.deepcopy(unet)))


# --- compiled ---------------------------------------------------------------------------------------------------------


def graphs(fusion: TokenFusionConfig) -> int:
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), fusion) for _ in range(2))
    counter = CompileCounter()
    unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    fused = set()
    for h in (16, 24):
        for seed in range(3):
            with tofu_sd.record_maps(eager) as seen:
                expected = picture(eager, seed=seed, h=h)
            fused |= {(h, s.map.kept_idx.shape[1]) for s in seen}
            assert equal(picture(unet, seed=seed, h=h), expected)
    assert fusion.threshold is None or len(fused) > 3
    return int(counter.frame_count)


@pytest.mark.parametrize("decay", [0, 0.01])
def test_compiled_blocks_cost_one_graph_more_for_all_buckets(decay: float) -> None:
    """What is fused is one graph, whatever its number, and to fuse nothing is one. Thresholds are not in the graph."""
    fixed = TokenFusionConfig(0.75, early="mean", late="mean", proportional=True)
    torch._dynamo.reset()
    fewest = graphs(fixed)
    torch._dynamo.reset()
    assert graphs(TokenFusionConfig.of(fixed, threshold=0.85, threshold_decay=decay)) <= fewest + 1


def test_a_whole_compiled_unet_is_refused() -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), threshold=0.5)
    with pytest.raises(RuntimeError, match=r"threshold needs .* compile_repeated_blocks\(\)"):
        tiny.predict(torch.compile(unet, backend="eager", fullgraph=True))


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_summary_says_that_the_ratio_is_a_most() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, threshold=0.9, threshold_decay=0.01)
    told = tofu_sd.summary(unet)
    assert "tofu-r50-above0.9-decay0.01 on 5 of 16 transformer blocks, tokens 256 -> at least 128" in told.headline
    assert str(told).splitlines()[1].endswith("prune, above 0.9")
    assert str(told).splitlines()[-1].endswith(f"mlerp, above {layer_threshold(0.9, 0.01, -1, 15):g}")


def test_the_method_is_written_like_the_others() -> None:
    assert recipes.named("adaptive") == recipes.ADAPTIVE
    fusion = recipes.named("kv:adaptive+p@threshold=0.8@threshold_decay=0.02@threshold_min=0.7", 0.75)
    assert (fusion.threshold, fusion.threshold_decay, fusion.threshold_min) == (0.8, 0.02, 0.7)
    assert fusion.kv_only
    assert fusion.proportional
    assert fusion.ratio == 0.75


def test_keys_tell_thresholds_apart() -> None:
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
    "least": ({"threshold": 0.9, "threshold_min": 3}, "threshold_min is 3; it must be a number from -1 to 2"),
    "decay of nothing": ({"threshold_decay": 0.1}, r"threshold_decay is 0\.1 and threshold is None"),
    "over steps": ({"threshold": 0.9, "match_interval": 3}, r"match_interval is 3 and threshold is 0\.9"),
    "over blocks": (
        {"threshold": 0.9, "share_across_blocks": True},
        r"share_across_blocks is True and threshold is 0\.9",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_thresholds_are_named(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        TokenFusionConfig(**options)
