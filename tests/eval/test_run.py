"""The main job from end to end on a tiny pipeline: what it measures and prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from eval_run import PROMPTS, rows

from eval import run as run_module
from eval.common import files
from eval.evaluation import prepare
from eval.reporting import results as results_module
from eval.reporting import tables
from tofu_sd.demo.models import SCENES


def test_class_accuracy_is_measured_for_demo_prompts(command, monkeypatch, pipe):
    from tofu_sd.demo.classifier import DemoClassifier

    monkeypatch.setattr(prepare, "load_model", lambda *_: (pipe, DemoClassifier().eval()))
    assert run_module.main([*command, "--prompts", "demo", "--limit", "2", "--method", "tofu", "--out", "out"]) == 0
    for row in files.read_json(Path("out/results.json"))["rows"]:
        assert row["metrics"]["class accuracy"]["n"] == 2


def test_limit_is_shown_with_the_results(command):
    assert run_module.main([*command, "--limit", "2", "--out", "out"]) == 0
    found = files.read_json(Path("out/results.json"))
    assert (found["settings"]["n"], found["settings"]["of"]) == (2, len(PROMPTS))
    assert "2 images of 5" in tables.run_header(found)


def test_json_keeps_stdout_for_the_results(command, capsys, monkeypatch):
    draw = results_module.write_report
    monkeypatch.setattr(results_module, "write_report", lambda out: (print("a library that talks"), draw(out)))
    assert run_module.main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"][1]["method"] == "tofu"
    assert "a library that talks" in printed.err
    (out,) = Path("runs").iterdir()  # the folder that is taken where none is given
    assert json.loads(printed.out) == files.read_json(out / "results.json")


@pytest.mark.skipif(not SCENES.is_available, reason="the embedded model has no weights here")
def test_embedded_model_is_measured_by_the_demo_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--limit", "2", "--steps", "3", "--metrics", "psnr,ms-ssim,demo-classifier", "--out", "out"]
    assert run_module.main([*arguments, "--method", "tofu"]) == 0
    found = rows(files.read_json(Path("out/results.json")))
    assert set(found["baseline"]["metrics"]) == {"class accuracy"}
    assert set(found["tofu-r50"]["metrics"]) == {"class accuracy", "PSNR", "MS-SSIM", "PD-demo", "FD-demo"}
    assert found["tofu-r50"]["metrics"]["PSNR"]["value"] > 20  # the same image, nearly; other seeds give about 10


def test_progress_is_shown(command, capsys):
    assert run_module.main([*command, "--method", "tofu", "--out", "out"]) == 0
    output = capsys.readouterr().err
    assert re.search(r"10/10 \[\d+:\d+<00:00, .*(img/s|s/img)\]", output)  # done, of, time, what is left, rate
