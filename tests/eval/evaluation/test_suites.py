"""Suites are parsed, can be overridden, and all their methods generate different images."""

from __future__ import annotations

from pathlib import Path

import pytest
from eval_run import rows

from eval import run as run_module
from eval import suites
from eval.common import files
from eval.evaluation import options as options_module
from eval.evaluation import prepare
from eval.methods import registry as methods
from eval.metrics import registry as metrics


@pytest.mark.parametrize("name", suites.NAMES)
def test_command_line_overrides_suite_options(name):
    options = options_module.parse(["--suite", name, "--steps", "3"])
    content = suites.load(name)
    assert options.steps == 3
    assert options.method == content["method"]
    methods.parse(options.method, [0.5])
    unknown = content.keys() - vars(options_module.parse([])).keys() - {"about"}
    assert not unknown
    metrics.parse_metric_names(options.metrics, metrics.Nets())
    assert len({m.slug for m in methods.parse(options.method, [0.5])}) == options.method.count(",") + 1


@pytest.mark.parametrize("name", ["depth", "modes"])
def test_all_methods_of_a_suite_generate_different_images(command, deep, monkeypatch, name):
    """With as many blocks as Stable Diffusion has. The paper's suite runs on a stand-in, in speed/test_stand_in.py."""
    monkeypatch.setattr(prepare, "load_model", lambda *_: (deep, None))
    assert run_module.main([*command, "--suite", name, "--limit", "2", "--out", "out"]) == 0
    found = rows(files.read_json(Path("out/results.json")))
    assert {"baseline", "baseline-other-seeds"} < found.keys()
    assert len(found) == 2 + suites.load(name)["method"].count(",")
    figures = [row["metrics"]["PSNR"]["value"] for row in found.values()]
    assert len(set(figures)) == len(found)
