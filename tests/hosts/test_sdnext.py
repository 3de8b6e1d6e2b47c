"""The web UI script in SD.Next: it patches the diffusers pipeline of a request and restores it.

It runs in a stand-in. SDNEXT=/folder/of/it pytest tests/hosts/test_sdnext.py also runs it in SD.Next's own code.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
import webui_host

import tofu_sd
from tofu_sd.recipes import FAITHFUL

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests" / "helpers" / "programs"
MODULE = "tofu_sd.hosts.webui"


@pytest.fixture
def program(monkeypatch):
    modules = webui_host.install(monkeypatch, forge=False)
    monkeypatch.delattr(webui_host.Script, "process_before_every_sampling")  # SD.Next has no such hook
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    program = webui_host.PipelineProgram(tiny.sd15_pipe())
    program.modules, program.host = modules, importlib.import_module(MODULE)
    program.script = program.host.TokenFusionScript()
    program.fields = program.script.ui(is_img2img=False)
    yield program
    assert not program.errors
    sys.modules.pop(MODULE, None)


def state(program):
    return [
        (name, type(m), sorted(vars(m)), len(m._forward_pre_hooks)) for name, m in program.sd_model.unet.named_modules()
    ]


def off(program):
    return [field.value for field in program.fields]


def test_request_matches_the_package_and_restores_the_unet(program):
    before, (plain, p) = state(program), program.generate(off(program))
    assert not p.comments
    assert not p.extra_generation_params
    result, p = program.generate([{"early": "mean", "late": "mean", "proportional": True, "window": 8}])
    assert not p.comments
    assert webui_host.saved(p).startswith("ToFu ratio: 0.5, ToFu early: mean, ToFu late: mean")
    assert state(program) == before
    with tofu_sd.patched(program.sd_model, FAITHFUL):
        expected = program.run_pipeline()
    assert torch.equal(result, expected)
    assert not torch.equal(result, plain)
    assert torch.equal(program.generate(off(program))[0], plain)


def test_each_option_changes_the_image(program):
    plain, _ = program.generate([{}])
    for options in ({"ratio": 0.25}, {"levels": 2}, {"match_interval": 2}, {"start_percent": 0.5}, {"grid_seed": 3}):
        assert not torch.equal(program.generate([options])[0], plain), options


@pytest.mark.parametrize("then", ["off", "on"])
def test_interrupted_image_does_not_affect_the_next(program, then):
    expected, _ = program.generate([{"ratio": 0.25}] if then == "on" else off(program))
    program.generate([{"ratio": 0.75}], interrupted=True)
    other = program.host.TokenFusionScript()  # the script of the other tab
    other.ui(is_img2img=True)
    program.script = other
    assert torch.equal(program.generate([{"ratio": 0.25}] if then == "on" else off(program))[0], expected)


@pytest.mark.parametrize("method", ["ToMe", "ToDo"])
@pytest.mark.parametrize("where", ["request", "settings"])
def test_built_in_merging_disables_token_fusion(program, method, where):
    plain, _ = program.generate(off(program))
    settings = {"token_merging_method": method, f"{method.lower()}_ratio": 0.3}
    if where == "settings":
        vars(program.modules["modules.shared"].opts).update(settings)
    result, p = program.generate([{}], **(settings if where == "request" else {}))
    assert torch.equal(result, plain)
    assert f"the built-in {method} is on, at 0.3" in next(iter(p.comments))
    assert not p.extra_generation_params
    vars(program.modules["modules.shared"].opts).update(dict.fromkeys(settings))


def test_hires_ratio_is_ignored_with_a_comment(program):
    _, p = program.generate([{"ratio": 0.25, "hires_ratio": 0.5}], enable_hr=True)
    assert next(iter(p.comments)) == "Token Fusion: hires_ratio is ignored here; both passes have ratio 0.25."
    assert "ToFu hires ratio: 0.25" in webui_host.saved(p)
    _, p = program.generate([{"ratio": 0.25, "hires_ratio": 0.25}], enable_hr=True)
    assert not p.comments


def test_invalid_option_adds_a_comment_and_keeps_the_baseline_image(program):
    plain, _ = program.generate(off(program))
    result, p = program.generate([{"ratio": 0.9}])
    assert torch.equal(result, plain)
    assert "ratio is 0.9; it must be a number from 0 to 0.75" in next(iter(p.comments))
    assert program.processed.comments == next(iter(p.comments))  # below the image


def test_only_token_fusion_comments_are_shown_below_the_image(program):
    program.generate([{}], comments={"another script's": 1})
    assert program.processed.comments == ""
    _, p = program.generate([{"ratio": 0.25, "hires_ratio": 0.5}], enable_hr=True, comments={"another script's": 1})
    assert len(p.comments) == 2
    assert program.processed.comments.startswith("Token Fusion: hires_ratio is ignored here")
    assert "another" not in program.processed.comments


def test_grid_axis_sets_an_option_and_enables_token_fusion(program, monkeypatch):
    """Both grids read their axes from one module, which has more kinds of axes than they import."""
    axes = types.ModuleType("scripts.xyz.xyz_grid_classes")
    axes.axis_options, axes.AxisOption = [], webui_host.AxisOption
    monkeypatch.setitem(sys.modules, axes.__name__, axes)
    for name in ("xyz_grid.py", "xyz_grid_on.py"):
        grid = types.SimpleNamespace(axis_options=axes.axis_options, AxisOption=axes.AxisOption)
        script = types.SimpleNamespace(script_class=type("Script", (), {"__module__": name}), module=grid)
        program.modules["modules.scripts"].scripts_data.append(script)
    program.host.add_axes()
    program.host.add_axes()  # the UI is built again
    added = {axis.label: axis for axis in axes.axis_options}
    assert len(added) == len(axes.axis_options) == len(program.host.INPUTS) - 1
    assert "[ToFu] Hires ratio" not in added  # both passes share one ratio
    whole = webui_host.Processing(program)
    plain, _ = program.generate(off(program), p=webui_host.cell(whole))
    for ratio in (0.25, 0.0):
        cell = webui_host.cell(whole)
        added["[ToFu] Ratio"].apply(cell, ratio, None)
        image, _ = program.generate(off(program), p=cell)
        assert torch.equal(image, program.generate([{"ratio": ratio}])[0])
        assert torch.equal(image, plain) == (ratio == 0)
    with pytest.raises(ValueError, match=r"ratio is 0\.8"):
        added["[ToFu] Ratio"].confirm(None, [0.25, 0.8])


def test_pipeline_without_a_unet_adds_a_comment(program):
    class Transformers:
        transformer = torch.nn.Linear(2, 2)

    program.sd_model = Transformers()
    _, p = program.generate([{}], interrupted=True)
    assert "has no `unet`: token fusion patches" in next(iter(p.comments))
    assert not p.extra_generation_params


# --- in the program itself --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of sdnext_run.py. SDNEXT_PYTHON names the interpreter if its packages are in another environment."""
    folder, python = os.environ.get("SDNEXT"), os.environ.get("SDNEXT_PYTHON", sys.executable)
    if not folder:
        pytest.skip("SDNEXT names no checkout of SD.Next")
    process = subprocess.run(
        [python, str(SCRIPTS / "sdnext_run.py"), str(tmp_path_factory.mktemp("sdnext"))], cwd=folder, text=True,
        capture_output=True, timeout=900,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (SCRIPTS, SCRIPTS.parent))), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def hashes(results, name):
    return results["images"][name]["hashes"]


def test_sdnext_shows_all_fields_and_axes(results):
    assert results["shown"] == 16
    assert sum(axis.startswith("[ToFu] ") for axis in results["axes"]) == 14


def test_sdnext_generates_with_and_without_token_fusion(results):
    for same in ("off again", "ratio 0", "off after it", "off at last"):
        assert hashes(results, same) == hashes(results, "off")
    assert hashes(results, "interrupted") == []
    different = [tuple(hashes(results, name)) for name in ("off", "on", "quarter", "faithful", "keys")]
    assert len(set(different)) == 5
    assert results["restored"] is True
    assert "ToFu" not in results["images"]["off"]["saved"]
    assert "ToFu ratio: 0.5, ToFu early: mean, ToFu late: mean" in results["images"]["faithful"]["saved"]


def test_sdnext_shows_comments_below_the_image(results):
    image = results["images"]["out of range"]
    assert image["hashes"] == hashes(results, "off")
    assert image["below"].startswith("Token Fusion: ratio is 0.9; it must be a number from")
    assert not results["images"]["on"]["below"]
    assert hashes(results, "both") == hashes(results, "built-in")
    assert "the built-in ToMe is on, at 0.3" in results["images"]["both"]["below"]


def test_sdnext_grid_matches_the_fields(results):
    _, *cells = hashes(results, "grid")
    assert cells == [hashes(results, name)[0] for name in ("off", "quarter", "on")]
    _, *cells = hashes(results, "grid of words")
    assert cells == [hashes(results, name)[0] for name in ("on", "keys")]
    assert len(hashes(results, "grid out of range")) == 1  # the grid is not made
