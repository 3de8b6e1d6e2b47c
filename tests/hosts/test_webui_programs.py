"""The extension in the web UIs themselves, if there is a checkout that has been started once.

A1111=/folder/of/stable-diffusion-webui pytest tests/hosts/test_webui_programs.py. A1111_PYTHON names the interpreter
if its packages are in another environment. FORGE, NEO (Forge Neo) and REFORGE work the same way. Each program starts
with this repository in its extensions/ and generates images.
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
SCRIPTS = ROOT / "tests" / "helpers" / "programs"


@pytest.fixture(scope="module", params=["A1111", "FORGE", "NEO", "REFORGE"])
def server(request):
    """Returns the results of webui_server.py, which runs in a process of its own."""
    program, python = os.environ.get(request.param), os.environ.get(f"{request.param}_PYTHON", sys.executable)
    if not program:
        pytest.skip(f"{request.param} names no checkout")
    if request.param != "NEO" and not (Path(program) / "repositories").exists():
        pytest.skip(f"{program} has no repositories/: it was never started")
    process = subprocess.run(
        [python, str(SCRIPTS / "webui_server.py")], capture_output=True, text=True, cwd=program, timeout=2400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return {"program": request.param, **json.loads(process.stdout.splitlines()[-1])}


def test_checkpoint_file_has_the_published_sizes():
    """Programs detect a model by its sizes. diffusers counts the same number of weights."""
    assert sd15_file.counts() == [859_520_964, 83_653_863, 123_060_480]


ON = "ToFu ratio: 0.5, ToFu early: prune, ToFu late: mlerp"


def image(server, name, number=0):
    return server["images"][name]["hashes"][number]


def count_log_lines(server, name, words):
    """Returns in how many log lines the words occur."""
    return sum(words in line for line in server["images"][name]["log"])


def test_program_lists_the_extension_and_its_axes(server):
    assert server["arguments"][:3] == ["Token Fusion (ToFu)", "Ratio", "Hires ratio"]
    assert sum(axis.startswith("[ToFu] ") for axis in server["axes"]) == len(server["arguments"]) - 1 == 17


def test_program_generates_with_and_without_token_fusion(server):
    for same in ("off again", "ratio 0", "off at last"):
        assert image(server, same) == image(server, "off")
    assert "ToFu" not in server["images"]["off"]["saved"]
    assert image(server, "on") != image(server, "off")
    assert ON in server["images"]["on"]["saved"]
    assert count_log_lines(server, "on", "tofu-r50 on 5 of 16 transformer blocks") == 1
    assert image(server, "img2img") != image(server, "img2img off")
    assert image(server, "odd") != image(server, "odd off")  # the latent is 17 x 15


def test_request_sets_options_by_name(server):
    assert image(server, "by name") == image(server, "by place") != image(server, "on")
    assert "ToFu proportional: True, ToFu window: 8" in server["images"]["by name"]["saved"]


def test_hires_pass_has_its_own_ratio(server):
    assert "ToFu hires ratio: 0.25" in server["images"]["hires"]["saved"]
    first, *second = server["images"]["hires"]["log"]
    assert "mean-r50-w8+p on" in first
    assert second
    assert all("mean-r25-w8+p on" in line for line in second)


def test_invalid_option_is_logged_and_keeps_the_baseline_image(server):
    assert image(server, "out of range") == image(server, "off")
    assert count_log_lines(server, "out of range", "ratio is 0.9; it must be a number from") == 1
    assert image(server, "built-in") == image(server, "built-in alone") != image(server, "off")
    assert count_log_lines(server, "built-in", "merging is on, at 0.3") == 1
    assert "ToFu ratio: 0," in server["images"]["built-in"]["saved"]


def test_grid_axis_enables_token_fusion(server):
    assert image(server, "grid", 1) == image(server, "off")
    assert image(server, "grid", 2) == image(server, "on")


def test_interrupt_does_not_affect_the_next_image(server):
    """ "off at last" is the image after the interrupt."""
    assert 2 <= server["stopped at"] < 50
    assert image(server, "off at last") == image(server, "off")


def test_layers_tiled_by_hypertile_are_not_merged(server):
    if "tiled" not in server["images"]:
        pytest.skip("this program has no HyperTile of its own")
    assert image(server, "tiled") == image(server, "tiled alone") != image(server, "untiled")
    if server["program"] == "A1111":  # its HyperTile replaces `forward` of the layers, so nothing is patched
        assert count_log_lines(server, "tiled", "has a `forward` of its own") == 1
        assert "ToFu ratio: 0," in server["images"]["tiled"]["saved"]


def test_saved_defaults_are_loaded(server):
    """The default is saved before the start, for one field in both tabs."""
    assert server["saved default"] == [0.25, 0.25]
