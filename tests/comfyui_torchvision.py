"""Lets ComfyUI import a torchvision built for CUDA beside a torch for CPUs: two of its operators are declared."""

import torch

if "+cpu" in torch.__version__:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
