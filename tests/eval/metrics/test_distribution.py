"""Distances of image sets agree with their formulas and with a second implementation."""

from __future__ import annotations

import pytest
import torch
from eval_run import ToyClassifier
from metric_inputs import fid_metric, import_or_skip, random_features, random_images
from torch import nn

from eval.metrics import base, demo_classifier, statistics, summary
from eval.reporting import tables

CPU = torch.device("cpu")


def test_frechet_is_zero_on_equal_sets_with_fewer_images_than_features():
    x = random_features(20, 64)
    assert statistics.frechet(x, x) < 1e-9  # exact but for float64 rounding; a matrix square root leaves 1e-6


def test_frechet_of_a_shift_is_its_squared_length():
    x = random_features(50, 8)
    shift = torch.arange(8.0)
    assert statistics.frechet(x, x + shift) == pytest.approx(140.0, rel=1e-5)  # 0 + 1 + 4 + … + 49; x is float32


def test_frechet_of_a_scaling_equals_its_closed_form():
    """Covariances S and 4 S commute: tr(S + 4 S - 2 · 2 S) = tr S."""
    x = random_features(50, 8).double()
    x = x - x.mean(0)
    assert statistics.frechet(x, 2 * x) == pytest.approx(x.T.cov().trace().item(), rel=1e-9)


def test_frechet_agrees_with_the_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    x, y = random_features(300, 16).double(), (random_features(300, 16, 1) * 1.3 + 0.2).double()
    root = linalg.sqrtm((x.T.cov() @ y.T.cov()).numpy()).real
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * root.trace()
    assert statistics.frechet(x, y) == pytest.approx(expected.item(), rel=1e-8)


def test_frechet_agrees_with_torchmetrics():
    fid = import_or_skip("torchmetrics.image.fid").FrechetInceptionDistance

    class Passed(nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1).float()

    x, y = random_images(40, 2), random_images(40, 2, seed=1)
    theirs = fid(feature=Passed(), normalize=False)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    assert statistics.frechet(x.flatten(1), y.flatten(1)) == pytest.approx(theirs.compute().item(), rel=1e-4)


def test_frechet_agrees_with_torch_fidelity():
    fidelity = import_or_skip("torch_fidelity.metric_fid")
    x, y = random_features(200, 32), random_features(200, 32, 1) * 1.2 + 0.1
    observed = fidelity.fid_statistics_to_metric(*map(fidelity.fid_features_to_statistics, (x, y)), False)
    assert statistics.frechet(x, y) == pytest.approx(observed["frechet_inception_distance"], rel=1e-6)


def test_inception_features_have_a_row_for_each_image(monkeypatch, tmp_path):
    """With random weights, as the real ones cannot be had everywhere; what is tested is how the net is called."""
    import_or_skip("torchmetrics.image.fid")
    net = import_or_skip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    monkeypatch.setattr(net, "load_state_dict", lambda *_: None)
    torch.save({}, tmp_path / "w.pth")
    torch.manual_seed(0)
    metric = fid_metric(tmp_path / "w.pth")
    assert isinstance(metric, base.DistributionMetric), metric
    found = metric.features.compute(random_images(2))
    assert (metric.name, found.shape) == ("FID", (2, 2048))
    torch.manual_seed(0)  # the same random weights
    theirs = import_or_skip("torchmetrics.image.fid").FrechetInceptionDistance(
        feature_extractor_weights_path=tmp_path / "w.pth"
    )
    assert torch.allclose(found, theirs.inception(random_images(2)), rtol=1e-4, atol=1e-6)  # antialiased, from 0 to 255


def test_distribution_metrics_increase_with_noise_and_ignore_order_and_batch():
    a = nn.functional.avg_pool2d(random_images(40, size=32).float(), 9, 1, 4).byte()
    noise = random_features(a.numel(), 1).view(a.shape)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))

    class Looking(ToyClassifier):
        """At a few pixels: noise cancels out of a mean."""

        def features(self, images):
            return images[:, :, ::8, ::8].flatten(1)

    classifier = Looking()
    for metric in (demo_classifier.fd_demo(classifier, CPU), demo_classifier.kd_demo(classifier, CPU)):
        x = metric.features.compute(a)
        far = [metric.features.compute((a + sigma * noise).clamp(0, 255).byte()) for sigma in (20, 60, 180)]
        distances = [metric.distance(x, y) for y in far]
        assert 0 < distances[0] < distances[1] < distances[2], metric.name
        assert metric.distance(x[order], far[2][order]) == pytest.approx(distances[2], rel=1e-9)
        alone = torch.cat([metric.features.compute(image) for image in a.split(1)])
        assert torch.allclose(alone, x, rtol=1e-6), metric.name


def test_kernel_distance_agrees_with_its_formula():
    """KID's U-statistic, term by term."""
    x, y = random_features(5, 3).double(), random_features(5, 3, 1).double()

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    terms = [
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(y[i], x[j]) for i in range(5) for j in range(5) if i != j
    ]
    assert statistics.kernel_distance(x, y) == pytest.approx(sum(terms) / 20, rel=1e-12)


def test_kernel_distance_is_zero_on_equal_sets_and_increases():
    """The estimator for independent sets gives -0.0003 for equal ones: it takes pairs for luck."""
    x = random_features(600, 8)  # more than one block of rows
    assert statistics.kernel_distance(x, x) == 0
    far = [statistics.kernel_distance(x, x + shift) for shift in (0.1, 0.3, 1.0)]
    assert 0 < far[0] < far[1] < far[2]
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    assert statistics.kernel_distance(x[order], x[order] + 0.3) == pytest.approx(far[1], rel=1e-9)


def test_nan_features_have_no_distance_and_are_reported():
    """Eigenvalues of NaN are an error, after everything was generated."""
    x = random_features(6, 3).double()
    broken = torch.where(torch.arange(6)[:, None] == 2, torch.nan, x)
    for metric in (demo_classifier.fd_demo(ToyClassifier(), CPU), demo_classifier.kd_demo(ToyClassifier(), CPU)):
        for pair in ((x, broken), (broken, x)):
            figure = summary.distance_ci(metric, *pair, ["a", "b", "c"] * 2)
            assert (figure["value"], figure["low"], figure["nan"]) == (None, None, 1)
            assert tables.short(figure, 3) == "– (1 NaN)"
