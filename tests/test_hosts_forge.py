"""The adapter in Forge's own UNet, and the extension in Forge itself, where there is a checkout of it.

FORGE=/folder/of/forge pytest tests/test_hosts_forge.py, by FORGE_PYTHON if its packages are another environment's. The
second needs one that has been started once, with its repositories/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM, PYTHON = os.environ.get("FORGE"), os.environ.get("FORGE_PYTHON", sys.executable)
LAWS = ["ratio 0 is bit-equal", "the model beside it is bit-equal", "two clones at once", "the same seed", "the window",
        "odd latents run", "a map made smaller in between",
        "beside the built-in merging nothing is fused twice"]  # fmt: skip


def found_by(script):
    """What a script found, in a process of its own."""
    if not PROGRAM:
        pytest.skip("FORGE names no checkout of Forge")
    paths = [PROGRAM, f"{PROGRAM}/packages_3rdparty", f"{PROGRAM}/repositories/huggingface_guess",
             str(ROOT), str(ROOT / "tests")]  # fmt: skip
    ran = subprocess.run(
        [PYTHON, str(ROOT / "tests" / script)], capture_output=True, text=True, cwd=PROGRAM, timeout=1500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def said():
    return found_by("forge_run.py")


@pytest.fixture(scope="module")
def server():
    if PROGRAM and not (Path(PROGRAM) / "repositories" / "huggingface_guess").exists():
        pytest.skip("this checkout of Forge has no repositories/: it was never started")
    return found_by("forge_server.py")


@pytest.mark.parametrize(("kind", "blocks"), [("sd15", "5 of 16"), ("sdxl", "10 of 70")])
def test_in_forge_the_blocks_of_the_highest_resolution_are_fused(said, kind, blocks):
    assert f"on {blocks} transformer blocks" in said[kind]["headline"]
    assert said[kind]["changed"] > 1e-3


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_in_forge_the_laws_hold(said, kind, law):
    assert said[kind]["laws"][law] is True


# --- the program itself, with the extension in its folder -------------------------------------------------------------

ON = "ToFu ratio: 0.5, ToFu early: prune, ToFu late: mlerp"


def picture(server, name, number=0):
    return server["drawn"][name]["pictures"][number]


def test_forge_shows_the_extension_and_its_axes(server):
    assert server["arguments"][:3] == ["Token Fusion (ToFu)", "Ratio", "Hires ratio"]
    assert sum(axis.startswith("[ToFu] ") for axis in server["axes"]) == len(server["arguments"]) - 1 == 15


def test_forge_draws_with_it_and_without_it(server):
    for same in ("off again", "ratio 0", "off at last"):
        assert picture(server, same) == picture(server, "off")
    assert "ToFu" not in server["drawn"]["off"]["saved"]
    assert picture(server, "on") != picture(server, "off")
    assert ON in server["drawn"]["on"]["saved"]
    assert "tofu-r50 on 5 of 16 transformer blocks" in " ".join(server["drawn"]["on"]["said"])
    assert picture(server, "img2img") != picture(server, "img2img off")


def test_a_request_to_forge_can_name_the_options(server):
    assert picture(server, "by name") == picture(server, "by place") != picture(server, "on")
    assert "ToFu proportional: True, ToFu window: 8" in server["drawn"]["by name"]["saved"]


def test_forges_second_pass_has_its_own_ratio(server):
    assert "ToFu hires ratio: 0.25" in server["drawn"]["hires"]["saved"]
    first, *second = server["drawn"]["hires"]["said"]
    assert "mean-r50-w8+p on" in first
    # Forge asks twice for the second pass, at first with the first pass's model
    assert ["mean-r25-w8+p on" in line for line in second] == [True, True]


def test_what_cannot_be_done_is_told_and_forge_draws_without_it(server):
    assert picture(server, "out of range") == picture(server, "off")
    assert ["ratio is 0.9; it must lie between" in line for line in server["drawn"]["out of range"]["said"]] == [True]
    assert picture(server, "built-in") == picture(server, "built-in alone") != picture(server, "off")
    assert ["merging is on, at 0.3" in line for line in server["drawn"]["built-in"]["said"]] == [True]
    assert "ToFu ratio: 0," in server["drawn"]["built-in"]["saved"]


def test_an_axis_of_forges_grid_switches_it_on(server):
    assert picture(server, "grid", 1) == picture(server, "off")
    assert picture(server, "grid", 2) == picture(server, "on")
