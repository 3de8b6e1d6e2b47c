"""A broken installation is explained in words."""

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


def run_with(path, use):
    code = f"import tofu_sd\ntry: {use}\nexcept Exception as e: print(type(e).__name__, e)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout


@pytest.mark.parametrize("use", USES)
def test_a_torchvision_of_another_build_is_named_with_the_way_out(tmp_path, use):
    """A CUDA torchvision beside a CPU torch makes transformers and diffusers fail with an unrelated message."""
    package, info = tmp_path / "torchvision", tmp_path / "torchvision-9.9.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 9.9\n")
    said = run_with(tmp_path, use)
    assert said.startswith("ImportError torchvision 9.9 does not work with torch")
    assert "torchvision::nms" in said
    assert "pip install -U torch torchvision" in said


def test_a_sound_installation_goes_on_to_the_model():
    assert run_with("", APPLY).startswith("TypeError NoneType has no `unet`")


def test_programs_without_diffusers_need_torch_alone():
    """AUTOMATIC1111 has none, and ComfyUI need not: all that is between them and the core imports without it."""
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
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout.strip() == "imported", ran.stderr
