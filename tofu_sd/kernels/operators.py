"""Custom operators, which a compiler does not trace, and whether a compiler is tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def _never() -> bool:
    return False


is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", _never)  # torch 2.3 brought it


is_dynamo_compiling: Callable[[], bool] = getattr(torch.compiler, "is_dynamo_compiling", _never)  # not in an export


def refuse_export() -> None:
    """Raises RuntimeError while a model is traced or exported in a way that does not support a patch.

    A trace would keep the matching of one image size and one step, and ONNX cannot express the matching. torch.compile
    and torch.export support a patched model.
    """
    if is_dynamo_compiling():
        return
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError("a patched model cannot be exported to ONNX: call tofu_sd.remove_patch before the export")
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            "torch.jit.trace would keep the matching of one image size: call tofu_sd.remove_patch before tracing, or "
            "use torch.compile or torch.export, which support a patched model"
        )


def operator(name: str, schema: str, shapes: Callable[..., Any]) -> Callable[[Function], Function]:
    """Registers a function as a custom operator of torch. A decorator.

    Before torch 2.4, which some web UIs still use, the function stays unchanged, and a compiler traces it.

    Args:
        name: of the operator, "library::name".
        schema: its signature.
        shapes: takes the same arguments and returns empty tensors like the results.
    """

    def register(function: Function) -> Function:
        if not hasattr(torch.library, "custom_op"):
            return function
        op: Any = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        op.register_fake(shapes)
        return op

    return register
