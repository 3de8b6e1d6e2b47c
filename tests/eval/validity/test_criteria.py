"""Criteria by which a model predicts what methods do to photographs: each fails where its property is inverted."""

from __future__ import annotations

import pytest
import torch

from eval.validity import criteria, image_statistics, photographs, token_similarity

PROMPTS = {f"{i}": f"prompt {i}" for i in range(6)}


def psnr_of(values):
    """Returns PSNR by method and image: a value, and what image i adds."""
    return {name: {key: value + i for i, key in enumerate(PROMPTS)} for name, value in values.items()}


def growing_errors(slope):
    return psnr_of({f"{m} {r}": 40 - slope * r for m in criteria.GROWING for r in criteria.RATIOS})


def test_error_that_grows_with_the_ratio_holds_and_the_opposite_fails():
    assert all(row.holds for row in criteria.error_grows(growing_errors(8), PROMPTS))
    assert not any(row.holds for row in criteria.error_grows(growing_errors(-8), PROMPTS))


def test_error_that_grows_in_one_step_alone_fails():
    psnr = growing_errors(8)
    psnr["tome 0.75"] = psnr["tome 0.25"]
    holds = {row.name.split()[2]: row.holds for row in criteria.error_grows(psnr, PROMPTS)}
    assert holds == {"tome": False, "tofu": True, "prune": True, "mlerp": True}


def test_error_that_grows_within_its_interval_fails():
    """The mean falls by a tenth of a dB, and the images differ by up to 5 dB."""
    psnr = growing_errors(0.4)
    for i, key in enumerate(PROMPTS):
        psnr["mlerp 0.5"][key] += 5 * (-1) ** i
    holds = {row.name.split()[2]: row.holds for row in criteria.error_grows(psnr, PROMPTS)}
    assert not holds["mlerp"]
    assert holds["tome"]


@pytest.mark.parametrize(("value", "holds"), [(0.73, True), (0.98, False), (0.5, False)])
def test_magnitude_of_the_error_is_that_of_stable_diffusion(value, holds):
    figure = {"value": value, "low": value - 0.01, "high": value + 0.01}
    row = criteria.magnitude(
        {"MS-SSIM": figure, "PSNR": {"value": 31.0}, "LPIPS-squeeze": {"value": 0.3}},
        {"MS-SSIM": {"value": 0.4, "low": 0.3, "high": 0.5}},
    )
    assert row.holds == holds
    assert f"{value:.3f}" in row.measured
    assert "LPIPS-squeeze 0.300; without that attention 0.400" in row.measured
    assert "0.7304" in row.required


def noise(exponent, side=64, n=64):
    """Returns images of noise with amplitude ~ 1/f^exponent, standard deviation 1: [n, 1, side, side]."""
    f = torch.fft.fftfreq(side).double()
    radius = torch.hypot(f[:, None], f[None])
    radius[0, 0] = float("inf")
    white = torch.randn(n, 1, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = torch.fft.ifft2(torch.fft.fft2(white) / radius**exponent).real
    return images / images.std()


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_spectral_slope_of_known_noise(exponent):
    """A mean over 64 images of 64 px is within 0.1 of the exponent; the slopes of the cases differ by 0.5."""
    assert image_statistics.spectral_slope(noise(exponent)).mean().item() == pytest.approx(exponent, abs=0.1)


def test_gradient_kurtosis_of_gaussian_gradients_is_3_and_of_edges_is_high():
    log_noise = noise(1.0, side=128)
    gaussian = ((0.2 * log_noise).exp() - 1 / 255).expand(-1, 3, -1, -1)
    assert image_statistics.gradient_kurtosis(gaussian) == pytest.approx(3, abs=0.15)
    edges = torch.zeros(1, 3, 64, 64)
    edges[..., 32:] = 1
    assert image_statistics.gradient_kurtosis(edges) > 50


def test_spectra_of_noise_fail_and_those_of_natural_images_hold():
    assert [row.holds for row in criteria.spectra(1.1, 0.8, 12)] == [True, True]
    assert [row.holds for row in criteria.spectra(0.1, 0.8, 3)] == [False, False]


def test_token_similarity_compares_every_block():
    own = list(photographs.TOKEN_COSINES)
    assert criteria.token_similarity(own).holds
    own[3] += 0.08
    assert not criteria.token_similarity(own).holds


def test_nearest_cosine_is_that_of_a_source_to_a_destination():
    """A 2 x 2 map has one destination, its top left token; the cosines of the three others to it are known."""
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]])
    expected = torch.tensor([[0.0, 1.0, 0.5**0.5]])
    torch.testing.assert_close(token_similarity.nearest_cosines(tokens, 2, 2), expected)


@pytest.mark.parametrize(("metric", "field"), [("PSNR", "psnr"), ("MS-SSIM", "ms_ssim")])
def test_order_of_methods_holds_for_the_same_order_and_fails_for_the_opposite(metric, field):
    values = {f"{one.method} {one.ratio}": getattr(one, field) for one in photographs.METHODS}
    same = criteria.order_of_methods(metric, psnr_of({name: value + 9 for name, value in values.items()}))
    assert same.holds
    assert same.measured == "1.00"
    assert metric in same.name
    opposite = criteria.order_of_methods(metric, psnr_of({name: -value for name, value in values.items()}))
    assert opposite.measured == "-1.00"
    assert not opposite.holds


def test_rank_correlation_by_hand():
    """Spearman: 1 - 6 sum d^2 / (n (n^2 - 1)); here the ranks differ by 0, 1, 1: 1 - 12 / 24."""
    assert criteria.rank_correlation([1.0, 5.0, 9.0], [10.0, 30.0, 20.0]) == pytest.approx(0.5)


def test_equal_values_share_a_rank():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: the correlation of these, by hand 4.5 / sqrt(4.5 * 5)."""
    assert criteria.rank_correlation([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx((4.5 / 5) ** 0.5)
    assert criteria.rank_correlation([1.0, 2.0, 2.0, 3.0], [5.0, 6.0, 6.0, 9.0]) == pytest.approx(1)
