"""The extension in web UIs themselves, wherever there is a checkout of one that has been started once.

A1111=/folder/of/stable-diffusion-webui pytest tests/hosts/test_webui_programs.py, by A1111_PYTHON if its packages are
another environment's; FORGE, NEO (Forge Neo) and REFORGE likewise. Each is started with this repository in its
extensions/, and asked for pictures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sd15_file

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"


@pytest.fixture(scope="module", params=["A1111", "FORGE", "NEO", "REFORGE"])
def server(request):
    """What a program drew, in a process of its own."""
    program, python = os.environ.get(request.param), os.environ.get(f"{request.param}_PYTHON", sys.executable)
    if not program:
        pytest.skip(f"{request.param} names no checkout")
    if request.param != "NEO" and not (Path(program) / "repositories").exists():
        pytest.skip(f"{program} has no repositories/: it was never started")
    ran = subprocess.run(
        [python, str(HELPERS / "webui_server.py")], capture_output=True, text=True, cwd=program, timeout=2400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {"program": request.param, **json.loads(ran.stdout.splitlines()[-1])}


def test_the_file_that_is_drawn_with_has_the_sizes_of_what_is_published():
    """As the programs know a model by them; diffusers counts the same (test_eval_standin.py)."""
    assert sd15_file.counts() == [859_520_964, 83_653_863, 123_060_480]


ON = "ToFu ratio: 0.5, ToFu early: prune, ToFu late: mlerp"


def picture(server, name, number=0):
    return server["drawn"][name]["pictures"][number]


def said(server, name, words):
    """How often."""
    return sum(words in line for line in server["drawn"][name]["said"])


def test_the_program_shows_the_extension_and_its_axes(server):
    assert server["arguments"][:3] == ["Token Fusion (ToFu)", "Ratio", "Hires ratio"]
    assert sum(axis.startswith("[ToFu] ") for axis in server["axes"]) == len(server["arguments"]) - 1 == 15


def test_it_draws_with_it_and_without_it(server):
    for same in ("off again", "ratio 0", "off at last"):
        assert picture(server, same) == picture(server, "off")
    assert "ToFu" not in server["drawn"]["off"]["saved"]
    assert picture(server, "on") != picture(server, "off")
    assert ON in server["drawn"]["on"]["saved"]
    assert said(server, "on", "tofu-r50 on 5 of 16 transformer blocks") == 1
    assert picture(server, "img2img") != picture(server, "img2img off")
    assert picture(server, "odd") != picture(server, "odd off")  # a latent of 17 x 15


def test_a_request_can_name_the_options(server):
    assert picture(server, "by name") == picture(server, "by place") != picture(server, "on")
    assert "ToFu proportional: True, ToFu window: 8" in server["drawn"]["by name"]["saved"]


def test_the_second_pass_has_its_own_ratio(server):
    assert "ToFu hires ratio: 0.25" in server["drawn"]["hires"]["saved"]
    first, *second = server["drawn"]["hires"]["said"]
    assert "mean-r50-w8+p on" in first
    assert second
    assert all("mean-r25-w8+p on" in line for line in second)


def test_what_cannot_be_done_is_told_and_drawn_without_it(server):
    assert picture(server, "out of range") == picture(server, "off")
    assert said(server, "out of range", "ratio is 0.9; it must be a number from") == 1
    assert picture(server, "built-in") == picture(server, "built-in alone") != picture(server, "off")
    assert said(server, "built-in", "merging is on, at 0.3") == 1
    assert "ToFu ratio: 0," in server["drawn"]["built-in"]["saved"]


def test_an_axis_of_the_grid_switches_it_on(server):
    assert picture(server, "grid", 1) == picture(server, "off")
    assert picture(server, "grid", 2) == picture(server, "on")


def test_interrupted_in_the_middle_it_leaves_nothing_behind(server):
    """The picture after it, which is "off at last"."""
    assert 2 <= server["stopped at"] < 50
    assert picture(server, "off at last") == picture(server, "off")


def test_what_hypertile_has_cut_into_tiles_is_left_alone(server):
    if "tiled" not in server["drawn"]:
        pytest.skip("this program has no HyperTile of its own")
    assert picture(server, "tiled") == picture(server, "tiled alone") != picture(server, "untiled")
    if server["program"] == "A1111":  # it holds the layers themselves, so nothing is patched
        assert said(server, "tiled", "has a `forward` of its own") == 1
        assert "ToFu ratio: 0," in server["drawn"]["tiled"]["saved"]


def test_what_was_saved_as_a_default_is_on_the_screen(server):
    """Written before the start, one field in both tabs."""
    assert server["saved default"] == [0.25, 0.25]
