"""The script for AUTOMATIC1111 and Forge: it merges when enabled, saves its parameters, and restores the model."""

from __future__ import annotations

import copy
import importlib
import re
import runpy
import sys
import types
from functools import partial
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
    "kv_early", "kv_late",
]  # fmt: skip
FAITHFUL = {"early": "mean", "late": "mean", "proportional": True, "window": 2}


@pytest.fixture(scope="module")
def unet():
    return tiny.sd15_unet()


@pytest.fixture(params=["AUTOMATIC1111", "Forge"])
def program(request, unet, monkeypatch):
    """A program with its script. program.host is the script's module, program.modules the modules it imports."""
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
    """Returns the script arguments for a user who has enabled Token Fusion and set these fields."""
    values = [field.value for field in program.fields]
    return [True, *(options.get(name, value) for name, value in zip(NAMES, values[1:], strict=True))]


def off(program):
    return [field.value for field in program.fields]


@pytest.mark.parametrize("options", [{}, FAITHFUL, {"ratio": 0.25, "start_percent": 0.4}])
def test_script_matches_the_adapters_and_restores_the_model(program, options):
    before, (baseline, _) = webui_host.state(program), program.generate(off(program))
    result, p = program.generate(args(program, **options))
    fields = {name.removesuffix("_percent"): value for name, value in options.items()}
    fusion = TokenFusionConfig.of(fields.pop("ratio", 0.5), **fields)
    if program.forge:
        expected_program = webui_host.Program(program.model.unet, forge=True)
        expected_program.script = types.SimpleNamespace(
            process=lambda p: None, process_before_every_sampling=lambda p, **m: None
        )
        expected_program.patcher, _ = patch_model(
            expected_program.patcher,
            fusion,
            lambda q, k, v, h, o: attention(q, k, v, h, o),
            lambda percent: 10 * (1 - percent),
        )
        expected, _ = expected_program.generate([])
    else:
        ldm.apply(program.model, fusion)
        expected, _ = program.generate(off(program))
        ldm.restore(program.model)
    assert torch.equal(result, expected)
    assert (result - baseline).abs().max() > 1e-3
    assert not p.comments
    assert webui_host.state(program) == before
    assert torch.equal(program.generate(off(program))[0], baseline)


def test_disabled_or_ratio_zero_equals_the_baseline(program):
    """Requests without arguments are baseline too: Forge Neo passes none while it starts."""
    baseline, p = program.generate(off(program))
    assert not p.extra_generation_params
    bare, p = program.generate([])
    assert torch.equal(bare, baseline)
    assert not p.extra_generation_params
    assert not p.comments
    assert torch.equal(program.generate(args(program, ratio=0))[0], baseline)


@pytest.mark.parametrize("hires", [False, True])
def test_interrupted_sampling_restores_the_model(program, hires):
    before, (baseline, _) = webui_host.state(program), program.generate(off(program))
    p = webui_host.Processing(program, enable_hr=True, fails_at=(hires, 500.0))
    with pytest.raises(InterruptedError):
        program.generate(args(program), p=p)
    assert p.is_hr_pass is hires
    assert webui_host.state(program) == before
    assert torch.equal(program.generate(off(program))[0], baseline)


def test_reused_sampler_is_patched_once_and_restored(program):
    once, p = program.generate(args(program))
    again, _ = program.generate(args(program), batches=3)
    assert torch.equal(once, again)
    if not program.forge:
        assert not isinstance(p.sampler.launch_sampling.launch, program.host.PatchedSampling)
        program.script.process_before_every_sampling(p, *off(program))
        assert p.sampler.launch_sampling == types.MethodType(webui_host.Sampler.launch_sampling, p.sampler)


@pytest.mark.parametrize("options", [{}, FAITHFUL])
def test_both_passes_are_merged_and_saved(program, options):
    baseline, _ = program.generate(off(program), enable_hr=True)
    second, p = program.generate(args(program, ratio=0, **options), enable_hr=True)
    both, p = program.generate(args(program, **options), enable_hr=True)
    assert len({tensor.sum().item() for tensor in (baseline, second, both)}) == 3
    assert not p.comments
    assert "ToFu ratio: 0.5, ToFu hires ratio: 0.5" in webui_host.saved(p)


def test_hires_pass_has_its_own_ratio(program):
    baseline, _ = program.generate(off(program), enable_hr=True)
    neither, _ = program.generate(args(program, ratio=0, hires_ratio=0), enable_hr=True)
    first, _ = program.generate(args(program, ratio=0.5, hires_ratio=0), enable_hr=True)
    second, p = program.generate(args(program, ratio=0, hires_ratio=0.5), enable_hr=True)
    assert torch.equal(neither, baseline)
    assert len({tensor.sum().item() for tensor in (baseline, first, second)}) == 3
    assert "ToFu hires ratio: 0.5" in webui_host.saved(p)
    assert "hires" not in webui_host.saved(program.generate(args(program))[1])


# --- saved and pasted parameters, requests ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, FAITHFUL, {"hires_ratio": 0.25, "grid_seed": 7, "kv_only": True, "end_percent": 0.6, "levels": 2}]
)
def test_pasted_parameters_reproduce_the_image(program, options):
    result, p = program.generate(args(program, **options), enable_hr=True)
    text = webui_host.saved(p)
    assert text.startswith("ToFu ratio: 0.5")
    pasted = webui_host.paste(program.script, "Steps: 20, " + text)
    assert len(pasted) == len(program.fields)  # each field is set: a field need not have its default
    again, _ = program.generate([pasted[field.label] for field in program.fields], enable_hr=True)
    assert torch.equal(result, again)


def test_pasting_a_baseline_image_disables_and_keeps_the_fields(program):
    assert webui_host.paste(program.script, "Steps: 20, Sampler: Euler") == {"Token Fusion (ToFu)": False}


def test_pasting_one_pass_keeps_the_hires_ratio(program):
    assert "Hires ratio" not in webui_host.paste(program.script, "ToFu ratio: 0.25")


def test_parameters_of_the_previous_image_are_not_saved(program):
    _, p = program.generate(args(program, window=8))
    assert "ToFu window: 8" in webui_host.saved(p)
    program.generate(args(program), p=p)
    assert "window" not in webui_host.saved(p)
    program.generate(off(program), p=p)
    assert webui_host.saved(p) == ""


def test_unknown_reduction_is_not_pasted(program):
    assert "Early" not in webui_host.paste(program.script, "ToFu ratio: 0.5, ToFu early: median, ToFu late: mean")


def test_request_arguments_keep_their_order(program):
    """Clients send options by position, so new options come at the end."""
    assert [option.name for option in program.host.INPUTS] == NAMES
    page = (ROOT / "docs" / "webui.md").read_text().partition("only at the end:")[2].partition(". Omitted")[0]
    assert re.findall(r"`(\w+)`", page) == ["enabled", *NAMES]
    assert [field.label for field in program.fields[1:]] == [n.replace("_", " ").capitalize() for n in NAMES]


def test_request_sets_options_by_name(program):
    by_place, _ = program.generate(args(program, **FAITHFUL))
    rest = off(program)[1:]
    by_name, _ = program.generate([FAITHFUL, *rest])
    assert torch.equal(by_place, by_name)
    for switch in (False, "false", 0):
        assert torch.equal(
            program.generate([{**FAITHFUL, "enabled": switch}, *rest])[0], program.generate(off(program))[0]
        )
    unset, _ = program.generate([True, *[None] * len(rest)])
    assert torch.equal(unset, program.generate(args(program))[0])


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_invalid_option_adds_one_comment_and_keeps_the_baseline_image(program, options, message, caplog):
    baseline, _ = program.generate(off(program), enable_hr=True)
    result, p = program.generate([options], enable_hr=True)
    (comment,) = p.comments
    assert message in comment
    assert comment.endswith("The image is generated without it.")
    assert caplog.text.count(message) == 1
    assert not p.extra_generation_params
    assert torch.equal(result, baseline)


def test_built_in_merging_disables_token_fusion(program):
    baseline, _ = program.generate(off(program), enable_hr=True)
    result, p = program.generate(args(program), enable_hr=True, built_in={False: 0.3, True: 0.3})
    assert torch.equal(result, baseline)
    assert "the built-in token merging is on, at 0.3" in next(iter(p.comments))
    assert "ToFu ratio: 0, ToFu hires ratio: 0" in webui_host.saved(p)
    second, p = program.generate(args(program), enable_hr=True, built_in={False: 0.3})
    assert torch.equal(second, program.generate(args(program, ratio=0), enable_hr=True)[0])
    assert "ToFu ratio: 0, ToFu hires ratio: 0.5" in webui_host.saved(p)


def test_model_without_a_unet_adds_a_comment(program):
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


def test_unet_with_replaced_forward_adds_a_comment(program):
    if program.forge:
        pytest.skip("Forge's patches do not touch the UNet")
    block = next(m for m in program.model.modules() if isinstance(m, PlainBlock))
    baseline, _ = program.generate(off(program))
    block.attn1.forward = partial(block.attn1.forward)  # like the built-in HyperTile
    try:
        result, p = program.generate(args(program))
    finally:
        del block.attn1.forward
    assert torch.equal(result, baseline)
    assert "has a `forward` of its own" in next(iter(p.comments))


def test_forward_replaced_before_sampling_runs_unmerged(program, caplog):
    if program.forge:
        pytest.skip("Forge's patches do not touch the UNet")
    block = next(m for m in program.model.modules() if isinstance(m, PlainBlock))
    baseline, _ = program.generate(off(program))
    p = webui_host.Processing(program, sampler=webui_host.Sampler())
    program.script.process_before_every_sampling(p, *args(program))
    block.attn1.forward = partial(block.attn1.forward)
    try:
        assert p.sampler.launch_sampling(1, lambda: "latent") == "latent"
    finally:
        del block.attn1.forward
    assert "has a `forward` of its own" in caplog.text
    assert torch.equal(program.generate(off(program))[0], baseline)


@pytest.mark.parametrize("there", ["hypernetwork", "upcast"])
def test_proportional_is_rejected_with_hypernetworks_or_upcast(program, there):
    if program.forge:
        pytest.skip("Forge has neither in its own attention")
    baseline, _ = program.generate(off(program))
    shared = program.modules["modules.shared"]
    if there == "upcast":
        shared.opts.upcast_attn = True
    else:
        shared.loaded_hypernetworks.append(object())
    result, p = program.generate(args(program, **FAITHFUL))
    assert torch.equal(result, baseline)
    assert "proportional replaces the program's attention" in next(iter(p.comments))
    assert not torch.equal(program.generate(args(program))[0], baseline)


def test_program_without_the_hook_adds_a_comment(program, monkeypatch):
    monkeypatch.delattr(webui_host.Script, "process_before_every_sampling")
    monkeypatch.delattr(program.host.TokenFusionScript, "process_before_every_sampling")
    p = webui_host.Processing(program)
    program.script.process(p, *args(program))
    assert "AUTOMATIC1111 has the needed hook from 1.10 on" in next(iter(p.comments))
    assert not p.extra_generation_params


# --- the UI -----------------------------------------------------------------------------------------------------------


def test_default_fields_equal_the_package_defaults(program):
    values = {option.name: option.default for option in program.host.INPUTS}
    assert program.host.pass_configs(values) == (TokenFusionConfig(), TokenFusionConfig())


def test_preset_button_sets_its_recipe_at_any_ratio(program):
    assert [button.args[0] for button in program.modules["gradio"].buttons] == list(program.host.PRESETS)
    for button in program.modules["gradio"].buttons:
        click = button.click_options
        values = dict(zip((field.label for field in click["outputs"]), click["fn"](), strict=True))
        assert {"Ratio", "Hires ratio"}.isdisjoint(values)
        fields = {name: values[name.replace("_", " ").capitalize()] for name in NAMES[2:]}
        fusion = config_of({**fields, "ratio": 0.25})
        recipe = RECIPES[button.args[0]]
        assert fusion == TokenFusionConfig.of(recipe, ratio=0.25, early=fusion.early, late=fusion.late)
        assert [recipe.early.__name__, recipe.late.__name__] == [fields["early"], fields["late"]]


def test_number_fields_have_no_limits(program):
    """Outside a Number's limits Gradio refuses to generate, even with Token Fusion off."""
    numbers = [field for field in program.fields if type(field).__name__ == "Number"]
    assert [field.label for field in numbers] == ["Grid seed", "Min tokens"]
    assert all({"minimum", "maximum"}.isdisjoint(field.options) for field in numbers)
    _, p = program.generate([{"grid_seed": 2**31}])
    assert "seed is 2147483648; it must be None or an integer" in next(iter(p.comments))


def test_hires_ratio_is_hidden_in_img2img(program):
    visible = {field.label: field.options.get("visible") for field in program.script.ui(is_img2img=True)}
    assert visible.pop("Hires ratio") is False
    assert set(visible.values()) == {True, None}
    assert all(field.options.get("visible", True) for field in program.script.ui(is_img2img=False))


def test_grid_axis_sets_an_option_and_enables_token_fusion(program):
    grid = types.ModuleType("grid")
    grid.axis_options, grid.AxisOption = [], webui_host.AxisOption
    grid.AxisOptionTxt2Img = webui_host.AxisOptionTxt2Img
    result = types.SimpleNamespace(script_class=type("Script", (), {"__module__": "xyz_grid.py"}), module=grid)
    program.modules["modules.scripts"].scripts_data.append(result)
    program.host.add_axes()
    program.host.add_axes()  # the UI is built again
    axes = {axis.label: axis for axis in grid.axis_options}
    assert len(axes) == len(grid.axis_options) == len(NAMES)
    assert axes["[ToFu] Kv only"].choices() == ["False", "True"]
    assert axes["[ToFu] Early"].choices() == ["prune", "mean", "mlerp", "partial_mlerp"]
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
    result, p = program.generate(off(program), p=p)
    assert torch.equal(result, program.generate(args(program, ratio=0.25, kv_only=True))[0])
    assert webui_host.saved(p) == "ToFu ratio: 0.25, ToFu early: prune, ToFu late: mlerp, ToFu kv only: True"
    assert not hasattr(whole, program.host.AXES)


def test_script_file_exports_the_script_and_registers_axes(program, monkeypatch):
    registered = []
    callbacks = types.ModuleType("modules.script_callbacks")
    callbacks.on_before_ui = registered.append
    monkeypatch.setitem(sys.modules, "modules.script_callbacks", callbacks)
    program.modules["modules"].script_callbacks = callbacks
    loaded = runpy.run_path(str(ROOT / "scripts" / "tofu_sd_webui.py"))
    kinds = [kind for kind in loaded.values() if isinstance(kind, type)]
    assert kinds == [program.host.TokenFusionScript]
    assert registered == [program.host.add_axes]


@pytest.mark.parametrize(("version", "refused"), [("2.0.1", True), ("2.1.2", False), ("2.13.0+cpu", False)])
def test_install_script_only_checks_the_torch_version(monkeypatch, version, refused):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    if refused:
        with pytest.raises(SystemExit, match=r"needs torch 2\.1 or newer; this is torch 2\.0\.1"):
            runpy.run_path(str(ROOT / "install.py"), run_name="__main__")
    else:
        runpy.run_path(str(ROOT / "install.py"), run_name="__main__")


def test_stand_ins_of_automatic1111_and_forge_are_the_same_model(unet):
    """Otherwise the previous tests would not compare the same model."""
    x, context = tiny.noise(2, 4, 16, 16), tiny.inputs(unet)["encoder_hidden_states"]
    model = UNetModel(copy.deepcopy(unet), PlainBlock)
    with torch.no_grad():
        assert torch.allclose(model(x, 500, context), ForgePatcher(UNetModel(unet)).predict(x, 500, context), atol=1e-5)
