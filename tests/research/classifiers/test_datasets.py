"""Image folders and scenes: their keys, classes and noise."""

from __future__ import annotations

import pytest
import torch
from classifier_run import SHADES

pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")

from eval import EvalError
from research.classifiers import datasets as labelled
from research.classifiers import predictions
from research.demo_training.renders.scenes import render
from tofu_sd.demo.scene_classes import CLASSES


def test_key_depends_on_image_content(tmp_path):
    keys = set()
    for name, shade in (("a", 0), ("b", 0), ("c", 255)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "0.ppm"
        file.write_bytes(b"P6 1 1 255\n" + bytes([shade] * 3))
        keys.add(labelled.key_of([file], tmp_path / name))
    assert len(keys) == 2


def test_key_of_many_images_reads_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "READ", 30)
    files = [tmp_path / f"{i}.ppm" for i in range(9)]  # ten bytes each: every third file is read
    for file in files:
        file.write_bytes(b"0123456789")
    key = labelled.key_of(files, tmp_path)
    files[1].write_bytes(b"9876543210")
    assert labelled.key_of(files, tmp_path) == key
    files[3].write_bytes(b"9876543210")
    assert labelled.key_of(files, tmp_path) != key


def test_scenes_are_cached_and_interleave_classes(tmp_path, monkeypatch):
    data = labelled.rendered(8, 2, 70, cache=tmp_path)
    assert len(data) == 2 * len(CLASSES)
    assert data.labels[:3] == [0, 1, 2]
    image, label = data.images[97]
    assert label == 1
    assert torch.allclose(image, render([CLASSES[1]], [70 + 97], 8)[0], atol=0.5 / 255 + 1e-6)
    monkeypatch.setattr(labelled.scenes, "render", None)  # must not be called again
    again = labelled.rendered(8, 2, 70, cache=tmp_path)
    assert torch.equal(again.images[97][0], image)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_folder_without_classes_raises(tmp_path):
    with pytest.raises(EvalError, match=r"'.*' holds no folder of images for each class"):
        labelled.folder(tmp_path, labelled.plain(8))


def test_noise_is_deterministic_with_its_standard_deviation(images):
    clear = labelled.folder(images / "val", labelled.plain(32))
    noisy = labelled.noisy(clear, 0.1)
    assert noisy.labels == clear.labels
    assert noisy.name == "val, noise 0.1"
    for i in (0, 5):
        assert torch.equal(noisy.images[i][0], noisy.images[i][0])
    assert not torch.equal(noisy.images[0][0] - clear.images[0][0], noisy.images[1][0] - clear.images[1][0])
    middle = [i for i in range(len(clear)) if clear.labels[i] == 2]  # a brightness at which no value is clipped
    apart = torch.stack([noisy.images[i][0] - clear.images[i][0] for i in middle])
    assert apart.std().item() == pytest.approx(0.1, rel=0.02)
    everything = torch.stack([labelled.noisy(clear, 9).images[i][0] for i in range(4)])
    assert everything.min() == 0
    assert everything.max() == 1


def test_calibration_images_are_not_evaluated(images):
    data = labelled.folder(images / "val", labelled.plain(32))

    def held(n, count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(predictions, "CALIBRATION", count)
            batches = predictions.Evaluation(data, n, 5, torch.device("cpu"), images).calibration_batches()
            return torch.cat([labels for _, labels in batches]), torch.cat([shown for shown, _ in batches])

    labels, shown = held(24, 12)
    evaluated = torch.stack([data.images[i][0] for i in range(24)])
    assert len(shown) == 12
    assert len(set(labels.tolist())) > 1
    assert not any(torch.equal(a, b) for a in shown for b in evaluated)
    assert len(held(48, 12)[0]) == 12  # all images are evaluated, so calibration uses them too
    assert len(held(48, 99)[0]) == 48


def test_any_prefix_of_a_folder_has_all_classes(images):
    data = labelled.folder(images / "val", labelled.plain(32))
    assert data.labels[:SHADES] == list(range(SHADES)) == data.labels[SHADES : 2 * SHADES]
    assert sorted(data.labels) == sorted(list(range(SHADES)) * 8)
    assert [data.images[i][1] for i in range(len(data))] == data.labels
