"""The script for AUTOMATIC1111 and Forge: fuses where it is asked to, says what it did, and leaves nothing behind."""

from __future__ import annotations

import copy
import importlib
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
import webui_host
from patcher_host import ForgePatcher, PlainBlock, UNetModel, attention

from tofu_sd import TokenFusionConfig
from tofu_sd.hosts import ldm
from tofu_sd.hosts.programs.model_patcher import patch_model
from tofu_sd.hosts.programs.ui_options import config_of
from tofu_sd.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tofu_sd.hosts.webui"
NAMES = [
    "ratio", "hires_ratio", "early", "late", "depth_split", "proportional", "kv_only", "levels", "start_percent",
    "end_percent", "grid_seed", "window", "match_interval", "share_across_blocks", "min_tokens",
]  # fmt: skip
FAITHFUL = {"early": "mean", "late": "mean", "proportional": True, "window": 2}


@pytest.fixture(scope="module")
def unet():
    return tiny.sd15_unet()


@pytest.fixture(params=["AUTOMATIC1111", "Forge"])
def program(request, unet, monkeypatch):
    """A program whose script is ready; program.host is the script's module, program.modules what it has imported."""
    forge = request.param == "Forge"
    modules = webui_host.install(monkeypatch, forge)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    program = webui_host.Program(unet, forge)
    program.modules, program.host = modules, importlib.import_module(MODULE)
    program.script = program.host.TokenFusionScript()
    program.fields = program.script.ui(is_img2img=False)
    yield program
    assert not program.errors
    sys.modules.pop(MODULE, None)


def args(program, **options):
    """What the program passes to the script when a person has set these fields and switched it on."""
    values = [field.value for field in program.fields]
    return [True, *(options.get(name, value) for name, value in zip(NAMES, values[1:], strict=True))]


def off(program):
    return [field.value for field in program.fields]


@pytest.mark.parametrize("options", [{}, FAITHFUL, {"ratio": 0.25, "start_percent": 0.4}])
def test_it_fuses_as_the_adapters_do_and_leaves_nothing_behind(program, options):
    before, (full, _) = webui_host.state(program), program.draw(off(program))
    found, p = program.draw(args(program, **options))
    told = {name.removesuffix("_percent"): value for name, value in options.items()}
    fusion = TokenFusionConfig.of(told.pop("ratio", 0.5), **told)
    if program.forge:
        beside = webui_host.Program(program.model.unet, forge=True)
        beside.script = types.SimpleNamespace(process=lambda p: None, process_before_every_sampling=lambda p, **m: None)
        beside.patcher, _ = patch_model(
            beside.patcher, fusion, lambda q, k, v, h, o: attention(q, k, v, h, o), lambda percent: 10 * (1 - percent)
        )
        expected, _ = beside.draw([])
    else:
        ldm.apply(program.model, fusion)
        expected, _ = program.draw(off(program))
        ldm.restore(program.model)
    assert torch.equal(found, expected)
    assert (found - full).abs().max() > 1e-3
    assert not p.comments
    assert webui_host.state(program) == before
    assert torch.equal(program.draw(off(program))[0], full)


def test_switched_off_or_at_ratio_zero_it_is_not_there(program):
    """Nor without any argument, as Forge Neo draws what is asked of it while it still starts."""
    full, p = program.draw(off(program))
    assert not p.extra_generation_params
    bare, p = program.draw([])
    assert torch.equal(bare, full)
    assert not p.extra_generation_params
    assert not p.comments
    assert torch.equal(program.draw(args(program, ratio=0))[0], full)


@pytest.mark.parametrize("hires", [False, True])
def test_a_sampling_that_is_interrupted_leaves_nothing_behind(program, hires):
    before, (full, _) = webui_host.state(program), program.draw(off(program))
    p = webui_host.Processing(program, enable_hr=True, fails_at=(hires, 500.0))
    with pytest.raises(InterruptedError):
        program.draw(args(program), p=p)
    assert p.is_hr_pass is hires
    assert webui_host.state(program) == before
    assert torch.equal(program.draw(off(program))[0], full)


def test_a_sampler_that_is_used_again_is_fused_once_and_then_no_more(program):
    once, p = program.draw(args(program))
    again, _ = program.draw(args(program), batches=3)
    assert torch.equal(once, again)
    if not program.forge:
        assert not isinstance(p.sampler.launch_sampling.launch, program.host.PatchedSampling)
        program.script.process_before_every_sampling(p, *off(program))
        assert p.sampler.launch_sampling == types.MethodType(webui_host.Sampler.launch_sampling, p.sampler)


@pytest.mark.parametrize("options", [{}, FAITHFUL])
def test_both_passes_are_fused_and_said_to_be(program, options):
    full, _ = program.draw(off(program), enable_hr=True)
    second, p = program.draw(args(program, ratio=0, **options), enable_hr=True)
    both, p = program.draw(args(program, **options), enable_hr=True)
    assert len({tensor.sum().item() for tensor in (full, second, both)}) == 3
    assert not p.comments
    assert "ToFu ratio: 0.5, ToFu hires ratio: 0.5" in webui_host.saved(p)


def test_the_second_pass_has_a_ratio_of_its_own(program):
    full, _ = program.draw(off(program), enable_hr=True)
    neither, _ = program.draw(args(program, ratio=0, hires_ratio=0), enable_hr=True)
    first, _ = program.draw(args(program, ratio=0.5, hires_ratio=0), enable_hr=True)
    second, p = program.draw(args(program, ratio=0, hires_ratio=0.5), enable_hr=True)
    assert torch.equal(neither, full)
    assert len({tensor.sum().item() for tensor in (full, first, second)}) == 3
    assert "ToFu hires ratio: 0.5" in webui_host.saved(p)
    assert "hires" not in webui_host.saved(program.draw(args(program))[1])


# --- what is saved, pasted and requested ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, FAITHFUL, {"hires_ratio": 0.25, "grid_seed": 7, "kv_only": True, "end_percent": 0.6, "levels": 2}]
)
def test_what_is_saved_with_a_picture_can_be_pasted_and_draws_it_again(program, options):
    found, p = program.draw(args(program, **options), enable_hr=True)
    text = webui_host.saved(p)
    assert text.startswith("ToFu ratio: 0.5")
    pasted = webui_host.paste(program.script, "Steps: 20, " + text)
    assert len(pasted) == len(program.fields)  # each field is set: a default is not what a person had there
    again, _ = program.draw([pasted[field.label] for field in program.fields], enable_hr=True)
    assert torch.equal(found, again)


def test_a_picture_without_it_switches_it_off_and_leaves_the_fields_alone(program):
    assert webui_host.paste(program.script, "Steps: 20, Sampler: Euler") == {"Token Fusion (ToFu)": False}


def test_of_one_pass_the_ratio_of_the_other_is_left_alone(program):
    assert "Hires ratio" not in webui_host.paste(program.script, "ToFu ratio: 0.25")


def test_parameters_of_the_picture_before_are_not_saved_with_the_next(program):
    _, p = program.draw(args(program, window=8))
    assert "ToFu window: 8" in webui_host.saved(p)
    program.draw(args(program), p=p)
    assert "window" not in webui_host.saved(p)
    program.draw(off(program), p=p)
    assert webui_host.saved(p) == ""


def test_a_name_that_this_version_does_not_know_is_not_pasted(program):
    assert "Early" not in webui_host.paste(program.script, "ToFu ratio: 0.5, ToFu early: median, ToFu late: mean")


def test_requests_give_the_options_in_this_order(program):
    """A promise to every program that sends requests: new options come at the end."""
    assert [option.name for option in program.host.INPUTS] == NAMES
    page = (ROOT / "docs" / "webui.md").read_text().partition("only at the end:")[2].partition(". Omitted")[0]
    assert re.findall(r"`(\w+)`", page) == ["enabled", *NAMES]
    assert [field.label for field in program.fields[1:]] == [n.replace("_", " ").capitalize() for n in NAMES]


def test_a_request_can_name_the_options(program):
    by_place, _ = program.draw(args(program, **FAITHFUL))
    rest = off(program)[1:]
    by_name, _ = program.draw([FAITHFUL, *rest])
    assert torch.equal(by_place, by_name)
    for switch in (False, "false", 0):
        assert torch.equal(program.draw([{**FAITHFUL, "enabled": switch}, *rest])[0], program.draw(off(program))[0])
    unset, _ = program.draw([True, *[None] * len(rest)])
    assert torch.equal(unset, program.draw(args(program))[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0.9}, "ratio is 0.9; it must be a number from 0 to 0.75"),
        ({"hires_ratio": 2}, "hires_ratio is 2.0; it must be a number from 0 to 0.75"),
        ({"ratio": "half"}, "ratio is 'half'; it must be a number"),
        ({"levels": 1.5}, "levels is 1.5; it must be an integer"),
        ({"kv_only": "perhaps"}, "kv_only is 'perhaps'; it must be true or false"),
        ({"early": "average"}, "unknown reduction 'average'"),
        ({"start_percent": 0.8, "end_percent": 0.2}, "start must come before end"),
        ({"hire_ratio": 0.5}, "unknown option 'hire_ratio' (did you mean 'hires_ratio'?)"),
    ],
)
def test_what_cannot_be_done_is_told_once_and_the_picture_made_without_it(program, options, said, caplog):
    full, _ = program.draw(off(program), enable_hr=True)
    found, p = program.draw([options], enable_hr=True)
    (comment,) = p.comments
    assert said in comment
    assert comment.endswith("The image is generated without it.")
    assert caplog.text.count(said) == 1
    assert not p.extra_generation_params
    assert torch.equal(found, full)


def test_beside_the_built_in_merging_nothing_is_fused_twice(program):
    full, _ = program.draw(off(program), enable_hr=True)
    found, p = program.draw(args(program), enable_hr=True, built_in={False: 0.3, True: 0.3})
    assert torch.equal(found, full)
    assert "the built-in token merging is on, at 0.3" in next(iter(p.comments))
    assert "ToFu ratio: 0, ToFu hires ratio: 0" in webui_host.saved(p)
    second, p = program.draw(args(program), enable_hr=True, built_in={False: 0.3})
    assert torch.equal(second, program.draw(args(program, ratio=0), enable_hr=True)[0])
    assert "ToFu ratio: 0, ToFu hires ratio: 0.5" in webui_host.saved(p)


def test_a_model_without_a_unet_is_refused_in_words(program):
    other = torch.nn.Linear(2, 2)
    if program.forge:
        patcher = ForgePatcher(other)
        program.sd_model.forge_objects.unet = patcher
        p = webui_host.Processing(program)
        program.script.process_before_every_sampling(p, *args(program))
        assert program.sd_model.forge_objects.unet is patcher
    else:
        program.sd_model.model.diffusion_model = other
        p = webui_host.Processing(program, sampler=webui_host.Sampler())
        program.script.process_before_every_sampling(p, *args(program))
        assert "launch_sampling" not in vars(p.sampler)
    assert "no eligible block in Linear" in next(iter(p.comments))


def test_a_unet_that_something_else_holds_is_told_before_the_sampling_begins(program):
    if program.forge:
        pytest.skip("Forge's patches do not touch the UNet")
    block = next(m for m in program.model.modules() if isinstance(m, PlainBlock))
    full, _ = program.draw(off(program))
    block.attn1.forward = block.attn1.forward  # as the built-in HyperTile does
    try:
        found, p = program.draw(args(program))
    finally:
        del block.attn1.forward
    assert torch.equal(found, full)
    assert "has a `forward` of its own" in next(iter(p.comments))


def test_a_unet_that_is_taken_hold_of_after_that_is_drawn_with_as_it_is(program, caplog):
    if program.forge:
        pytest.skip("Forge's patches do not touch the UNet")
    block = next(m for m in program.model.modules() if isinstance(m, PlainBlock))
    full, _ = program.draw(off(program))
    p = webui_host.Processing(program, sampler=webui_host.Sampler())
    program.script.process_before_every_sampling(p, *args(program))
    block.attn1.forward = block.attn1.forward
    try:
        assert p.sampler.launch_sampling(1, lambda: "drawn") == "drawn"
    finally:
        del block.attn1.forward
    assert "has a `forward` of its own" in caplog.text
    assert torch.equal(program.draw(off(program))[0], full)


@pytest.mark.parametrize("there", ["hypernetwork", "upcast"])
def test_what_weighted_attention_would_leave_out_is_not_left_out(program, there):
    if program.forge:
        pytest.skip("Forge has neither in its own attention")
    full, _ = program.draw(off(program))
    shared = program.modules["modules.shared"]
    if there == "upcast":
        shared.opts.upcast_attn = True
    else:
        shared.loaded_hypernetworks.append(object())
    found, p = program.draw(args(program, **FAITHFUL))
    assert torch.equal(found, full)
    assert "proportional replaces the program's attention" in next(iter(p.comments))
    assert not torch.equal(program.draw(args(program))[0], full)


def test_a_program_without_the_hook_is_told_to_be_too_old(program, monkeypatch):
    monkeypatch.delattr(webui_host.Script, "process_before_every_sampling")
    monkeypatch.delattr(program.host.TokenFusionScript, "process_before_every_sampling")
    p = webui_host.Processing(program)
    program.script.process(p, *args(program))
    assert "AUTOMATIC1111 has the needed hook from 1.10 on" in next(iter(p.comments))
    assert not p.extra_generation_params


# --- the screen -------------------------------------------------------------------------------------------------------


def test_what_nobody_changes_is_the_default_of_the_package(program):
    values = {option.name: option.default for option in program.host.INPUTS}
    assert program.host.pass_configs(values) == (TokenFusionConfig(), TokenFusionConfig())


def test_a_preset_sets_the_fields_to_its_recipe_at_any_ratio(program):
    assert [button.args[0] for button in program.modules["gradio"].buttons] == list(program.host.PRESETS)
    for button in program.modules["gradio"].buttons:
        told = button.click_told
        values = dict(zip((field.label for field in told["outputs"]), told["fn"](), strict=True))
        assert {"Ratio", "Hires ratio"}.isdisjoint(values)
        asked = {name: values[name.replace("_", " ").capitalize()] for name in NAMES[2:]}
        fusion = config_of({**asked, "ratio": 0.25})
        recipe = RECIPES[button.args[0]]
        assert fusion == TokenFusionConfig.of(recipe, ratio=0.25, early=fusion.early, late=fusion.late)
        assert [recipe.early.__name__, recipe.late.__name__] == [asked["early"], asked["late"]]


def test_no_number_keeps_the_program_from_drawing(program):
    """Gradio refuses to draw at all beyond a Number's limits, whether Token Fusion is on or off."""
    numbers = [field for field in program.fields if type(field).__name__ == "Number"]
    assert [field.label for field in numbers] == ["Grid seed", "Min tokens"]
    assert all({"minimum", "maximum"}.isdisjoint(field.told) for field in numbers)
    _, p = program.draw([{"grid_seed": 2**31}])
    assert "seed is 2147483648; it must be None or an integer" in next(iter(p.comments))


def test_the_second_pass_is_asked_for_where_there_is_one(program):
    visible = {field.label: field.told.get("visible") for field in program.script.ui(is_img2img=True)}
    assert visible.pop("Hires ratio") is False
    assert set(visible.values()) == {True, None}
    assert all(field.told.get("visible", True) for field in program.script.ui(is_img2img=False))


def test_an_axis_of_a_grid_sets_an_option_and_switches_it_on(program):
    grid = types.ModuleType("grid")
    grid.axis_options, grid.AxisOption = [], webui_host.AxisOption
    grid.AxisOptionTxt2Img = webui_host.AxisOptionTxt2Img
    found = types.SimpleNamespace(script_class=type("Script", (), {"__module__": "xyz_grid.py"}), module=grid)
    program.modules["modules.scripts"].scripts_data.append(found)
    program.host.add_axes()
    program.host.add_axes()  # the screen is built again
    axes = {axis.label: axis for axis in grid.axis_options}
    assert len(axes) == len(grid.axis_options) == len(NAMES)
    assert axes["[ToFu] Kv only"].choices() == ["False", "True"]
    assert axes["[ToFu] Early"].choices() == ["prune", "mean", "mlerp"]
    assert [a.label for a in grid.axis_options if type(a) is webui_host.AxisOptionTxt2Img] == ["[ToFu] Hires ratio"]
    axes["[ToFu] Ratio"].confirm(None, [0.0, 0.25, 0.75])
    with pytest.raises(ValueError, match=r"ratio is 0\.8; it must be a number from 0 to 0\.75"):
        axes["[ToFu] Ratio"].confirm(None, [0.6, 0.8])
    with pytest.raises(ValueError, match="unknown reduction 'meen'"):
        axes["[ToFu] Early"].confirm(None, ["mean", "meen"])
    whole = webui_host.Processing(program)
    p = webui_host.cell(whole)
    axes["[ToFu] Ratio"].apply(p, axes["[ToFu] Ratio"].type("0.25"), None)
    axes["[ToFu] Kv only"].apply(p, "True", None)
    found, p = program.draw(off(program), p=p)
    assert torch.equal(found, program.draw(args(program, ratio=0.25, kv_only=True))[0])
    assert webui_host.saved(p) == "ToFu ratio: 0.25, ToFu early: prune, ToFu late: mlerp, ToFu kv only: True"
    assert not hasattr(whole, program.host.AXES)


def test_the_file_that_programs_load_has_the_script_and_asks_for_the_axes(program, monkeypatch):
    asked = []
    callbacks = types.ModuleType("modules.script_callbacks")
    callbacks.on_before_ui = asked.append
    monkeypatch.setitem(sys.modules, "modules.script_callbacks", callbacks)
    program.modules["modules"].script_callbacks = callbacks
    loaded = runpy.run_path(str(ROOT / "scripts" / "tofu_sd_webui.py"))
    kinds = [kind for kind in loaded.values() if isinstance(kind, type)]
    assert kinds == [program.host.TokenFusionScript]
    assert asked == [program.host.add_axes]


@pytest.mark.parametrize(("version", "refused"), [("2.0.1", True), ("2.1.2", False), ("2.13.0+cpu", False)])
def test_installing_installs_nothing_and_refuses_a_torch_that_is_too_old(monkeypatch, version, refused):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    if refused:
        with pytest.raises(SystemExit, match=r"needs torch 2\.1 or newer; this is torch 2\.0\.1"):
            runpy.run_path(str(ROOT / "install.py"), run_name="__main__")
    else:
        runpy.run_path(str(ROOT / "install.py"), run_name="__main__")


def test_the_stand_in_of_automatic1111_is_the_same_model_as_forges(unet):
    """Or the tests above would compare nothing."""
    x, context = tiny.noise(2, 4, 16, 16), tiny.inputs(unet)["encoder_hidden_states"]
    model = UNetModel(copy.deepcopy(unet), PlainBlock)
    with torch.no_grad():
        assert torch.allclose(model(x, 500, context), ForgePatcher(UNetModel(unet)).predict(x, 500, context), atol=1e-5)
