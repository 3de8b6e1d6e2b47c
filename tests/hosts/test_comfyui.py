"""The ComfyUI nodes, in a stand-in of the program and, where there is a checkout of it, in the program itself.

COMFYUI=/folder/of/ComfyUI pytest tests/hosts/test_comfyui.py runs the second kind, by COMFYUI_PYTHON if its packages
are another environment's. (A folder called comfy would hide the program's package.)
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
from pathlib import Path

import pytest
import tiny
import torch
from comfyui import run_in_comfyui
from patcher_host import Patcher, UNetModel, attention

from tofu_sd import TokenFusionConfig
from tofu_sd.hosts.programs.model_patcher import patches_of
from tofu_sd.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
PROGRAM, PYTHON = os.environ.get("COMFYUI"), os.environ.get("COMFYUI_PYTHON", sys.executable)
MODULE = "tofu_sd.hosts.comfyui"


class Fields:
    """Whatever it is made with, as attributes."""

    def __init__(self, *values, **fields):
        self.values = values
        vars(self).update(fields)


class Input(Fields):
    def __init__(self, name, **fields):
        super().__init__(name, name=name, **fields)


def newer_interface():
    """What of ComfyUI's V3 interface the nodes use."""
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
    """The modules of ComfyUI that the nodes use; `comfy("V1")` imports the nodes anew under that interface."""

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
            monkeypatch.setitem(sys.modules, "comfy_api.latest", newer_interface())
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


def both(nodes, interface):
    """(fuse, show) as the program calls the two nodes, giving what they give."""
    if interface == "V3":
        extension = asyncio.run(nodes.comfy_entrypoint())
        first, second = asyncio.run(extension.get_node_list())
        return (lambda *a, **o: first.execute(*a, **o).values[0]), (lambda *a, **o: second.execute(*a, **o).values)
    first, second = (node() for node in nodes.NODE_CLASS_MAPPINGS.values())
    return (lambda *a, **o: first.execute(*a, **o)[0]), second.execute


@pytest.mark.parametrize("interface", ["V1", "V3"])
def test_the_nodes_patch_a_copy_and_show_its_maps(comfy, model, interface):
    fuse, show = both(comfy(interface), interface)
    before = predict(model)
    patched = fuse(model, ratio=0.5, early="mean", late="mean", proportional=True)
    assert (predict(patched) - before).abs().max() > 1e-3
    assert torch.equal(predict(model), before)
    context = tiny.inputs(model.model.diffusion_model.unet)["encoder_hidden_states"][:1]
    pictures, names = show(patched, context, {"samples": torch.zeros(2, 4, 16, 12)})
    assert pictures.shape == (5, 128, 96, 3)
    assert 0 <= pictures.min() < pictures.max() <= 1
    assert torch.equal(pictures, show(patched, context, {"samples": torch.zeros(2, 4, 16, 12)})[0])
    assert names.splitlines()[0] == "1: input 1.0"
    assert names.splitlines()[4] == "5: output 11.0"


def test_the_same_is_asked_under_both_interfaces(comfy):
    older = comfy("V1")
    asked = older.TokenFusionNode.INPUT_TYPES()["optional"]
    newer = comfy("V3")
    inputs = newer.TokenFusionNode.define_schema().inputs[1:]
    assert [i.name for i in inputs] == list(asked)
    kinds = {"Combo": list, "Boolean": "BOOLEAN", "Int": "INT", "Float": "FLOAT"}
    for one in inputs:
        kind, told = asked[one.name]
        assert kinds[type(one).__name__] in (kind, type(kind))
        assert (one.default, one.tooltip, one.optional) == (told["default"], told["tooltip"], True)
        assert getattr(one, "max", None) == told.get("max")
        assert getattr(one, "extra_dict", {}).get("advanced") == told.get("advanced")
    schemas = [newer.TokenFusionNode.define_schema(), newer.TokenFusionMapNode.define_schema()]
    for schema, node in zip(schemas, (older.TokenFusionNode, older.TokenFusionMapNode), strict=True):
        assert (schema.category, schema.search_aliases) == (node.CATEGORY, node.SEARCH_ALIASES)
        assert node.CATEGORY == "model/patch/unet"
        assert {"tome", "token merging", "speed"} <= set(node.SEARCH_ALIASES)
    assert not {"seed", "noise_seed"} & set(asked)  # the program would put a widget of its own beside them


def test_what_nobody_changes_is_the_default_of_the_package(comfy, model):
    nodes = comfy("V1")
    asked = nodes.TokenFusionNode.INPUT_TYPES()["optional"]
    untouched = nodes.patch_with_preset(model, **{name: told["default"] for name, (_, told) in asked.items()})
    assert patches_of(untouched).config == patches_of(nodes.patch_with_preset(model)).config == TokenFusionConfig()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0.9}, "ratio is 0.9; it must be a number from 0 to 0.75"),
        ({"start_percent": 0.8, "end_percent": 0.2}, "start must come before end"),
        ({"early": "average"}, "unknown reduction 'average'"),
    ],
)
def test_bad_input_is_told_in_words_and_patches_nothing(comfy, model, options, said):
    with pytest.raises(ValueError, match=said):
        comfy("V1").patch_with_preset(model, **options)
    assert model.model_options == {"transformer_options": {}}


def test_a_person_meets_a_preset_and_a_ratio_first(comfy):
    asked = comfy("V1").TokenFusionNode.INPUT_TYPES()["optional"]
    assert [name for name, (_, told) in asked.items() if not told.get("advanced")] == ["preset", "ratio"]
    assert next(iter(asked)) == "preset"
    assert asked["preset"][0] == ["tofu", "tofu-fast", "faithful", "tome", "custom"]


@pytest.mark.parametrize("name", ["tofu", "tofu-fast", "faithful", "tome"])
def test_a_preset_is_the_recipe_of_its_name_at_any_ratio(comfy, model, name, caplog):
    nodes = comfy("V1")
    fusion = patches_of(nodes.patch_with_preset(model, preset=name, ratio=0.25, levels=2, start_percent=0.2)).config
    assert fusion == TokenFusionConfig.of(RECIPES[name], ratio=0.25, levels=2, start=0.2)
    assert not caplog.text


def test_an_input_that_does_not_count_is_named_in_the_log(comfy, model, caplog):
    nodes = comfy("V1")
    fusion = patches_of(nodes.patch_with_preset(model, preset="tofu", window=4, early="mean", late="mlerp")).config
    assert fusion == TokenFusionConfig()
    assert "early, window are ignored, as preset is tofu and not custom" in caplog.text
    tooltip = nodes.TokenFusionNode.INPUT_TYPES()["optional"]["preset"][1]["tooltip"]
    assert "early, late, depth_split, proportional, kv_only, window; their inputs are used only with custom" in tooltip


def test_an_unknown_preset_is_refused_by_name(comfy, model):
    with pytest.raises(ValueError, match=r"unknown preset 'faithfull' \(did you mean 'faithful'\?\); known: tofu,"):
        comfy("V1").patch_with_preset(model, preset="faithfull")


OLDER = [0.5, "mean", "mean", -1, True, False, 1, 0.0, 1.0, -1, 8, 1, False, 0]  # as the screen saved them


def test_a_workflow_from_before_there_were_presets_gives_the_same(comfy, model):
    nodes = comfy("V1")
    names = list(nodes.TokenFusionNode.INPUT_TYPES()["optional"])
    before = dict(zip(names[1:], OLDER, strict=True))
    assert patches_of(nodes.patch_with_preset(model, **before)).config == RECIPES["faithful"]
    assert patches_of(nodes.patch_with_preset(model, ratio=0.25)).config == TokenFusionConfig(0.25)
    assert patches_of(nodes.patch_with_preset(model, preset="custom", **before)).config == RECIPES["faithful"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_screen_reads_such_a_workflow(tmp_path):
    """Where values are stored by their order alone."""
    code = (ROOT / "web" / "token_fusion.js").read_text().replace('import { app } from "../../scripts/app.js";', "")
    code = "const app = { registerExtension() {} };" + code
    (tmp_path / "fusion.mjs").write_text(code)
    node = {"type": "TokenFusion", "widgets_values": OLDER}
    graph = {
        "nodes": [node, {"type": "Note", "widgets_values": OLDER}],
        "definitions": {"subgraphs": [{"nodes": [node]}]},
    }
    (tmp_path / "run.mjs").write_text(
        f"import {{ addPreset }} from './fusion.mjs'; const graph = {json.dumps(graph)};"
        "addPreset(graph); addPreset(graph); console.log(JSON.stringify(graph));"
    )
    done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)
    read = json.loads(done.stdout)
    ours = [read["nodes"][0], read["definitions"]["subgraphs"][0]["nodes"][0]]
    assert all(node["widgets_values"] == ["custom", *OLDER] for node in ours)
    assert read["nodes"][1]["widgets_values"] == OLDER


def test_the_example_sets_what_the_node_asks_for_and_no_node_covers_another(comfy):
    """Where the program looks for it; a row is up to 36 pixels high there, and a title 40."""
    workflow = json.loads((ROOT / "example_workflows" / "token-fusion.json").read_text())
    asked = comfy("V1").TokenFusionNode.INPUT_TYPES()["optional"]
    [ours] = [node for node in workflow["nodes"] if node["type"] == "TokenFusion"]
    for (name, (kind, told)), value in zip(asked.items(), ours["widgets_values"], strict=True):
        assert value in kind if isinstance(kind, list) else told.get("min", 0) <= value <= told.get("max", 1), name
    boxes = {}
    for node in workflow["nodes"]:
        rows = max(len(node.get("inputs", ())), len(node.get("outputs", ()))) + len(node.get("widgets_values", ()))
        if node["type"] == "TokenFusion":
            rows = 4  # the others are hidden until they are asked for
        (x, y), (w, h) = node["pos"], node["size"]
        boxes[node["id"]] = (x, y, x + w, y + max(h, 40 + 36 * rows))
    for a, b in itertools.combinations(boxes.values(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_a_map_of_a_model_whose_blocks_another_node_has_says_so(comfy, model):
    nodes, context = comfy("V1"), torch.zeros(1, 7, 16)
    patched = nodes.patch_with_preset(model)
    patched.set_model_attn1_patch(lambda q, k, v, options: (q, k[:, ::2], v[:, ::2]))
    with pytest.raises(ValueError, match=r"nothing is merged at 0\.5 of the sampling: another node changes the tokens"):
        nodes.show(patched, context, {"samples": torch.zeros(1, 4, 16, 16)})


def test_attention_that_another_node_overrides_runs_where_nothing_is_merged(comfy, model):
    """The weighted blocks take the place of the program's attention, and hand on what they do not merge."""
    nodes, sizes = comfy("V1"), []
    inputs = tiny.inputs(model.model.diffusion_model.unet)

    def override(function, q, k, v, heads):
        sizes.append(k.shape[1])
        return function(q, k, v, heads, None)

    patched = nodes.patch_with_preset(model, preset="faithful", min_tokens=64, start_percent=0.6)
    told = patched.model_options["transformer_options"]
    told["optimized_attention_override"] = override
    patched.predict(inputs["sample"], 500, inputs["encoder_hidden_states"])
    assert sizes.count(256) == 5
    sizes.clear()
    patched.predict(inputs["sample"], 100, inputs["encoder_hidden_states"])
    assert not sizes


def test_the_log_does_not_name_a_size(comfy, model, monkeypatch):
    nodes, said = comfy("V1"), []
    monkeypatch.setattr(nodes.logger, "info", said.append)
    nodes.patch_with_preset(model, ratio=0.25)
    assert said == ["UNetModel: tofu-r25 on 5 of 16 transformer blocks"]


def test_a_model_that_fuses_nothing_has_no_maps(comfy, model):
    nodes, context = comfy("V1"), torch.zeros(1, 7, 16)
    with pytest.raises(ValueError, match="this model merges no tokens: put Token Fusion"):
        nodes.show(model, context, {"samples": torch.zeros(1, 4, 16, 16)})
    late = nodes.patch_with_preset(model, start_percent=0.6)
    with pytest.raises(ValueError, match=r"nothing is merged at 0\.5 of the sampling: the step lies outside start_per"):
        nodes.show(late, context, {"samples": torch.zeros(1, 4, 16, 16)})


@pytest.mark.parametrize("interface", ["V1", "V3"])
def test_the_folder_is_loaded_as_the_program_loads_it(comfy, monkeypatch, interface):
    """Under a name made of its path, with one of the two interfaces; tofu_sd stays one package."""
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


def test_the_folder_is_nothing_to_who_else_comes_by(monkeypatch):
    """As pytest does, which takes it for a package that the tests are in."""
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
def test_the_package_is_imported_in_the_folder_above_a_clone_of_its_name(tmp_path, code):
    """Where Python finds this folder's own file first, in a script as at the prompt."""
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
def said(tmp_path_factory):
    return run_in_comfyui("comfyui_run.py", tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return run_in_comfyui("comfyui_server.py", tmp_path_factory.mktemp("server"), str(PROGRAM))


@pytest.mark.parametrize(("kind", "blocks"), [("sd15", "5 of 16"), ("sdxl", "10 of 70")])
def test_in_comfyui_the_blocks_of_the_highest_resolution_are_fused(said, kind, blocks):
    assert f"on {blocks} transformer blocks" in said[kind]["headline"]
    assert said[kind]["changed"] > 1e-4


LAWS = [
    "ratio 0 is bit-equal", "the model beside it is bit-equal", "two clones at once", "the same seed", "the window",
    "nobody else's dice", "odd latents run", "interrupted it is the same again", "HyperTile before it",
    "HyperTile after it", "HyperTile on other blocks", "Deep Shrink beside it",
    "beside the built-in merging tokens are not merged twice", "PAG acts beside four levels",
    "SAG acts beside four levels", "the window is that of the sampling",
]  # fmt: skip
COMPILED = ["plain then half then plain", "half then most then half", "weighted then half then weighted",
            "half then plain"]  # fmt: skip


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("law", LAWS)
def test_in_comfyui_the_laws_hold(said, kind, law):
    assert said[kind]["laws"][law] is True


@pytest.mark.parametrize("order", COMPILED)
def test_in_comfyui_a_compiled_model_gives_the_image_of_its_settings(said, order):
    assert said["sd15"]["laws"][f"compiled, {order}"] is True


@pytest.mark.parametrize("model", ["sd15", "sdxl", "embedded"])
def test_in_comfyui_is_drawn_what_diffusers_draws(said, model):
    """The same weights, latent and words, one call of the model; both compare normed tokens."""
    found = said["embedded"] if model == "embedded" else said[model]["diffusers"]
    assert found["plain"] < 1e-4
    for method, distance in found["fused"].items():
        assert distance < 1e-4, method
    assert found["effect"] > 1e-2


def test_comfyuis_diffusion_transformers_are_refused_in_words(said):
    assert said["flux"]["said"].startswith("no eligible block in Flux: looked in input_blocks")
    assert said["flux"]["left as it was"] is True


def test_the_server_runs_the_example_workflow(served):
    """The repository as it is in custom_nodes/, the workflow file as it is but for its checkpoint, size and steps."""
    assert served["nodes"] == ["TokenFusion", "TokenFusionMap"]
    assert served["example"]["status"] == "success"
    assert len(served["example"]["outputs"]["10"]["images"]) == 5  # a map for each fused block
    assert "mean-r50-w8+p on 5 of 16 transformer blocks" in served["log"][0]
    assert served["plain"]["status"] == "success"


def test_the_server_runs_a_workflow_that_lacks_newer_inputs(served):
    assert served["older"]["status"] == "success"
    assert "tofu-r50 on 5 of 16 transformer blocks" in served["log"][1]


def test_the_server_tells_what_is_wrong_in_words(served):
    [error] = served["wrong"]["refused"]["node_errors"]["2"]["errors"]
    assert error["message"] == "Value 0.9 bigger than max of 0.75"
    assert served["unfused"]["error"].startswith("this model merges no tokens: put Token Fusion (ToFu) before")
    assert served["flux"]["error"].startswith("no eligible block in Flux")


def test_the_server_shows_the_node_beside_its_own_patches(served):
    assert served["about"]["display_name"] == "Token Fusion (ToFu)"
    assert served["about"]["category"] == "model/patch/unet"
    inputs = served["about"]["input"]["optional"]
    assert inputs["ratio"][1]["max"] == 0.75
    assert all(told["tooltip"] for _, told in inputs.values())


def test_the_server_draws_the_same_after_a_picture_that_was_interrupted(served):
    """And what is drawn without the node is not touched by what was drawn with it."""
    assert served["stopped"]["status"] == "error"  # which is what the program calls it
    assert served["stopped"]["interrupted"] is True
    assert served["before"] == served["after"]
    assert len(set(served["before"])) == 2


def test_the_server_runs_the_example_with_a_checkpoint_file(served):
    """Of SD 1.5's layout and size, which the program's own loader takes for what it is."""
    assert served["file"]["status"] == "success"
    assert len(served["file"]["outputs"]["8"]["images"]) == 1
    assert len(served["file"]["outputs"]["10"]["images"]) == 5
    assert len(set(served["file"]["pictures"])) == 2  # another picture than without the node
    assert "UNetModel: mean-r50-w8+p on 5 of 16 transformer blocks" in served["log"][-1]
