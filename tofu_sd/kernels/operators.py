"""Functions that a compiler takes as they are, and whether one is at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def _never() -> bool:
    return False


is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", _never)  # torch 2.3 brought it


def refuse_export() -> None:
    """RuntimeError where the model is being traced or exported in a way that a patch does not survive.

    A trace would keep the matching of one image size and one step. ONNX has no form of the matching. torch.compile and
    torch.export take a patched model.
    """
    if getattr(torch.compiler, "is_dynamo_compiling", _never)():
        return
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError("a patched model cannot be exported to ONNX: call tofu_sd.remove_patch before the export")
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            "torch.jit.trace would keep the matching of one image size: call tofu_sd.remove_patch before tracing, or "
            "use torch.compile or torch.export, which take a patched model"
        )


def operator(name: str, schema: str, shapes: Callable[..., Any]) -> Callable[[Function], Function]:
    """Registers a function with torch under `name`; `shapes` gives empty tensors like its results.

    Before torch 2.4, on which some web UIs still run, the function stays what it is, and a compiler looks into it.
    """

    def register(function: Function) -> Function:
        if not hasattr(torch.library, "custom_op"):
            return function
        op: Any = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        op.register_fake(shapes)
        return op

    return register
