"""Images are scored with the model's metrics, each value once; values that are not finite are reported."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from eval_run import rows
from metric_inputs import random_images

from eval import EvalError
from eval import run as run_module
from eval.common import files
from eval.images import generate
from eval.images import requests as requests_module
from eval.methods import registry as methods
from eval.metrics import base, cache, score, statistics


def test_missing_images_are_named(command):
    assert run_module.main([*command, "--out", "out"]) == 0
    settings = generate.Settings(**files.read_json(Path("out/settings.json")))
    requests = requests_module.load_requests(command[-1])
    for folder, id in (("tofu-r50", "0002"), ("baseline", "0001")):
        (Path("out") / folder / f"{id}.png").unlink()
        with pytest.raises(EvalError, match=rf"{folder} lacks {id}\.png"):
            score.score(Path("out"), settings, requests, methods.parse("tofu", [0.5]), [])


def test_cached_metrics_need_no_images(command, monkeypatch):
    assert run_module.main([*command, "--out", "out"]) == 0
    found = Path("out/results.json").read_text()
    read = []
    monkeypatch.setattr(score, "load", lambda *what: read.append(what))
    assert run_module.main([*command, "--out", "out"]) == 0
    again = Path("out/results.json").read_text()
    assert json.loads(again)["rows"] == json.loads(found)["rows"]
    assert read == []


def test_metric_cache_of_the_reference_is_used(command, monkeypatch):
    assert run_module.main([*command, "--method", "baseline", "--metrics", "psnr", "--out", "first"]) == 0
    seen = []
    load = score.load
    monkeypatch.setattr(score, "load", lambda folder, requests: seen.append(folder.name) or load(folder, requests))
    asked = ["--method", "baseline", "--metrics", "psnr", "--reference", "first", "--out", "second"]
    assert run_module.main([*command, *asked]) == 0
    assert seen == []


def test_intervals_resample_classes(command):
    """Three images of a prompt are generated together: by images, the interval would be another."""
    assert (
        run_module.main([*command, "--method", "tofu", "--per-prompt", "3", "--metrics", "psnr", "--out", "out"]) == 0
    )
    with Path("out/per_image.csv").open(encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["key"] == "tofu-r50"]
    values = torch.tensor([float(line["PSNR"]) for line in lines], dtype=torch.float64)
    figure = rows(files.read_json(Path("out/results.json")))["tofu-r50"]["metrics"]["PSNR"]
    assert (figure["low"], figure["high"]) == statistics.bootstrap(values, [line["prompt"] for line in lines])
    assert (figure["low"], figure["high"]) != statistics.bootstrap(values, [line["id"] for line in lines])


def test_image_of_one_colour_is_flat():
    shown = random_images(3)
    shown[1] = torch.tensor([200, 60, 20], dtype=torch.uint8).view(3, 1, 1)
    shown[2] = 7
    assert base.is_flat(shown).tolist() == [False, True, True]


def test_metric_cache_is_invalidated_by_its_dependencies(tmp_path, monkeypatch):
    computed = []

    def figure(name, value):
        return lambda: computed.append(name) or torch.tensor([value])

    def recall(content, **values):
        return {k: v.item() for k, v in cache.cached_metrics(
            tmp_path, content, {name: figure(name, value) for name, value in values.items()}).items()}  # fmt: skip

    assert recall(["a", "b"], psnr=1.0) == {"psnr": 1}
    assert recall(["a", "b"], psnr=9.0) == {"psnr": 1}
    assert recall(["a", "b"], psnr=9.0, lpips=2.0) == {"psnr": 1, "lpips": 2}
    assert recall(["b", "a"], psnr=3.0) == {"psnr": 3}  # other images, or the same the other way round
    assert computed == ["psnr", "lpips", "psnr"]
    monkeypatch.setattr(cache, "_versions", lambda: ["another torch"])
    assert recall(["a", "b"], psnr=4.0) == {"psnr": 4}


def test_metric_cache_depends_on_the_demo_classifier_and_its_code(monkeypatch):
    cache._versions.cache_clear()
    before = cache._versions()
    for module in ("eval.metrics.cache", "tofu_sd.demo.classifier"):
        cache._versions.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module(module), "__file__", __file__)
            assert cache._versions() != before
    cache._versions.cache_clear()


def test_corrupt_metric_cache_is_recomputed(tmp_path):
    cache.cached_metrics(tmp_path, ["a"], {"psnr": lambda: torch.tensor([1.0])})
    [file] = (tmp_path / cache.FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert cache.cached_metrics(tmp_path, ["a"], {"psnr": lambda: torch.tensor([2.0])})["psnr"].item() == 2
    assert cache.cached_metrics(tmp_path, ["a"], {"psnr": lambda: torch.tensor([3.0])})["psnr"].item() == 2
