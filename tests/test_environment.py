"""A broken installation is explained in words."""

import os
import subprocess
import sys

CALL = "import tofu_sd\ntry: tofu_sd.apply_patch(None)\nexcept Exception as e: print(type(e).__name__, e)"


def run_with(path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path])}
    return subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, env=env, check=True).stdout


def test_a_torchvision_of_another_build_is_named_with_the_way_out(tmp_path):
    """A CUDA torchvision beside a CPU torch makes transformers and diffusers fail with an unrelated message."""
    package, info = tmp_path / "torchvision", tmp_path / "torchvision-9.9.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 9.9\n")
    said = run_with(tmp_path)
    assert said.startswith("ImportError torchvision 9.9 does not work with torch")
    assert "torchvision::nms" in said
    assert "pip install -U torch torchvision" in said


def test_a_sound_installation_goes_on_to_the_model():
    assert run_with("").startswith("TypeError NoneType has no `unet`")
