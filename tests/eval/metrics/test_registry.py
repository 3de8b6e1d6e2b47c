"""Metrics are built by name; one that cannot be computed here is skipped alone, with its reason."""

from __future__ import annotations

import io

import pytest
import torch
from eval_run import ToyClassifier
from metric_inputs import fid_metric, import_or_skip, random_images

from eval import EvalError
from eval.metrics import base, demo_classifier, pairwise
from eval.metrics import registry as metrics

CPU = torch.device("cpu")


def test_a_metric_whose_weights_are_missing_is_skipped_with_the_reason(monkeypatch, tmp_path):
    import_or_skip("lpips")
    skipped = pairwise.lpips("squeeze", tmp_path / "nowhere.pth", CPU)
    assert isinstance(skipped, base.Skipped)
    assert "nowhere.pth" in skipped.reason
    assert str(tmp_path) not in skipped.reason  # results carry no path of a machine


def saved(content):
    """The bytes of a file that torch reads, and that holds this."""
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK", saved([]), saved(torch.ones(2))])
def test_broken_weights_skip_only_their_metric(tmp_path, content):
    import_or_skip("lpips")
    import_or_skip("torchmetrics")
    (tmp_path / "w.pth").write_bytes(content)
    for metric in (pairwise.lpips("squeeze", tmp_path / "w.pth", CPU), fid_metric(tmp_path / "w.pth")):
        assert isinstance(metric, base.Skipped), metric
        assert "weights" in metric.reason


def test_metric_that_fails_on_these_images_is_skipped_alone():
    def fails(*_):
        raise RuntimeError("Kernel size can't be greater than actual input size\nmore")

    broken = base.Pairwise("LPIPS-squeeze", "lpips", True, fails)
    skipped, kept = metrics.probe_metrics([broken, pairwise.psnr()], random_images(size=8), ["a", "b"])
    assert skipped == base.Skipped("LPIPS-squeeze", "Kernel size can't be greater than actual input size")
    assert kept.name == "PSNR"


def test_out_of_memory_does_not_skip_a_metric():
    def fails(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        metrics.probe_metrics([base.Pairwise("LPIPS-squeeze", "lpips", True, fails)], random_images(size=8), ["a", "b"])


def test_unknown_metric_suggests_the_nearest_name():
    with pytest.raises(EvalError, match=r"'lpip'.*did you mean 'lpips'"):
        metrics.parse_metric_names("psnr,lpip", metrics.Nets())
    with pytest.raises(EvalError, match=r"'alexnet'.*did you mean 'alex'"):
        metrics.parse_metric_names("all", metrics.Nets(lpips="alexnet"))


def test_metrics_with_the_same_features_compute_them_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(metrics, "inception", lambda *_: loaded.append(1) or base.Features("net", lambda p: p))
    fid, kid = metrics.build_metrics("fid,kid", metrics.Nets(), size=64, prompts=[], device=CPU)
    assert loaded == [1]
    assert fid.features is kid.features
    assert fid.distance is not kid.distance
    classifier = ToyClassifier()
    assert demo_classifier.fd_demo(classifier, CPU).features is demo_classifier.kd_demo(classifier, CPU).features
