"""Lets ComfyUI import with packages that do not match torch.

For a torchvision built for CUDA and a torch for CPUs, two of its operators are declared. An empty module replaces a
missing torchaudio, as no test uses audio.
"""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

import torch

if "+cpu" in torch.__version__:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
if importlib.util.find_spec("torchaudio") is None:
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)  # importlib.util.find_spec reads it
