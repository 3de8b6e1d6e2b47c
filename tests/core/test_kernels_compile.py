"""The Triton kernels compile for a GPU: the interpreter, which other tests use, accepts more than the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.3")  # whose compiler takes these arguments
PROGRAM = Path(__file__).parents[1] / "helpers" / "programs" / "compile_kernels.py"


def test_every_kernel_compiles_without_a_gpu(tmp_path: Path) -> None:
    """In a process of its own, as kernels are interpreted in this one. A cache would hide a failure."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert {line.split()[0] for line in run.stdout.splitlines()} == {
        "_lengths", "_nearest", "_build_map", "_merge", "_take", "_pair_up", "_map_of_groups"
    }  # fmt: skip
