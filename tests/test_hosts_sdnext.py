"""The web UIs' script in SD.Next: patches the diffusers pipeline of a request, and leaves nothing behind."""

from __future__ import annotations

import importlib
import sys

import pytest
import tiny
import torch
import webui_host

import tofu_sd
from tofu_sd.recipes import FAITHFUL

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
    for options in ({"ratio": 0.25}, {"levels": 2}, {"match_every": 2}, {"start_percent": 0.5}, {"grid_seed": 3}):
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
    assert next(iter(p.comments)) == "Token Fusion: hires_ratio does not count here; both passes have ratio 0.25."
    assert "ToFu hires ratio: 0.25" in webui_host.saved(p)
    _, p = program.draw([{"ratio": 0.25, "hires_ratio": 0.25}], enable_hr=True)
    assert not p.comments


def test_what_cannot_be_done_is_told_and_the_image_made_without_it(program):
    plain, _ = program.draw(off(program))
    found, p = program.draw([{"ratio": 0.9}])
    assert torch.equal(found, plain)
    assert "ratio is 0.9; it must lie between 0 and 0.75" in next(iter(p.comments))


def test_a_pipeline_without_a_unet_is_refused_in_words(program):
    class Transformers:
        transformer = torch.nn.Linear(2, 2)

    program.sd_model = Transformers()
    _, p = program.draw([{}], interrupted=True)
    assert "has no `unet`: token fusion acts on" in next(iter(p.comments))
    assert not p.extra_generation_params
