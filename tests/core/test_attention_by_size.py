"""An attention for each size of group, joined by their log-sum-exp, is proportional attention without its bias."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import tofu_sd
from tofu_sd import TokenFusionConfig, timing_cache
from tofu_sd.core import attention_by_size, proportional
from tofu_sd.core.attention_by_size import attend_by_size, can_attend_by_size
from tofu_sd.core.matching import get_matcher
from tofu_sd.core.proportional import KeyBias, by_mask, key_bias
from tofu_sd.core.token_map import SizeClasses
from tofu_sd.patching.step_tracker import StepTracker

CLASSES: list[SizeClasses] = [((5, 2), (16, 1)), ((3, 4), (18, 1)), ((2, 4), (6, 2), (13, 1)), ((21, 3),)]


def sizes(classes: SizeClasses) -> Tensor:
    return torch.cat([torch.full((count,), float(size)) for count, size in classes])


def heads(N: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return tiny.noise(2, N, 3 * 8, seed=seed).to(dtype).view(2, N, 3, 8).transpose(1, 2)


@pytest.mark.parametrize("scale", [None, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", CLASSES, ids=str)
def test_equals_the_bias(classes: SizeClasses, dtype: torch.dtype, scale: float | None) -> None:
    query, key, value = heads(33, 0, dtype), heads(21, 1, dtype), heads(21, 2, dtype)
    bias = sizes(classes).log().expand(2, 3, 1, -1)
    expected = by_mask(query.double(), key.double(), value.double(), bias, scale=scale)
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    ours = attend_by_size(query, key, value, classes, scale)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def test_large_logits_do_not_overflow() -> None:
    """exp(200) is not a float32; the sums are joined by their logarithms."""
    query, key, value = 60 * heads(9, 0), 60 * heads(21, 1), heads(21, 2)
    bias = sizes(CLASSES[0]).log().expand(2, 3, 1, -1)
    torch.testing.assert_close(attend_by_size(query, key, value, CLASSES[0]), by_mask(query, key, value, bias))


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """takes(0.8): by size takes 0.8 times as long on a fake clock. Makes a CPU take the path of a GPU's flash kernel.

    Returns the list of the ways that were timed.
    """
    monkeypatch.setattr(proportional, "FLASH_DEVICE", "cpu")
    monkeypatch.setattr(proportional, "FLASH_TYPES", (torch.float32,))
    monkeypatch.setattr(proportional, "flash_takes", lambda query, **more: True)
    monkeypatch.setattr(attention_by_size, "_faster", {})

    def rule(ratio: float) -> list[str]:
        timed: list[str] = []

        def seconds(run: Any, device: torch.device) -> float:
            timed.append(run.func.__name__)
            run()
            return ratio if run.func.__name__ == attend_by_size.__name__ else 1.0

        monkeypatch.setattr(attention_by_size, "seconds", seconds)
        return timed

    return rule


@pytest.fixture
def ran_by_size(monkeypatch: pytest.MonkeyPatch) -> list[SizeClasses]:
    """The classes of each call of attention by size."""
    ran: list[SizeClasses] = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, classes: SizeClasses, scale: float | None = None) -> Tensor:
        ran.append(classes)
        return attend_by_size(query, key, value, classes, scale)

    recorded.__name__ = attend_by_size.__name__
    monkeypatch.setattr(proportional, "attend_by_size", recorded)
    return ran


@pytest.mark.parametrize(("ratio", "faster"), [(0.8, True), (1.2, False)])
def test_the_faster_way_is_timed_once_and_remembered(
    takes: Any, ratio: float, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = takes(ratio)
    query, key, value = heads(33, 0), heads(21, 1), heads(21, 2)
    bias = bias_of(CLASSES[0])
    expected = by_mask(query, key, value, bias.as_subclass(Tensor))
    other = "by_channel"
    for _ in range(2):
        torch.testing.assert_close(proportional.attend(query, key, value, bias), expected)
    assert timed == [other, "attend_by_size"] * attention_by_size.ROUNDS
    assert list(attention_by_size._faster.values()) == [faster]
    monkeypatch.setattr(attention_by_size, "_faster", {})  # another process, which finds the file
    proportional.attend(query, key, value, bias)
    assert len(timed) == 2 * attention_by_size.ROUNDS
    assert list(attention_by_size._faster.values()) == [faster]
    (text,) = timing_cache.cache._timings
    assert "5 of 2 and 16 of 1, by size or by_channel" in text


def test_a_bias_keeps_its_classes_while_its_keys_stay() -> None:
    """Processors reshape a mask for their heads; one of other keys must not lose its bias."""
    bias = torch.zeros(2, 1, 21).as_subclass(KeyBias)
    bias.classes = CLASSES[0]
    assert bias.repeat_interleave(3, dim=0).view(2, 3, -1, 21).classes == CLASSES[0]
    assert bias.repeat_interleave(2, dim=-1).classes is None
    assert bias.view(2, 3, 7).classes is None
    assert torch.zeros(2, 1, 21).as_subclass(KeyBias).unsqueeze(1).classes is None


def bias_of(classes: SizeClasses) -> Tensor:
    """The mask of 3 heads, as processors make it."""
    return key_bias(sizes(classes).log().expand(2, -1), torch.float32, True, classes).unsqueeze(1).expand(2, 3, 1, -1)


def test_gradients_are_those_of_the_bias(takes: Any, ran_by_size: list[Any]) -> None:
    """The log-sum-exp of torch's operators has no gradient, which would silently be missing."""
    takes(0.5)
    inputs = [heads(33, 0).requires_grad_(), heads(21, 1).requires_grad_(), heads(21, 2).requires_grad_()]
    bias = bias_of(CLASSES[0])
    ours, theirs = (
        torch.autograd.grad(way(*inputs, bias.as_subclass(kind)).square().sum(), inputs)
        for way, kind in ((proportional.attend, KeyBias), (by_mask, Tensor))
    )
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert ran_by_size == []
    assert not can_attend_by_size(*(x.detach().to("meta") for x in inputs))


@pytest.mark.parametrize("first", ["infinite", "finite"])
def test_a_call_that_overflows_decides_nothing(first: str, takes: Any) -> None:
    timed = takes(0.5)
    query, key, value = heads(33, 0), heads(21, 1), heads(21, 2)
    broken = value.clone()
    broken[0, 0, 0] = math.inf
    proportional.attend(query, key, broken if first == "infinite" else value, bias_of(CLASSES[0]))
    assert bool(timed) == (first == "finite")
    proportional.attend(query, key, value, bias_of(CLASSES[0]))
    assert list(attention_by_size._faster.values()) == [True]


@pytest.mark.parametrize("options", [{"min_tokens": 0}, {"matching": "bipartite"}], ids=str)
def test_nothing_is_measured_where_images_must_not_depend_on_the_machine(
    options: dict[str, Any], takes: Any, ran_by_size: list[Any]
) -> None:
    timed = takes(0.5)
    unet = tiny.sd15_unet()
    with tofu_sd.patched(unet, TokenFusionConfig.of(0.25, proportional=True, **{"matching": "pairs", **options})):
        tiny.predict(unet)
    assert timed == ran_by_size == []


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({"matching": "pairs", "ratio": 0.25}, ((64, 2), (128, 1))),
        ({"matching": "cells", "ratio": 0.375}, ((32, 4), (128, 1))),
        ({"matching": "pairs", "ratio": 0.25, "kv_only": True}, ((64, 2), (128, 1))),
    ],
    ids=str,
)
def test_a_patched_unet_attends_by_size(
    options: dict[str, Any], classes: SizeClasses, takes: Any, ran_by_size: list[Any]
) -> None:
    takes(0.5)
    unet = tiny.sd15_unet()
    with tofu_sd.patched(unet, TokenFusionConfig(proportional=True, **options)):
        tiny.predict(unet)  # times both ways
        ran_by_size.clear()
        ours = tiny.predict(unet)
        assert ran_by_size == [classes] * 5
        attention_by_size._faster.update(dict.fromkeys(attention_by_size._faster, False))
        with_bias = tiny.predict(unet)
        assert len(ran_by_size) == 5
    torch.testing.assert_close(ours, with_bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({}, None),  # bipartite groups can have any size
        ({"matching": "pairs", "ratio": 0.5}, [((32, 2),), ((18, 2), (13, 1))]),
        ({"matching": "pairs", "ratio": 0.1}, [((6, 2), (52, 1)), ((4, 2), (41, 1))]),
        ({"matching": "cells", "ratio": 0.75}, [((16, 4),), ((9, 4), (13, 1))]),
        ({"matching": "pairs", "ratio": 0.75}, None),  # groups of two at the edge of an odd map
    ],
    ids=str,
)
def test_classes_are_the_sizes_of_the_map(options: dict[str, Any], classes: list[SizeClasses] | None) -> None:
    config = TokenFusionConfig(**options)
    for number, side in enumerate((8, 7)):
        grid = StepTracker(config).grid(side, side, torch.device("cpu"))
        map = get_matcher(config.matching)(tiny.noise(2, side * side, 4), grid, config)
        found = config.size_classes(map)
        assert found == (None if classes is None else classes[number])
        if found is not None:
            assert torch.equal(map.size, sizes(found).expand(2, -1))
            assert math.prod(map.size.shape) == 2 * sum(count for count, _ in found)


@pytest.mark.parametrize("fault", ["raises", "differs", "nan"])
def test_an_operator_that_fails_or_differs_is_not_used(fault: str, takes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's operators are internal: a version or a driver may lack one, or return another logarithm."""
    timed = takes(0.5)

    def faulty(*args: Any) -> tuple[Tensor, Tensor]:
        if fault == "raises":
            raise RuntimeError("No available kernel")
        output, logsumexp = real(*args)
        return output, logsumexp / math.log(2) if fault == "differs" else logsumexp * math.nan

    real = attention_by_size._with_logsumexp
    monkeypatch.setattr(attention_by_size, "_with_logsumexp", faulty)
    query, key, value = 4 * heads(33, 0), 4 * heads(21, 1), heads(21, 2)
    bias = bias_of(CLASSES[1])
    expected = by_mask(query, key, value, bias.as_subclass(Tensor))
    torch.testing.assert_close(proportional.attend(query, key, value, bias), expected)
    assert timed == []
    assert list(attention_by_size._faster.values()) == [False]
