"""The adapter in the UNets of Forge, Forge Neo and reForge, if there is a checkout.

Run FORGE=/folder/of/forge pytest tests/hosts/test_forge.py. FORGE_PYTHON names the interpreter if Forge's packages are
in another environment. NEO and REFORGE work the same way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers_reference
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests" / "helpers" / "programs"
CHECKS = ["ratio 0 is bit-equal", "the unpatched model is bit-equal", "two clones at once", "the same seed",
        "the window",
        "odd latents run", "a map made smaller in between",
        "with the built-in merging tokens are merged once"]  # fmt: skip


@pytest.fixture(scope="module", params=["FORGE", "NEO", "REFORGE"])
def results(request, tmp_path_factory):
    """Runs the checks in a process of their own. Returns the results and the folder of the predictions."""
    program, python = os.environ.get(request.param), os.environ.get(f"{request.param}_PYTHON", sys.executable)
    if not program:
        pytest.skip(f"{request.param} names no checkout")
    packages = ("packages_3rdparty", "modules_forge/packages", "repositories/huggingface_guess")
    paths = [program, *(f"{program}/{folder}" for folder in packages), str(ROOT), str(SCRIPTS)]
    folder = tmp_path_factory.mktemp("forge")
    process = subprocess.run(
        [python, str(SCRIPTS / "forge_run.py"), str(folder)], capture_output=True, text=True, cwd=program,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}, timeout=1500,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return {"folder": folder, **json.loads(process.stdout.splitlines()[-1])}


@pytest.mark.parametrize(("kind", "blocks"), [("sd15", "5 of 16"), ("sdxl", "10 of 70")])
def test_forge_merges_blocks_of_the_highest_resolution(results, kind, blocks):
    assert f"on {blocks} transformer blocks" in results[kind]["headline"]
    assert results[kind]["changed"] > 1e-3


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_forge_checks_pass(results, kind, check):
    assert results[kind]["checks"][check] is True


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_forge_prediction_matches_diffusers(results, kind):
    """One call of the model with the same weights, latent and prompt. Both match on normed tokens."""
    distances = diffusers_reference.read(kind, results["folder"] / kind, match_on="normed")
    assert max(distances["plain"], *distances["merged"].values()) < 1e-4, distances
    assert distances["effect"] > 1e-2
