"""Errors of a broken installation name the package and the fix."""

import os
import subprocess
import sys

import pytest

APPLY = "tofu_sd.apply_patch(None)"
USES = [
    APPLY,
    "tofu_sd.demo.load()",
    "import research.demo_training.check",
    "import research.demo_training.train",
]


def run_with_path(path, use):
    code = f"import tofu_sd\ntry: {use}\nexcept Exception as e: print(type(e).__name__, e)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout


@pytest.mark.parametrize("use", USES)
def test_incompatible_torchvision_raises_with_the_fix(tmp_path, use):
    """A CUDA torchvision with a CPU torch makes transformers and diffusers fail with an unrelated message."""
    package, info = tmp_path / "torchvision", tmp_path / "torchvision-9.9.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 9.9\n")
    message = run_with_path(tmp_path, use)
    assert message.startswith("ImportError torchvision 9.9 does not work with torch")
    assert "torchvision::nms" in message
    assert "pip install -U torch torchvision" in message


def test_working_installation_reaches_the_model_check():
    assert run_with_path("", APPLY).startswith("TypeError NoneType has no `unet`")


def test_hosts_without_diffusers_need_only_torch():
    """AUTOMATIC1111 and ComfyUI may lack diffusers; the modules between them and the core import without it."""
    script = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "transformers", "accelerate", "safetensors", "PIL", "matplotlib"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import tofu_sd
from tofu_sd.hosts import ldm
from tofu_sd.hosts.programs import model_patcher, ui_options
print("imported")
"""
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert completed.stdout.strip() == "imported", completed.stderr
