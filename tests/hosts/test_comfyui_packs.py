"""The ComfyUI nodes beside node packs of other people, where there are checkouts of these and of ComfyUI.

COMFYUI=/folder/of/ComfyUI COMFYUI_PACKS=/folder pytest tests/hosts/test_comfyui_packs.py: the folder holds
ComfyUI-AnimateDiff-Evolved, sd-perturbed-attention and ComfyUI-Advanced-ControlNet, each only if it is to be run. By
COMFYUI_PYTHON, if the packages are another environment's.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from comfyui import run_in_comfyui

PACKS = os.environ.get("COMFYUI_PACKS")
REPLACED = "Token Fusion skips blocks: another node replaces its self-attention (as PAG, SEG and SAG do)"
ALTERED = "Token Fusion skips blocks: another node replaces a `forward` in it (as reference ControlNets do)"


def beside(name, part, tmp_path_factory):
    """What was found beside a pack."""
    if not PACKS or not (Path(PACKS) / name).is_dir():
        pytest.skip(f"COMFYUI_PACKS names no folder with {name}")
    return run_in_comfyui("comfyui_packs.py", tmp_path_factory.mktemp("packs"), PACKS, part)[part]


@pytest.fixture(scope="module")
def animated(tmp_path_factory):
    return beside("ComfyUI-AnimateDiff-Evolved", "animated", tmp_path_factory)


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    return beside("sd-perturbed-attention", "guided", tmp_path_factory)


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    return beside("sd-perturbed-attention", "steered", tmp_path_factory)


@pytest.fixture(scope="module")
def referenced(tmp_path_factory):
    return beside("ComfyUI-Advanced-ControlNet", "referenced", tmp_path_factory)


def test_beside_motion_modules_the_settings_change_between_runs(animated):
    """They stay in the loaded model, where they are not taken for blocks of its own."""
    blocks = animated.pop("blocks")
    assert all(animated.values()), animated
    assert blocks == 5


@pytest.mark.parametrize("preset", ["faithful", "tofu"])
@pytest.mark.parametrize("where", ["middle", "one", "all", "by number"])
@pytest.mark.parametrize("kind", ["PAG", "SEG"])
def test_guidance_is_called_as_often_as_without_and_sees_the_whole_map(guided, kind, where, preset):
    found = guided[f"{kind}, {where}, {preset}"]
    alone, after, before = (found[order] for order in ("alone", "after", "before"))
    assert alone["calls"] == after["calls"] == before["calls"] > 0
    assert alone["sizes"] == after["sizes"] == before["sizes"]
    assert found["either order"] is found["acts"] is found["fuses"] is found["finite"] is True
    assert after["said"] == before["said"] == ([] if where == "middle" else [REPLACED])


@pytest.mark.parametrize("preset", ["faithful", "tofu"])
def test_so_is_the_built_in_one(guided, preset):
    found = guided[f"PAG, built in, {preset}"]
    assert found["alone"] == found["after"] == found["before"]
    assert found["alone"]["calls"] > 0
    assert found["either order"] is found["acts"] is found["fuses"] is True


@pytest.mark.parametrize("kind", ["NAG", "PLADIS", "SWG", "FDG", "Momentum", "SMC", "TPG, one", "TPG, all"])
def test_its_other_nodes_act_in_either_order(steered, kind):
    """TPG wraps blocks, which are left to it; all others leave self-attention alone."""
    if kind not in steered:
        pytest.skip("an older pack")
    found = steered[kind]
    blocks, said = {"TPG, one": (4, [ALTERED]), "TPG, all": (0, [ALTERED])}.get(kind, (5, []))
    assert (found.pop("blocks"), found.pop("said")) == (blocks, said)
    assert found.pop("fuses") is (blocks > 0)
    assert all(found.values()), found


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["reference_attn", "reference_adain", "reference_attn+adain"])
def test_beside_a_reference_blocks_are_left_to_it_and_that_is_said(referenced, kind, strength):
    found = referenced[f"{kind}, {strength}"]
    assert found["acts"] is found["finite"] is found["as without"] is found["without it"] is True
    assert found["fused"] == 0
    assert found["said"] == [ALTERED]


@pytest.mark.parametrize("order", ["before", "after"])
def test_so_they_are_beside_a_node_that_adds_keys_of_another_picture(referenced, order):
    """As ReferenceOnlySimple does."""
    found = referenced[f"doubled keys, {order}"]
    assert found["as without"] is True
    assert found["fused"] == 0
    [line] = found["said"]
    assert "another node changes the tokens of its self-attention first" in line
