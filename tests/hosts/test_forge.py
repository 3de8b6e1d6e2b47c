"""The adapter in Forge's own UNet, and in Forge Neo's and reForge's, where there is a checkout of it.

FORGE=/folder/of/forge pytest tests/hosts/test_forge.py, by FORGE_PYTHON if its packages are another environment's;
NEO and REFORGE likewise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import twins

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
LAWS = ["ratio 0 is bit-equal", "the model beside it is bit-equal", "two clones at once", "the same seed", "the window",
        "odd latents run", "a map made smaller in between",
        "beside the built-in merging tokens are not merged twice"]  # fmt: skip


@pytest.fixture(scope="module", params=["FORGE", "NEO", "REFORGE"])
def said(request, tmp_path_factory):
    """What was found, in a process of its own, and the folder of what was drawn."""
    program, python = os.environ.get(request.param), os.environ.get(f"{request.param}_PYTHON", sys.executable)
    if not program:
        pytest.skip(f"{request.param} names no checkout")
    packages = ("packages_3rdparty", "modules_forge/packages", "repositories/huggingface_guess")
    paths = [program, *(f"{program}/{folder}" for folder in packages), str(ROOT), str(HELPERS)]
    folder = tmp_path_factory.mktemp("forge")
    ran = subprocess.run(
        [python, str(HELPERS / "forge_run.py"), str(folder)], capture_output=True, text=True, cwd=program,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}, timeout=1500,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {"folder": folder, **json.loads(ran.stdout.splitlines()[-1])}


@pytest.mark.parametrize(("kind", "blocks"), [("sd15", "5 of 16"), ("sdxl", "10 of 70")])
def test_in_forge_the_blocks_of_the_highest_resolution_are_fused(said, kind, blocks):
    assert f"on {blocks} transformer blocks" in said[kind]["headline"]
    assert said[kind]["changed"] > 1e-3


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_in_forge_the_laws_hold(said, kind, law):
    assert said[kind]["laws"][law] is True


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_in_forge_is_drawn_what_diffusers_draws(said, kind):
    """The same weights, latent and words, one call of the model; both compare normed tokens. To rounding."""
    found = twins.read(kind, said["folder"] / kind, match_on="normed")
    assert max(found["plain"], *found["fused"].values()) < 1e-4, found
    assert found["effect"] > 1e-2
