"""The web UIs' script in SD.Next: patches the diffusers pipeline of a request, and leaves nothing behind.

In a stand-in; SDNEXT=/folder/of/it pytest tests/hosts/test_sdnext.py draws in the program's own code too.
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
HELPERS = ROOT / "tests" / "helpers"
MODULE = "tofu_sd.hosts.webui"


@pytest.fixture
def program(monkeypatch):
    modules = webui_host.install(monkeypatch, forge=False)
    monkeypatch.delattr(webui_host.Script, "process_before_every_sampling")  # which SD.Next does not have
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


def test_a_request_is_merged_as_the_package_merges_and_nothing_is_left(program):
    before, (plain, p) = state(program), program.draw(off(program))
    assert not p.comments
    assert not p.extra_generation_params
    found, p = program.draw([{"early": "mean", "late": "mean", "proportional": True, "window": 8}])
    assert not p.comments
    assert webui_host.saved(p).startswith("ToFu ratio: 0.5, ToFu early: mean, ToFu late: mean")
    assert state(program) == before
    with tofu_sd.patched(program.sd_model, FAITHFUL):
        expected = program.generate()
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert torch.equal(program.draw(off(program))[0], plain)


def test_every_option_acts(program):
    plain, _ = program.draw([{}])
    for options in ({"ratio": 0.25}, {"levels": 2}, {"match_interval": 2}, {"start_percent": 0.5}, {"grid_seed": 3}):
        assert not torch.equal(program.draw([options])[0], plain), options


@pytest.mark.parametrize("then", ["off", "on"])
def test_an_image_that_is_interrupted_leaves_nothing_to_the_next(program, then):
    expected, _ = program.draw([{"ratio": 0.25}] if then == "on" else off(program))
    program.draw([{"ratio": 0.75}], interrupted=True)
    other = program.host.TokenFusionScript()  # of the other tab
    other.ui(is_img2img=True)
    program.script = other
    assert torch.equal(program.draw([{"ratio": 0.25}] if then == "on" else off(program))[0], expected)


@pytest.mark.parametrize("method", ["ToMe", "ToDo"])
@pytest.mark.parametrize("where", ["request", "settings"])
def test_beside_the_built_in_merging_nothing_is_merged_twice(program, method, where):
    plain, _ = program.draw(off(program))
    told = {"token_merging_method": method, f"{method.lower()}_ratio": 0.3}
    if where == "settings":
        vars(program.modules["modules.shared"].opts).update(told)
    found, p = program.draw([{}], **(told if where == "request" else {}))
    assert torch.equal(found, plain)
    assert f"the built-in {method} is on, at 0.3" in next(iter(p.comments))
    assert not p.extra_generation_params
    vars(program.modules["modules.shared"].opts).update(dict.fromkeys(told))


def test_both_passes_have_one_ratio_and_that_is_said(program):
    _, p = program.draw([{"ratio": 0.25, "hires_ratio": 0.5}], enable_hr=True)
    assert next(iter(p.comments)) == "Token Fusion: hires_ratio is ignored here; both passes have ratio 0.25."
    assert "ToFu hires ratio: 0.25" in webui_host.saved(p)
    _, p = program.draw([{"ratio": 0.25, "hires_ratio": 0.25}], enable_hr=True)
    assert not p.comments


def test_what_cannot_be_done_is_told_and_the_image_made_without_it(program):
    plain, _ = program.draw(off(program))
    found, p = program.draw([{"ratio": 0.9}])
    assert torch.equal(found, plain)
    assert "ratio is 0.9; it must be a number from 0 to 0.75" in next(iter(p.comments))
    assert program.processed.comments == next(iter(p.comments))  # below the image


def test_below_the_image_stands_what_was_said_of_it_and_nothing_else(program):
    program.draw([{}], comments={"another script's": 1})
    assert program.processed.comments == ""
    _, p = program.draw([{"ratio": 0.25, "hires_ratio": 0.5}], enable_hr=True, comments={"another script's": 1})
    assert len(p.comments) == 2
    assert program.processed.comments.startswith("Token Fusion: hires_ratio is ignored here")
    assert "another" not in program.processed.comments


def test_an_axis_of_its_grids_sets_an_option_and_switches_it_on(program, monkeypatch):
    """Both grids read their axes from one module, which has more kinds of axes than they import."""
    axes = types.ModuleType("scripts.xyz.xyz_grid_classes")
    axes.axis_options, axes.AxisOption = [], webui_host.AxisOption
    monkeypatch.setitem(sys.modules, axes.__name__, axes)
    for name in ("xyz_grid.py", "xyz_grid_on.py"):
        grid = types.SimpleNamespace(axis_options=axes.axis_options, AxisOption=axes.AxisOption)
        script = types.SimpleNamespace(script_class=type("Script", (), {"__module__": name}), module=grid)
        program.modules["modules.scripts"].scripts_data.append(script)
    program.host.add_axes()
    program.host.add_axes()  # the screen is built again
    found = {axis.label: axis for axis in axes.axis_options}
    assert len(found) == len(axes.axis_options) == len(program.host.INPUTS) - 1
    assert "[ToFu] Hires ratio" not in found  # both passes have one
    whole = webui_host.Processing(program)
    plain, _ = program.draw(off(program), p=webui_host.cell(whole))
    for ratio in (0.25, 0.0):
        cell = webui_host.cell(whole)
        found["[ToFu] Ratio"].apply(cell, ratio, None)
        image, _ = program.draw(off(program), p=cell)
        assert torch.equal(image, program.draw([{"ratio": ratio}])[0])
        assert torch.equal(image, plain) == (ratio == 0)
    with pytest.raises(ValueError, match=r"ratio is 0\.8"):
        found["[ToFu] Ratio"].confirm(None, [0.25, 0.8])


def test_a_pipeline_without_a_unet_is_refused_in_words(program):
    class Transformers:
        transformer = torch.nn.Linear(2, 2)

    program.sd_model = Transformers()
    _, p = program.draw([{}], interrupted=True)
    assert "has no `unet`: token fusion patches" in next(iter(p.comments))
    assert not p.extra_generation_params


# --- in the program itself --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """SDNEXT=/folder/of/it, by SDNEXT_PYTHON if its packages are another environment's."""
    folder, python = os.environ.get("SDNEXT"), os.environ.get("SDNEXT_PYTHON", sys.executable)
    if not folder:
        pytest.skip("SDNEXT names no checkout of SD.Next")
    ran = subprocess.run(
        [python, str(HELPERS / "sdnext_run.py"), str(tmp_path_factory.mktemp("sdnext"))], cwd=folder, text=True,
        capture_output=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def pictures(drawn, name):
    return drawn["drawn"][name]["pictures"]


def test_in_sdnext_the_screen_shows_all_fields_and_their_axes(drawn):
    assert drawn["shown"] == 16
    assert sum(axis.startswith("[ToFu] ") for axis in drawn["axes"]) == 14


def test_in_sdnext_it_draws_with_it_and_without_it(drawn):
    for same in ("off again", "ratio 0", "off after it", "off at last"):
        assert pictures(drawn, same) == pictures(drawn, "off")
    assert pictures(drawn, "interrupted") == []
    different = [tuple(pictures(drawn, name)) for name in ("off", "on", "quarter", "faithful", "keys")]
    assert len(set(different)) == 5
    assert drawn["nothing is left"] is True
    assert "ToFu" not in drawn["drawn"]["off"]["saved"]
    assert "ToFu ratio: 0.5, ToFu early: mean, ToFu late: mean" in drawn["drawn"]["faithful"]["saved"]


def test_in_sdnext_what_cannot_be_done_stands_below_the_picture(drawn):
    told = drawn["drawn"]["out of range"]
    assert told["pictures"] == pictures(drawn, "off")
    assert told["below"].startswith("Token Fusion: ratio is 0.9; it must be a number from")
    assert not drawn["drawn"]["on"]["below"]
    assert pictures(drawn, "both") == pictures(drawn, "built-in")
    assert "the built-in ToMe is on, at 0.3" in drawn["drawn"]["both"]["below"]


def test_in_sdnext_a_grid_draws_what_the_fields_draw(drawn):
    _, *cells = pictures(drawn, "grid")
    assert cells == [pictures(drawn, name)[0] for name in ("off", "quarter", "on")]
    _, *cells = pictures(drawn, "grid of words")
    assert cells == [pictures(drawn, name)[0] for name in ("on", "keys")]
    assert len(pictures(drawn, "grid out of range")) == 1  # no grid
