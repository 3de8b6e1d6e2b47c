"""Metrics of image pairs agree with their formulas and with a second implementation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from eval_run import ToyClassifier
from metric_inputs import import_or_skip, is_independent_of_other_images, random_features, random_images
from torch import nn

from eval.metrics import base, demo_classifier, pairwise

WEIGHTS = Path(__file__).resolve().parents[4] / "shared" / "weights" / "squeeze.backbone.pth"
CPU = torch.device("cpu")


def test_psnr_equals_a_value_by_hand():
    a = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    b = torch.full((1, 3, 8, 8), 120, dtype=torch.uint8)
    expected = 10 * math.log10(255**2 / 400)  # as uint8, 100 - 120 would wrap to 236
    assert pairwise.psnr().compute(a, b).item() == pytest.approx(expected, abs=1e-12)
    assert pairwise.psnr().compute(b, a).item() == pytest.approx(expected, abs=1e-12)


def test_psnr_of_equal_images_is_infinite():
    assert pairwise.psnr().compute(random_images(), random_images()).tolist() == [math.inf, math.inf]


def test_ms_ssim_is_one_on_equal_images_and_near_zero_on_noise():
    pytest.importorskip("pytorch_msssim")
    measure = pairwise.ms_ssim(176)
    a, b = random_images(size=176), random_images(size=176, seed=1)
    assert measure.compute(a, a).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert measure.compute(a, b).max() < 0.1  # with a wrong data range two noise images reach 0.9996


def test_ms_ssim_agrees_with_torchmetrics():
    pytest.importorskip("pytorch_msssim")
    other = import_or_skip("torchmetrics.functional.image").multiscale_structural_similarity_index_measure
    a = random_images(size=192)
    a = nn.functional.avg_pool2d(a.float(), 5, 1, 2).byte()  # structure to lose
    b = (a.float() + 20 * random_features(a.numel(), 1).view(a.shape)).clamp(0, 255).byte()
    expected = torch.stack(
        [other(x[None].float(), y[None].float(), data_range=255.0) for x, y in zip(a, b, strict=True)]
    )
    # the two pad odd sizes and combine channels differently: 9e-4 was the largest difference on photographs
    assert torch.allclose(pairwise.ms_ssim(192).compute(a, b), expected.double(), atol=2e-3)


def test_ssim_agrees_with_its_formula_on_flat_images():
    """Without structure, only the luminance term is left: (2ab + c) / (a² + b² + c), c = (0.01 · 255)²."""
    pytest.importorskip("pytorch_msssim")
    a, b = (torch.full((1, 3, 16, 16), level, dtype=torch.uint8) for level in (100, 150))
    c = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c) / (100**2 + 150**2 + c)
    # float32 leaves a variance of flat images that is not quite 0
    assert pairwise.ssim(16).compute(a, b).item() == pytest.approx(expected, rel=1e-4)
    assert pairwise.ssim(16).compute(a, a).item() == pytest.approx(1, abs=1e-6)
    assert "11" in pairwise.ssim(10).reason


def test_ms_ssim_agrees_with_its_formula_on_flat_images():
    """Contrast and structure are 1 at every scale, so that the luminance of the last is left, to its weight (Wang et
    al. 2003: 0.1333)."""
    pytest.importorskip("pytorch_msssim")
    a, b = (torch.full((1, 3, 176, 176), level, dtype=torch.uint8) for level in (60, 180))
    c = (0.01 * 255) ** 2
    expected = ((2 * 60 * 180 + c) / (60**2 + 180**2 + c)) ** 0.1333
    assert pairwise.ms_ssim(176).compute(a, b).item() == pytest.approx(expected, rel=1e-3)


def lpips():
    import_or_skip("lpips")
    if not WEIGHTS.exists():
        pytest.skip("no SqueezeNet weights beside the repository")
    measure = pairwise.lpips("squeeze", WEIGHTS, CPU)
    assert isinstance(measure, base.Pairwise), measure
    return measure


PAIRWISE = {
    "PSNR": pairwise.psnr, "SSIM": lambda: pairwise.ssim(176), "MS-SSIM": lambda: pairwise.ms_ssim(176),
    "PD-demo": lambda: demo_classifier.pd_demo(ToyClassifier(), CPU), "LPIPS": lpips,
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_metrics_increase_with_noise_and_are_symmetric(name):
    pytest.importorskip("pytorch_msssim")
    a = nn.functional.avg_pool2d(random_images(3, size=176).float(), 9, 1, 4).byte()
    noise = random_features(a.numel(), 1).view(a.shape)
    steps = [(a.float() + sigma * noise).clamp(0, 255).byte() for sigma in (5, 15, 45)]
    measure = PAIRWISE[name]()
    far = torch.stack([measure.compute(a, b) for b in steps])
    far = far if measure.lower_is_better else -far
    assert (far.diff(dim=0) > 0).all()
    assert is_independent_of_other_images(measure, a, steps[0])


def test_ms_ssim_skips_too_small_images_with_a_reason():
    skipped = pairwise.ms_ssim(160)
    assert isinstance(skipped, base.Skipped)
    assert "161" in skipped.reason
    assert "160" in skipped.reason


def test_lpips_reproduces_the_documented_value():
    """torchmetrics' own documentation gives [0.1024, 0.0938] for these tensors with SqueezeNet."""
    measure = lpips()
    generator = torch.Generator().manual_seed(42)
    a, b = (torch.rand(2, 3, 100, 100, generator=generator) for _ in range(2))
    documented = torch.tensor([0.1024, 0.0938], dtype=torch.float64)
    # rounding the images to 8 bits moves the value by about 1e-4; the random backbone gives 0.1497, 0.1504
    found = measure.compute((a * 255).round().byte(), (b * 255).round().byte())
    assert torch.allclose(found, documented, atol=5e-4), found


def test_lpips_backbone_weights_are_loaded_into_matching_layers():
    net = nn.Module()
    net.slice1, net.slice2 = nn.Sequential(), nn.Sequential()
    net.slice1.add_module("0", nn.Linear(2, 2))
    net.slice2.add_module("3", nn.Linear(2, 2))
    weights = {f"features.{i}.{part}": torch.randn(2, 2) if part == "weight" else torch.randn(2)
               for i in (0, 3) for part in ("weight", "bias")}  # fmt: skip
    pairwise.load_backbone(net, weights)
    assert torch.equal(net.slice1[0].weight, weights["features.0.weight"])
    assert torch.equal(net.slice2.get_submodule("3").bias, weights["features.3.bias"])


@pytest.mark.parametrize("net", pairwise.LPIPS_NETS)
def test_lpips_uses_the_given_backbone_file(net, tmp_path):
    """torchvision's nets with random weights: into lpips's own by their names, and one after the other."""
    package, models = import_or_skip("lpips"), import_or_skip("torchvision.models")
    layers = {
        "alex": lambda: models.alexnet().features,
        "vgg": lambda: models.vgg.make_layers(models.vgg.cfgs["D"]),
        "squeeze": lambda: models.squeezenet1_1().features,
    }[net]()
    torch.save({f"features.{name}": weight for name, weight in layers.state_dict().items()}, tmp_path / "w.pth")
    measure = pairwise.lpips(net, tmp_path / "w.pth", CPU)
    assert isinstance(measure, base.Pairwise), measure
    theirs = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    for own, weight in zip(theirs.net.parameters(), layers.parameters(), strict=True):
        own.data = weight.data
    a, b = random_images(), random_images(seed=1)
    with torch.no_grad():
        expected = theirs(a / 127.5 - 1, b / 127.5 - 1).flatten().double()
    assert torch.allclose(measure.compute(a, b), expected, rtol=1e-4)
    assert measure.compute(a, a).tolist() == [0, 0]
    assert (measure.compute(a, b) > 0).all()


def test_metrics_ignore_autocast():
    a, b = random_images(size=176), random_images(size=176, seed=1)
    pytest.importorskip("pytorch_msssim")
    plain = pairwise.ms_ssim(176).compute(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pairwise.ms_ssim(176).compute(a, b), plain)
