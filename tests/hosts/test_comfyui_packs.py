"""The ComfyUI nodes together with third-party node packs, if there are checkouts of the packs and of ComfyUI.

Run COMFYUI=/folder/of/ComfyUI COMFYUI_PACKS=/folder pytest tests/hosts/test_comfyui_packs.py. The folder holds
ComfyUI-AnimateDiff-Evolved, sd-perturbed-attention and ComfyUI-Advanced-ControlNet; a missing pack is skipped.
COMFYUI_PYTHON names the interpreter if ComfyUI's packages are in another environment.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from comfyui import run_in_comfyui

PACKS = os.environ.get("COMFYUI_PACKS")
REPLACED = "Token Fusion skips blocks: another node replaces its self-attention (as PAG, SEG and SAG do)"
ALTERED = "Token Fusion skips blocks: another node replaces a `forward` in it (as reference ControlNets do)"


def run_with_pack(name, part, tmp_path_factory):
    """Returns the results of one part of comfyui_packs.py with a pack loaded."""
    if not PACKS or not (Path(PACKS) / name).is_dir():
        pytest.skip(f"COMFYUI_PACKS names no folder with {name}")
    return run_in_comfyui("comfyui_packs.py", tmp_path_factory.mktemp("packs"), PACKS, part)[part]


@pytest.fixture(scope="module")
def animatediff(tmp_path_factory):
    return run_with_pack("ComfyUI-AnimateDiff-Evolved", "animatediff", tmp_path_factory)


@pytest.fixture(scope="module")
def guidance(tmp_path_factory):
    return run_with_pack("sd-perturbed-attention", "guidance", tmp_path_factory)


@pytest.fixture(scope="module")
def other_guidance(tmp_path_factory):
    return run_with_pack("sd-perturbed-attention", "other_guidance", tmp_path_factory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run_with_pack("ComfyUI-Advanced-ControlNet", "reference", tmp_path_factory)


def test_config_changes_between_runs_with_motion_modules(animatediff):
    """Motion modules stay in the loaded model and must not count as its transformer blocks."""
    blocks = animatediff.pop("blocks")
    assert all(animatediff.values()), animatediff
    assert blocks == 5


@pytest.mark.parametrize("preset", ["faithful", "tofu"])
@pytest.mark.parametrize("where", ["middle", "one", "all", "by number"])
@pytest.mark.parametrize("kind", ["PAG", "SEG"])
def test_pag_and_seg_run_as_often_as_unpatched_on_the_whole_map(guidance, kind, where, preset):
    results = guidance[f"{kind}, {where}, {preset}"]
    alone, after, before = (results[order] for order in ("alone", "after", "before"))
    assert alone["calls"] == after["calls"] == before["calls"] > 0
    assert alone["sizes"] == after["sizes"] == before["sizes"]
    assert results["either order"] is results["acts"] is results["merges"] is results["finite"] is True
    assert after["messages"] == before["messages"] == ([] if where == "middle" else [REPLACED])


@pytest.mark.parametrize("preset", ["faithful", "tofu"])
def test_built_in_pag_runs_as_often_as_unpatched(guidance, preset):
    results = guidance[f"PAG, built in, {preset}"]
    assert results["alone"] == results["after"] == results["before"]
    assert results["alone"]["calls"] > 0
    assert results["either order"] is results["acts"] is results["merges"] is True


@pytest.mark.parametrize("kind", ["NAG", "PLADIS", "SWG", "FDG", "Momentum", "SMC", "TPG, one", "TPG, all"])
def test_other_guidance_nodes_act_in_either_order(other_guidance, kind):
    """TPG wraps blocks, which stay unmerged. All other nodes leave self-attention unchanged."""
    if kind not in other_guidance:
        pytest.skip("an older pack")
    results = other_guidance[kind]
    blocks, messages = {"TPG, one": (4, [ALTERED]), "TPG, all": (0, [ALTERED])}.get(kind, (5, []))
    assert (results.pop("blocks"), results.pop("messages")) == (blocks, messages)
    assert results.pop("merges") is (blocks > 0)
    assert all(results.values()), results


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["reference_attn", "reference_adain", "reference_attn+adain"])
def test_reference_controlnet_blocks_are_skipped_with_a_message(reference, kind, strength):
    results = reference[f"{kind}, {strength}"]
    assert (
        results["acts"] is results["finite"] is results["same as without Token Fusion"] is results["restored"] is True
    )
    assert results["merged"] == 0
    assert results["messages"] == [ALTERED]


@pytest.mark.parametrize("order", ["before", "after"])
def test_blocks_with_keys_of_a_reference_image_are_skipped_with_a_message(reference, order):
    """ReferenceOnlySimple adds such keys."""
    results = reference[f"doubled keys, {order}"]
    assert results["same as without Token Fusion"] is True
    assert results["merged"] == 0
    [line] = results["messages"]
    assert "another node changes the tokens of its self-attention first" in line
