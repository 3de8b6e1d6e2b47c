"""The ComfyUI nodes in a stand-in of ComfyUI and, if COMFYUI names a checkout, in ComfyUI itself.

COMFYUI=/folder/of/ComfyUI pytest tests/hosts/test_comfyui.py runs both. COMFYUI_PYTHON names the interpreter if
ComfyUI's packages are in another environment. (A folder called comfy would hide the program's package.)
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from comfyui import PROGRAM, run_in_comfyui
from patcher_host import Patcher, UNetModel, attention

from tofu_sd import TokenFusionConfig
from tofu_sd.hosts.programs.model_patcher import patches_of
from tofu_sd.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tofu_sd.hosts.comfyui"


class Fields:
    """Stores its arguments as attributes."""

    def __init__(self, *values, **fields):
        self.values = values
        vars(self).update(fields)


class Input(Fields):
    def __init__(self, name, **fields):
        super().__init__(name, name=name, **fields)


def v3_interface():
    """Returns the part of ComfyUI's V3 interface that the nodes use."""
    io = types.SimpleNamespace(ComfyNode=object, NodeOutput=Fields)
    io.Schema = type("Schema", (Fields,), {"__annotations__": {"search_aliases": list}})
    for kind in ("Combo", "Boolean", "Int", "Float", "String", "Model", "Conditioning", "Latent", "Image"):
        setattr(io, kind, types.SimpleNamespace(Input=type(kind, (Input,), {}), Output=type(kind, (Fields,), {})))
    return types.SimpleNamespace(io=io, ComfyExtension=object)


class Model(Patcher):
    def get_model_object(self, name):
        assert name == "model_sampling"
        return types.SimpleNamespace(percent_to_sigma=lambda percent: 10 * (1 - percent))


@pytest.fixture
def comfy(monkeypatch):
    """Installs the ComfyUI modules that the nodes use. `comfy("V1")` imports the nodes again under that interface."""

    def own(q, k, v, heads, attn_precision=None, transformer_options=None):
        override = (transformer_options or {}).get("optimized_attention_override")
        return attention(q, k, v, heads, None) if override is None else override(attention, q, k, v, heads)

    def sample_custom(model, noise, cfg, sampler, sigmas, positive, negative, latent, **more):
        model.predict(latent + noise, float(sigmas[0]) * 100, positive)

    modules = {
        "comfy": {}, "comfy.ldm": {}, "comfy.ldm.modules": {},
        "comfy.ldm.modules.attention": {"optimized_attention": own},
        "comfy.samplers": {"sampler_object": lambda name: name},
        "comfy.sample": {
            "sample_custom": sample_custom,
            "fix_empty_latent_channels": lambda model, samples: samples,
            "prepare_noise": lambda samples, seed: tiny.noise(*samples.shape, seed=seed),
        },
    }  # fmt: skip
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)

    def nodes(interface):
        if interface == "V3":
            monkeypatch.setitem(sys.modules, "comfy_api", types.ModuleType("comfy_api"))
            monkeypatch.setitem(sys.modules, "comfy_api.latest", v3_interface())
        else:
            monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
        return importlib.import_module(MODULE)

    yield nodes
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def model():
    return Model(UNetModel(tiny.sd15_unet()))


def predict(model):
    inputs = tiny.inputs(model.model.diffusion_model.unet)
    return model.predict(inputs["sample"], 500, inputs["encoder_hidden_states"])


def node_functions(nodes, interface):
    """Returns (patch, show): functions that call the two nodes as the program does and return their results."""
    if interface == "V3":
        extension = asyncio.run(nodes.comfy_entrypoint())
        first, second = asyncio.run(extension.get_node_list())
        return (lambda *a, **o: first.execute(*a, **o).values[0]), (lambda *a, **o: second.execute(*a, **o).values)
    first, second = (node() for node in nodes.NODE_CLASS_MAPPINGS.values())
    return (lambda *a, **o: first.execute(*a, **o)[0]), second.execute


@pytest.mark.parametrize("interface", ["V1", "V3"])
def test_nodes_patch_a_clone_and_show_its_merge_maps(comfy, model, interface):
    patch, show = node_functions(comfy(interface), interface)
    before = predict(model)
    patched = patch(model, ratio=0.5, early="mean", late="mean", proportional=True)
    assert (predict(patched) - before).abs().max() > 1e-3
    assert torch.equal(predict(model), before)
    context = tiny.inputs(model.model.diffusion_model.unet)["encoder_hidden_states"][:1]
    images, names = show(patched, context, {"samples": torch.zeros(2, 4, 16, 12)})
    assert images.shape == (5, 128, 96, 3)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images, show(patched, context, {"samples": torch.zeros(2, 4, 16, 12)})[0])
    assert names.splitlines()[0] == "1: input 1.0"
    assert names.splitlines()[4] == "5: output 11.0"


def test_v1_and_v3_interfaces_declare_the_same_inputs(comfy):
    older = comfy("V1")
    fields = older.TokenFusionNode.INPUT_TYPES()["optional"]
    newer = comfy("V3")
    inputs = newer.TokenFusionNode.define_schema().inputs[1:]
    assert [i.name for i in inputs] == list(fields)
    kinds = {"Combo": list, "Boolean": "BOOLEAN", "Int": "INT", "Float": "FLOAT"}
    for one in inputs:
        kind, options = fields[one.name]
        assert kinds[type(one).__name__] in (kind, type(kind))
        assert (one.default, one.tooltip, one.optional) == (options["default"], options["tooltip"], True)
        assert getattr(one, "max", None) == options.get("max")
        assert getattr(one, "extra_dict", {}).get("advanced") == options.get("advanced")
    schemas = [newer.TokenFusionNode.define_schema(), newer.TokenFusionMapNode.define_schema()]
    for schema, node in zip(schemas, (older.TokenFusionNode, older.TokenFusionMapNode), strict=True):
        assert (schema.category, schema.search_aliases) == (node.CATEGORY, node.SEARCH_ALIASES)
        assert node.CATEGORY == "model/patch/unet"
        assert {"tome", "token merging", "speed"} <= set(node.SEARCH_ALIASES)
    assert not {"seed", "noise_seed"} & set(fields)  # ComfyUI would add a widget of its own to such a name


def test_default_inputs_equal_the_package_defaults(comfy, model):
    nodes = comfy("V1")
    fields = nodes.TokenFusionNode.INPUT_TYPES()["optional"]
    untouched = nodes.patch_with_preset(model, **{name: options["default"] for name, (_, options) in fields.items()})
    assert patches_of(untouched).config == patches_of(nodes.patch_with_preset(model)).config == TokenFusionConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.9}, "ratio is 0.9; it must be a number from 0 to 0.75"),
        ({"start_percent": 0.8, "end_percent": 0.2}, "start must come before end"),
        ({"early": "average"}, "unknown reduction 'average'"),
    ],
)
def test_invalid_input_raises_and_patches_nothing(comfy, model, options, message):
    with pytest.raises(ValueError, match=message):
        comfy("V1").patch_with_preset(model, **options)
    assert model.model_options == {"transformer_options": {}}


def test_only_preset_and_ratio_are_not_advanced_inputs(comfy):
    fields = comfy("V1").TokenFusionNode.INPUT_TYPES()["optional"]
    assert [name for name, (_, options) in fields.items() if not options.get("advanced")] == ["preset", "ratio"]
    assert next(iter(fields)) == "preset"
    assert fields["preset"][0] == ["tofu", "tofu-fast", "faithful", "asymmetric", "tome", "custom"]


@pytest.mark.parametrize("name", ["tofu", "tofu-fast", "faithful", "asymmetric", "tome"])
def test_preset_equals_its_recipe_at_any_ratio(comfy, model, name, caplog):
    nodes = comfy("V1")
    fusion = patches_of(nodes.patch_with_preset(model, preset=name, ratio=0.25, levels=2, start_percent=0.2)).config
    assert fusion == TokenFusionConfig.of(RECIPES[name], ratio=0.25, levels=2, start=0.2)
    assert not caplog.text


def test_log_names_inputs_that_a_preset_ignores(comfy, model, caplog):
    nodes = comfy("V1")
    fusion = patches_of(nodes.patch_with_preset(model, preset="tofu", window=4, early="mean", late="mlerp")).config
    assert fusion == TokenFusionConfig()
    assert "early, window are ignored, as preset is tofu and not custom" in caplog.text
    tooltip = nodes.TokenFusionNode.INPUT_TYPES()["optional"]["preset"][1]["tooltip"]
    listed = "early, late, kv_early, kv_late, depth_split, proportional, kv_only, window"
    assert f"{listed}; their inputs are used only with custom" in tooltip


def test_unknown_preset_raises_with_a_suggestion(comfy, model):
    with pytest.raises(ValueError, match=r"unknown preset 'faithfull' \(did you mean 'faithful'\?\); known: tofu,"):
        comfy("V1").patch_with_preset(model, preset="faithfull")


VALUES_BEFORE_PRESETS = [
    0.5,
    "mean",
    "mean",
    -1,
    True,
    False,
    1,
    0.0,
    1.0,
    -1,
    8,
    1,
    False,
    0,
]  # as the screen saved them


def test_workflow_saved_before_presets_keeps_its_config(comfy, model):
    nodes = comfy("V1")
    names = list(nodes.TokenFusionNode.INPUT_TYPES()["optional"])
    before = dict(zip(names[1:], VALUES_BEFORE_PRESETS, strict=False))  # later inputs have their defaults
    faithful = replace(RECIPES["faithful"], min_tokens=0)  # as it was saved: every map is merged
    assert patches_of(nodes.patch_with_preset(model, **before)).config == faithful
    assert patches_of(nodes.patch_with_preset(model, ratio=0.25)).config == TokenFusionConfig(0.25)
    assert patches_of(nodes.patch_with_preset(model, preset="custom", **before)).config == faithful


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_web_extension_converts_workflow_saved_before_presets(tmp_path):
    """Workflows store the values of widgets by order only."""
    code = (ROOT / "web" / "token_fusion.js").read_text().replace('import { app } from "../../scripts/app.js";', "")
    code = "const app = { registerExtension() {} };" + code
    (tmp_path / "fusion.mjs").write_text(code)
    node = {"type": "TokenFusion", "widgets_values": VALUES_BEFORE_PRESETS}
    graph = {
        "nodes": [node, {"type": "Note", "widgets_values": VALUES_BEFORE_PRESETS}],
        "definitions": {"subgraphs": [{"nodes": [node]}]},
    }
    (tmp_path / "run.mjs").write_text(
        f"import {{ addPreset }} from './fusion.mjs'; const graph = {json.dumps(graph)};"
        "addPreset(graph); addPreset(graph); console.log(JSON.stringify(graph));"
    )
    done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)
    read = json.loads(done.stdout)
    ours = [read["nodes"][0], read["definitions"]["subgraphs"][0]["nodes"][0]]
    assert all(node["widgets_values"] == ["custom", *VALUES_BEFORE_PRESETS] for node in ours)
    assert read["nodes"][1]["widgets_values"] == VALUES_BEFORE_PRESETS


def test_example_workflow_has_valid_values_and_no_overlapping_nodes(comfy):
    """In ComfyUI's folder for examples. A row is up to 36 pixels high, a title 40."""
    workflow = json.loads((ROOT / "example_workflows" / "token-fusion.json").read_text())
    fields = comfy("V1").TokenFusionNode.INPUT_TYPES()["optional"]
    [ours] = [node for node in workflow["nodes"] if node["type"] == "TokenFusion"]
    for (name, (kind, options)), value in zip(fields.items(), ours["widgets_values"], strict=True):
        assert value in kind if isinstance(kind, list) else options.get("min", 0) <= value <= options.get("max", 1), (
            name
        )
    boxes = {}
    for node in workflow["nodes"]:
        rows = max(len(node.get("inputs", ())), len(node.get("outputs", ()))) + len(node.get("widgets_values", ()))
        if node["type"] == "TokenFusion":
            rows = 4  # the advanced inputs are hidden by default
        (x, y), (w, h) = node["pos"], node["size"]
        boxes[node["id"]] = (x, y, x + w, y + max(h, 40 + 36 * rows))
    for a, b in itertools.combinations(boxes.values(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_map_node_reports_blocks_changed_by_another_node(comfy, model):
    nodes, context = comfy("V1"), torch.zeros(1, 7, 16)
    patched = nodes.patch_with_preset(model)
    patched.set_model_attn1_patch(lambda q, k, v, options: (q, k[:, ::2], v[:, ::2]))
    with pytest.raises(ValueError, match=r"nothing is merged at 0\.5 of the sampling: another node changes the tokens"):
        nodes.show(patched, context, {"samples": torch.zeros(1, 4, 16, 16)})


def test_attention_override_runs_only_where_nothing_is_merged(comfy, model):
    """Proportional attention replaces ComfyUI's attention in merged blocks. Unmerged calls go to the override."""
    nodes, sizes = comfy("V1"), []
    inputs = tiny.inputs(model.model.diffusion_model.unet)

    def override(function, q, k, v, heads):
        sizes.append(k.shape[1])
        return function(q, k, v, heads, None)

    patched = nodes.patch_with_preset(model, preset="faithful", min_tokens=64, start_percent=0.6)
    transformer_options = patched.model_options["transformer_options"]
    transformer_options["optimized_attention_override"] = override
    patched.predict(inputs["sample"], 500, inputs["encoder_hidden_states"])
    assert sizes.count(256) == 5
    sizes.clear()
    patched.predict(inputs["sample"], 100, inputs["encoder_hidden_states"])
    assert not sizes


def test_log_message_names_no_map_size(comfy, model, monkeypatch):
    nodes, messages = comfy("V1"), []
    monkeypatch.setattr(nodes.logger, "info", messages.append)
    nodes.patch_with_preset(model, ratio=0.25)
    assert messages == ["UNetModel: tofu-r25 on 5 of 16 transformer blocks, on maps where that is faster"]


def test_map_node_rejects_a_model_that_merges_nothing(comfy, model):
    nodes, context = comfy("V1"), torch.zeros(1, 7, 16)
    with pytest.raises(ValueError, match="this model merges no tokens: put Token Fusion"):
        nodes.show(model, context, {"samples": torch.zeros(1, 4, 16, 16)})
    late = nodes.patch_with_preset(model, start_percent=0.6)
    with pytest.raises(ValueError, match=r"nothing is merged at 0\.5 of the sampling: the step lies outside start_per"):
        nodes.show(late, context, {"samples": torch.zeros(1, 4, 16, 16)})


@pytest.mark.parametrize("interface", ["V1", "V3"])
def test_comfyui_loads_the_repository_as_a_custom_node(comfy, monkeypatch, interface):
    """ComfyUI imports the folder under its path, with one of the two interfaces. tofu_sd is not imported twice."""
    before = sys.modules["tofu_sd"]
    comfy(interface)
    spec = importlib.util.spec_from_file_location("/custom_nodes/tofu", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "/custom_nodes/tofu", module)
    spec.loader.exec_module(module)
    assert (ROOT / module.WEB_DIRECTORY).is_dir()
    assert hasattr(module, "comfy_entrypoint") == (interface == "V3")
    assert hasattr(module, "NODE_CLASS_MAPPINGS") == (interface == "V1")
    assert sys.modules["tofu_sd"] is before


def test_repository_init_exports_no_nodes_outside_comfyui(monkeypatch):
    """pytest imports the file too: it treats the repository as a package."""
    monkeypatch.delitem(sys.modules, "comfy", raising=False)
    spec = importlib.util.spec_from_file_location("rootfolder", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not hasattr(module, "comfy_entrypoint")
    assert not hasattr(module, "NODE_CLASS_MAPPINGS")


@pytest.mark.parametrize(
    "code",
    [
        "import tofu_sd",
        "from tofu_sd import recipes, apply_patch",
        "import tofu_sd.hosts.ldm",
        "import types, sys; sys.modules['comfy'] = types.ModuleType('comfy'); import tofu_sd",
        "import tofu_sd, importlib; importlib.reload(tofu_sd)",
    ],
)
def test_package_imports_from_the_parent_folder_of_its_clone(tmp_path, code):
    """There Python finds the `__init__.py` of the clone before the package."""
    (tmp_path / "tofu_sd").symlink_to(ROOT)
    look = f"{code}; import tofu_sd; print(callable(tofu_sd.apply_patch), tofu_sd.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", str(tmp_path / "tofu_sd" / "tofu_sd" / "__init__.py")]


# --- in the program itself --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_in_comfyui("comfyui_run.py", tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="module")
def server_results(tmp_path_factory):
    return run_in_comfyui("comfyui_server.py", tmp_path_factory.mktemp("server"), str(PROGRAM))


@pytest.mark.parametrize(("kind", "blocks"), [("sd15", "5 of 16"), ("sdxl", "10 of 70")])
def test_comfyui_merges_blocks_of_the_highest_resolution(results, kind, blocks):
    assert f"on {blocks} transformer blocks" in results[kind]["headline"]
    assert results[kind]["changed"] > 1e-4


CHECKS = [
    "ratio 0 is bit-equal", "the unpatched model is bit-equal", "two clones at once", "the same seed", "the window",
    "the global generator is unchanged", "odd latents run", "the same image after an interrupt", "HyperTile before it",
    "HyperTile after it", "HyperTile on other blocks", "with Deep Shrink",
    "with the built-in merging tokens are merged once", "PAG acts with four levels",
    "SAG acts with four levels", "the window is that of the sampling",
]  # fmt: skip
COMPILED = ["plain then half then plain", "half then most then half", "weighted then half then weighted",
            "half then plain"]  # fmt: skip


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("check", CHECKS)
def test_comfyui_checks_pass(results, kind, check):
    assert results[kind]["checks"][check] is True


@pytest.mark.parametrize("order", COMPILED)
def test_comfyui_compiled_model_follows_its_config(results, order):
    assert results["sd15"]["checks"][f"compiled, {order}"] is True


@pytest.mark.parametrize("model", ["sd15", "sdxl", "embedded"])
def test_comfyui_prediction_matches_diffusers(results, model):
    """One call of the model with the same weights, latent and prompt. Both match on normed tokens."""
    distances = results["embedded"] if model == "embedded" else results[model]["diffusers"]
    assert distances["plain"] < 1e-4
    for method, distance in distances["merged"].items():
        assert distance < 1e-4, method
    assert distances["effect"] > 1e-2


def test_server_runs_the_example_workflow(server_results):
    """The repository lies in custom_nodes/. Only the workflow's checkpoint, size and steps are changed."""
    assert server_results["nodes"] == ["TokenFusion", "TokenFusionMap"]
    assert server_results["example"]["status"] == "success"
    assert len(server_results["example"]["outputs"]["10"]["images"]) == 5  # a map for each merged block
    assert "mlerp-kv-partial_mlerp-r50+p on 5 of 16 transformer blocks" in server_results["log"][0]
    assert server_results["plain"]["status"] == "success"


def test_server_runs_a_workflow_without_newer_inputs(server_results):
    assert server_results["older"]["status"] == "success"
    assert "tofu-r50 on 5 of 16 transformer blocks" in server_results["log"][1]


def test_server_reports_errors(server_results):
    [error] = server_results["wrong"]["refused"]["node_errors"]["2"]["errors"]
    assert error["message"] == "Value 0.9 bigger than max of 0.75"
    assert server_results["unmerged"]["error"].startswith("this model merges no tokens: put Token Fusion (ToFu) before")
    assert server_results["pixart"]["error"].startswith("token fusion does not support PixArtMS: its attention")


def test_server_runs_the_example_with_a_transformer(server_results):
    assert server_results["flux"]["status"] == "success"
    assert len(server_results["flux"]["outputs"]["10"]["images"]) == 4  # a map for each block
    assert any(
        "Flux: mlerp-kv-partial_mlerp-r50+p on 4 of 4 transformer blocks" in line for line in server_results["log"]
    )


def test_server_lists_the_node_with_the_built_in_unet_patches(server_results):
    assert server_results["about"]["display_name"] == "Token Fusion (ToFu)"
    assert server_results["about"]["category"] == "model/patch/unet"
    inputs = server_results["about"]["input"]["optional"]
    assert inputs["ratio"][1]["max"] == 0.75
    assert all(options["tooltip"] for _, options in inputs.values())


def test_server_generates_the_same_image_after_an_interrupt(server_results):
    """Images without the node are unchanged after images with it."""
    assert server_results["stopped"]["status"] == "error"  # ComfyUI reports an interrupt as an error
    assert server_results["stopped"]["interrupted"] is True
    assert server_results["before"] == server_results["after"]
    assert len(set(server_results["before"])) == 2


def test_server_runs_the_example_with_a_checkpoint_file(server_results):
    """The file has SD 1.5's layout and size, so ComfyUI's loader detects it as SD 1.5."""
    assert server_results["file"]["status"] == "success"
    assert len(server_results["file"]["outputs"]["8"]["images"]) == 1
    assert len(server_results["file"]["outputs"]["10"]["images"]) == 5
    assert len(set(server_results["file"]["images"])) == 2  # the node changes the image
    assert "UNetModel: mlerp-kv-partial_mlerp-r50+p on 5 of 16 transformer blocks" in server_results["log"][-1]
