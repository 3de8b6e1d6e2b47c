"""Compiles every Triton kernel for a GPU, which need not be there; prints their names."""

from __future__ import annotations

import importlib
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)  # H100, H200
POINTERS = {"at": "*i64", "src": "*i64", "dst": "*i64", "kept": "*i64", "group": "*i64", "target": "*i64",
            "order": "*i32", "start": "*i32", "place": "*i32", "sorted": "*i32", "best": "*fp32", "log": "*fp32",
            "length": "*fp32", "fours": "*i64", "pairs": "*i64", "members": "*i64", "rest": "*i64",
            "cosine": "*fp32"}  # fmt: skip
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("nearest", "_lengths", {"ROWS": 4, "CHANNELS": 512}),
    ("nearest", "_nearest", {"MEASURED": True, "ROWS": 64, "COLS": 128, "CHANNELS": 64}),
    ("nearest", "_nearest", {"MEASURED": False, "ROWS": 64, "COLS": 64, "CHANNELS": 64}),
    ("build_map", "_build_map", {"LISTED": True, "BLOCK": 4096}),
    ("build_map", "_build_map", {"LISTED": False, "BLOCK": 1024}),
    ("merge", "_merge", {"FIRST": 0, "LAST": 0, "TWO": False, "CHANNELS": 512, "ROWS": 4, "CHUNK": 32}),
    ("merge", "_merge", {"FIRST": 1, "LAST": 2, "TWO": True, "CHANNELS": 512, "ROWS": 4, "CHUNK": 32}),
    ("pairs", "_pair_up", {"ROWS": 8, "CHANNELS": 64}),
    ("map_of_groups", "_map_of_groups", {"G": 2, "BLOCK": 2048}),
    ("map_of_groups", "_map_of_groups", {"G": 4, "BLOCK": 1024}),
    ("take", "_take", {"ROWS": 4, "CHANNELS": 512}),
]


def main() -> None:
    for module, name, constants in CASES:
        kernel = getattr(importlib.import_module(f"tofu_sd.kernels.triton.{module}"), name)
        for tokens in ("*bf16", "*fp32"):
            signature = {
                argument: "constexpr" if argument in constants else _type(argument, tokens)
                for argument in kernel.arg_names
            }
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            triton.compile(source, target=TARGET, options={"num_warps": 4})
            print(name, tokens, constants)


def _type(argument: str, tokens: str) -> str:
    return POINTERS.get(argument.removesuffix("_ptr"), tokens) if argument.endswith("_ptr") else "i32"


if __name__ == "__main__":
    main()
