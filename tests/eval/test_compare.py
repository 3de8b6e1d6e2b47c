"""eval.compare compares runs of equal settings and images, and times of one environment only."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from eval_run import rows

from eval import compare as compare_module
from eval import run as run_module
from eval.common import files


def test_compare_shows_the_differences_of_two_runs(command, capsys):
    assert run_module.main([*command, "--method", "tofu,prune", "--out", "a"]) == 0
    assert run_module.main([*command, "--method", "tofu", "--out", "b"]) == 0
    capsys.readouterr()
    assert compare_module.main(["a", "b", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["differences"] == {}
    psnr = next(row for row in content["rows"] if row["figure"] == "PSNR")
    assert psnr["method"] == "tofu 50%"
    assert psnr["a"] == psnr["b"]
    assert psnr["b - a"].startswith("+0.00 (")  # the same images
    assert {row["method"] for row in content["rows"]} == {"tofu 50%"}


def test_compare_refuses_other_images_of_the_same_number(command, capsys):
    assert run_module.main([*command, "--method", "tofu", "--limit", "2", "--per-prompt", "2", "--out", "a"]) == 0
    assert run_module.main([*command, "--method", "tofu", "--limit", "4", "--out", "b"]) == 0
    assert compare_module.main(["a", "b"]) == 2
    assert "a and b cannot be compared: b has no image 0000_1, 0001_1" in capsys.readouterr().err


def test_compare_ignores_times_under_another_driver(command, capsys):
    for out in ("a", "b"):
        assert run_module.main([*command, "--method", "tofu", "--limit", "2", "--out", out]) == 0
    found = files.read_json(Path("b/results.json"))
    (generated,) = found["provenance"]["generated"]
    generated["runtime"] = {"driver": "999.1"}  # measuring was done on the machine of `a`
    generated["commit"], generated["packages"]["tomesd"] = "abc", "9"
    files.write_json(Path("b/results.json"), found)
    capsys.readouterr()
    assert compare_module.main(["a", "b", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["differences"]["driver"] == [None, "999.1"]
    assert content["differences"]["commit"][1] == "abc"
    assert content["differences"]["tomesd"][1] == "9"
    for figure in ("speed-up", "s/image"):
        row = next(row for row in content["rows"] if row["figure"] == figure)
        assert re.fullmatch(r"\d+\.\d+×? \(\d+\.\d+–\d+\.\d+\)", row["a"])
        assert row["b"] == "n/a: other environment"


def test_compare_ignores_times_without_the_baseline(command, capsys):
    assert run_module.main([*command, "--method", "tofu", "--limit", "2", "--out", "a"]) == 0
    found = files.read_json(Path("a/results.json"))

    def shown():
        files.write_json(Path("a/results.json"), found)
        capsys.readouterr()
        assert compare_module.main(["a", "a", "--json"]) == 0
        content = json.loads(capsys.readouterr().out)["rows"]
        return {row["figure"]: (row["a"], row["b"], row["b - a"]) for row in content}

    rows(found)["tofu-r50"]["same_run"] = False
    assert shown()["s/image"] == ("–", "–", "–")
    assert "×" in shown()["speed-up"][0]
    rows(found)["tofu-r50"]["speedup"] = None
    assert shown()["speed-up"] == shown()["s/image"] == ("–", "–", "–")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--steps", "2"], "a and b cannot be compared: steps is 1 in one, 2 in the other"),
        (["--limit", "3"], "a and b cannot be compared: n is 5 in one, 3 in the other"),
        (["--seed", "4"], "a and b cannot be compared: seed is 0 in one, 4 in the other"),
        (["--method", "prune"], "a and b have no method in common"),
    ],
)
def test_compare_refuses_other_settings(command, capsys, change, said):
    assert run_module.main([*command, "--method", "tofu", "--out", "a"]) == 0
    assert run_module.main([*command, "--method", "tofu", "--out", "b", *change]) == 0
    assert compare_module.main(["a", "b"]) == 2
    assert said in capsys.readouterr().err


def test_compare_names_another_dtype(command, capsys):
    """Other weights follow from it, and are not what to look for."""
    assert run_module.main([*command, "--method", "tofu", "--limit", "2", "--out", "a"]) == 0
    assert run_module.main([*command, "--method", "tofu", "--limit", "2", "--out", "b"]) == 0
    found = files.read_json(Path("b/results.json"))
    found["settings"] |= {"dtype": "float16", "pipeline": "another hash"}
    files.write_json(Path("b/results.json"), found)
    assert compare_module.main(["a", "b"]) == 2
    assert "cannot be compared: dtype is 'float32' in one, 'float16' in the other" in capsys.readouterr().err


def test_compare_names_other_versions_and_ignores_their_times(command, capsys):
    for out in ("a", "b"):
        assert run_module.main([*command, "--method", "tofu", "--out", out]) == 0
    found = files.read_json(Path("b/results.json"))
    found["settings"]["torch"] = "9.9"
    files.write_json(Path("b/results.json"), found)
    capsys.readouterr()
    assert compare_module.main(["a", "b"]) == 0
    printed = capsys.readouterr().out
    assert f"torch: {torch.__version__} in a, 9.9 in b" in printed
    assert "PSNR: float64, peak 255, dB" in printed
    assert "n/a: other environment" in printed
    for row in found["rows"]:
        row["seconds"] = None
    files.write_json(Path("b/results.json"), {**found, "settings": files.read_json(Path("a/results.json"))["settings"]})
    assert compare_module.main(["b", "a"]) == 0
    capsys.readouterr()
    found["metrics"][0]["implementation"] = "by hand"
    files.write_json(Path("b/results.json"), found)
    assert compare_module.main(["a", "b"]) == 2
    assert "PSNR is measured by float64, peak 255, dB in one, by by hand in the other" in capsys.readouterr().err


def test_missing_folders_are_named_first_and_second(capsys):
    for arguments, said in (([], "FIRST, SECOND"), (["one"], "SECOND")):
        assert compare_module.main(arguments) == 2
        assert f"the following arguments are required: {said}" in capsys.readouterr().err
