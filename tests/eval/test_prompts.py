"""eval.prompts prints lists of prompts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eval import prompts as prompts_module

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["demo", "textures"])
def test_stored_list_is_what_the_command_prints(capsys, name):
    assert prompts_module.main([name]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


def test_closed_pipe_ends_the_command():
    """As `head` does."""
    pytest.importorskip("torchvision", reason="the class names of ImageNet are torchvision's")
    listing = f"{sys.executable} -m eval.prompts imagenet1k | head -1"
    output = subprocess.run(["bash", "-c", f"set -o pipefail; {listing}"], capture_output=True, text=True)
    assert (output.returncode, output.stdout.count("\n"), output.stderr) == (141, 1, "")
