"""Lets ComfyUI import where packages beside torch do not fit it.

A torchvision built for CUDA beside a torch for CPUs: two of its operators are declared. No torchaudio for this torch:
an empty module stands in for it, as nothing here makes a sound.
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
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)  # whoever looks for it finds one
