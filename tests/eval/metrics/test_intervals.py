"""Intervals resample classes of images, and few classes have none; times are compared in pairs."""

from __future__ import annotations

import math

import pytest
import torch
from eval_run import ToyClassifier
from hypothesis import given
from hypothesis import strategies as st
from metric_inputs import random_features

from eval.metrics import demo_classifier, statistics, summary
from eval.reporting import tables

CPU = torch.device("cpu")


def test_bootstrap_interval_contains_the_mean_and_is_deterministic():
    values = random_features(60, 1).flatten()
    groups = [str(i) for i in range(60)]
    low, high = statistics.bootstrap(values, groups)
    assert low < values.mean() < high
    assert (low, high) == statistics.bootstrap(values, groups)
    # the textbook's interval for a mean; 60 draws from a normal distribution are that near to it
    half = 1.96 * values.std().item() / math.sqrt(60)
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_bootstrap_resamples_whole_classes():
    """Twice the same image is no second observation: the interval must not shrink by the square root of two."""
    values = random_features(40, 1).flatten()
    once = statistics.bootstrap(values, [str(i) for i in range(40)])
    twice = statistics.bootstrap(values.repeat_interleave(2), [str(i // 2) for i in range(80)])
    assert twice == pytest.approx(once, abs=1e-12)


def test_bootstrap_does_not_depend_on_the_chunk_size(monkeypatch):
    values, groups = random_features(40, 1).flatten(), [str(i // 2) for i in range(40)]
    together = statistics.bootstrap(values, groups)
    monkeypatch.setattr(statistics, "AT_ONCE", 1)
    assert statistics.bootstrap(values, groups) == pytest.approx(together, abs=1e-12)


def test_bootstrap_does_not_touch_the_global_rng():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    statistics.bootstrap(torch.arange(5.0), list("abcde"))
    assert torch.equal(torch.rand(1), expected)


def test_jackknife_of_a_difference_of_means_is_the_textbook_interval():
    x = random_features(40, 1).double()
    y = torch.zeros_like(x)
    low, high = statistics.jackknife(lambda a, b: 9 + (a - b).mean().item(), x, y, [str(i) for i in range(40)])
    error = x.std().item() / math.sqrt(40)  # for a mean the jackknife's error is exactly this
    assert high - low == pytest.approx(2 * statistics.NORMAL_95 * error, rel=1e-9)


def test_jackknife_of_too_few_classes_is_none():
    """Of images of four, however many: a normal interval from four blocks is half as wide as it should be."""
    pair = random_features(12, 3), random_features(12, 3)
    assert statistics.jackknife(statistics.frechet, *pair, list("abcd") * 3) is None
    assert statistics.jackknife(statistics.frechet, *pair, list("abcdef") * 2) is not None


def test_interval_of_a_distance_is_clipped_to_its_minimum():
    """A kernel distance has no bias, and where there is none between the sets it is below 0 every other time; a Fréchet
    distance never is."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(40, 3, generator=generator).double() for _ in range(2))
    groups = [str(i) for i in range(40)]
    kernel = summary.distance_ci(demo_classifier.kd_demo(ToyClassifier(), CPU), x, y, groups)
    assert kernel["low"] < 0 < kernel["high"]
    assert kernel["value"] - kernel["low"] == pytest.approx(kernel["high"] - kernel["value"])
    near = summary.distance_ci(demo_classifier.fd_demo(ToyClassifier(), CPU), x, x + 1e-3 * y, groups)
    assert near["low"] == 0 < near["value"] < near["high"]


@pytest.mark.parametrize(("values", "size"), [
    ([1, 0, 1, 0], 4),  # images of a class as different as those of two
    ([1, 1, 0, 0], 2),  # equal within a class
    ([1, 1, 1, 1], 2),
])  # fmt: skip
def test_effective_size_depends_on_the_variance_within_classes(values, size):
    assert statistics.effective_size(torch.tensor(values), list("aabb")) == pytest.approx(size)


@given(st.lists(st.booleans(), min_size=2, max_size=12), st.integers(1, 4))
def test_effective_size_is_between_numbers_of_classes_and_images(values, each):
    groups = [str(i // each) for i in range(len(values))]
    size = statistics.effective_size(torch.tensor(values).double(), groups)
    assert len(set(groups)) <= size <= len(values)
    if each == 1:
        assert size == len(values)


@pytest.mark.parametrize("groups", ["abcde", "aabbccddee"])
def test_wilson_interval_of_five_ones_is_not_a_point(groups):
    """A bootstrap of ones is 1 to 1; Wilson's interval knows how few they are, and that two of a class are not two."""
    figure = summary.proportion_ci(torch.ones(len(groups)), list(groups))
    assert (figure["value"], figure["n"]) == (1, len(groups))
    assert figure["low"] == pytest.approx(5 / (5 + 1.96**2))  # its closed form where all are ones
    assert figure["high"] == pytest.approx(1)


def test_few_classes_have_no_interval():
    """Seven right of ten images of one prompt say nothing of what other prompts would give."""
    values = torch.tensor([1.0] * 7 + [0.0] * 3)
    assert summary.proportion_ci(values, ["a"] * 10) == {
        "value": pytest.approx(0.7),
        "low": None,
        "high": None,
        "n": 10,
    }


def test_nan_is_not_counted_as_equal():
    figure = summary.mean_ci(torch.tensor([30.0, math.inf, math.nan]).double(), ["a", "b", "c"])
    assert (figure["value"], figure["infinite"], figure["nan"]) == (30, 1, 1)
    assert tables.short(figure, 1) == "30.0 (1 equal, 1 NaN)"


def test_few_images_have_no_interval():
    figure = summary.mean_ci(torch.tensor([30.0, 40.0]).double(), ["a", "b"])
    assert (figure["value"], figure["low"], figure["high"]) == (35, None, None)


def test_infinite_values_are_counted_not_averaged():
    figure = summary.mean_ci(torch.tensor([30.0, float("inf"), 40.0]).double(), ["a", "b", "c"])
    assert (figure["value"], figure["n"], figure["infinite"]) == (35, 2, 1)


def test_speedup_is_a_ratio_of_interleaved_times():
    """A machine that slows down by half during the run changes the seconds, not the ratio."""

    def record(seconds, run="one", timed=True, batch=2):
        return {"seconds": seconds, "run": run, "timed": timed, "batch": batch, "peak_bytes": None}

    full = {"a": record(2.0), "b": record(4.0), "c": record(9.0), "d": record(9.0, timed=False)}
    full["e"] = record(9.0, batch=1)
    own = {"a": record(1.0), "b": record(2.0), "c": record(1.0, run="two"), "d": record(1.0, timed=False)}
    own["e"] = record(1.0, batch=1)  # a rest, which costs more an image
    speed = summary.timing_summary(full, own)
    assert speed["speedup"] == {"median": 2.0, "mean": 2.0, "p5": 2.0, "p95": 2.0, "n": 2}
    assert (speed["seconds"]["mean"], speed["seconds"]["n"]) == (1.5, 2)  # of the same batches
    alone = summary.timing_summary(full, {"c": own["c"]})
    assert (alone["speedup"], alone["seconds"]["n"]) == (None, 1)
    own["c"] |= {
        "denoiser_seconds": 0.75,
        "baseline_denoiser_seconds": 1.25,
    }  # of one second: a quarter is decoding and text
    own["b"] |= {"denoiser_seconds": 1.5, "baseline_denoiser_seconds": None}
    speed = summary.timing_summary(full, own)  # what ran beside it is a better measure than any other turn
    assert (speed["speedup"]["n"], speed["speedup"]["mean"]) == (1, 1.5)
    assert (speed["seconds"]["n"], speed["denoiser_seconds"]["mean"]) == (1, 0.75)
    assert summary.percentiles([1.0, 1.0, 4.0]) == pytest.approx({"median": 1, "mean": 2, "p5": 1, "p95": 3.7, "n": 3})
