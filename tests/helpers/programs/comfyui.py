"""Runs a script in ComfyUI's own Python: COMFYUI=/folder/of/it, COMFYUI_PYTHON=its interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "tests" / "helpers" / "programs"
TRANSFORMERS = SCRIPTS.parent / "comfy_transformers"
PROGRAM = os.environ.get("COMFYUI")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)


def run_in_comfyui(script, folder, *arguments):
    """Runs a script in a process of its own, as ComfyUI changes global state, and returns its JSON results."""
    if not PROGRAM:
        pytest.skip("COMFYUI names no checkout of ComfyUI")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (PROGRAM, SCRIPTS, TRANSFORMERS))),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [PYTHON, str(SCRIPTS / script), *arguments], env=environment, capture_output=True, text=True,
        cwd=folder, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
