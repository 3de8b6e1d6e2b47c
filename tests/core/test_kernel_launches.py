"""How many kernels a merged block launches on CUDA, counted with Triton's interpreter on a CPU.

One image of Stable Diffusion is bound by launches on a fast GPU, so each of them costs as much as an attention saves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny_transformers import MODELS
from torch.utils._python_dispatch import TorchDispatchMode

import tofu_sd
from tofu_sd import kernels, recipes
from tofu_sd.core import proportional

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels are Triton's, not its interpreter's", allow_module_level=True)
from triton.runtime import interpreter

from tofu_sd.kernels import triton as triton_kernels

NO_LAUNCH = {"alias", "detach", "empty", "expand", "new_empty", "select", "slice", "split", "split_with_sizes", "t",
             "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts torch's operators, except views and empty tensors, which launch nothing, and operators of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.counting = False
        self.inside = False  # a kernel, which the interpreter itself runs with torch's operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if not self.inside and name not in NO_LAUNCH and func.namespace != "tofu_sd":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Counts launches, while the CPU takes the path of CUDA with cuDNN's attention."""
    counter = Launches()
    run: Callable[..., Any] = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.names.append(self.fn.__name__)
        counter.inside = True
        try:
            return run(self, *args, **kwargs)
        finally:
            counter.inside = False

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    monkeypatch.setattr(kernels, "_launcher", lambda name, device: getattr(triton_kernels, name))
    monkeypatch.setattr(kernels, "can_run", lambda x: counter.counting)  # else the reference, as interpreting is slow
    monkeypatch.setattr(proportional, "FLASH_DEVICE", "cpu")
    monkeypatch.setattr(proportional, "flash_takes", lambda query, **more: True)
    monkeypatch.setattr(proportional, "uses_cudnn", lambda *args, **more: True)
    return counter


def launched(
    model: Any, inputs: dict[str, Any], counter: Launches, config: tofu_sd.TokenFusionConfig | None
) -> Counter[str]:
    """Returns the kernels of one step of a model in half precision; None for the baseline."""
    call = {name: x.half() if x.ndim and x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad(), nullcontext() if config is None else tofu_sd.patched(model, replace(config, min_tokens=0)):
        model(**call)  # the first step computes sources and destinations, which are kept
        counter.names.clear()
        counter.counting = True
        with counter:
            model(**call)
        counter.counting = False
    return Counter(counter.names)


METHODS = [
    # ToFu averages in the blocks of the up path; pruning copies instead, which is one launch too
    ("mlerp", ["_nearest", "_build_map", "_merge", "_take"]),
    ("tofu", ["_nearest", "_build_map", "_merge or _take", "_take"]),
    ("faithful", ["_nearest", "_build_map", "_merge", "_to_copy", "_take"]),
    ("asymmetric", ["_nearest", "_build_map", "_merge", "_to_copy", "_take"]),
    ("asymmetric@window=8", ["_nearest", "_build_map", "_merge", "_to_copy", "_take"]),
    ("kv:tome+p@matching=pairs@ratio=0.25", ["_pair_up", "_map_of_groups", "_merge", "_to_copy"]),
    ("asymmetric@matching=pairs@ratio=0.25", ["_pair_up", "_map_of_groups", "_merge", "_to_copy", "_take"]),
    ("asymmetric@matching=pairs", ["_pair_up", "_map_of_groups", "_merge", "_take"]),
    ("kv:tome+p", ["_nearest", "_build_map", "_merge", "_to_copy"]),
]


@pytest.mark.parametrize(("method", "each_block"), METHODS, ids=[method for method, _ in METHODS])
def test_a_merged_block_launches_at_most_five_kernels_more(
    method: str, each_block: list[str], launches: Launches
) -> None:
    """Matching, the map and both reductions take three launches, log n one, unmerging one."""
    unet = tiny.shallow_unet().half()
    blocks = 3
    inputs = tiny.inputs(unet, 8, 16, batch=1)  # few tokens, as each program of a kernel is interpreted
    more = launched(unet, inputs, launches, recipes.named(method))
    more.subtract(launched(unet, inputs, launches, None))
    # of tokens whose channels come first in memory: the norm makes the same copy itself, out of sight, in the baseline
    assert more.pop("clone") == blocks
    found = {name: count for name, count in more.items() if count}
    copies = "_merge or _take"
    if copies in each_block:
        found[copies] = found.pop("_merge") + found["_take"] - blocks
        found["_take"] = blocks
    assert found == dict.fromkeys(each_block, blocks)
    assert sum(more.values()) <= 5 * blocks


OF_STATES = {"_nearest": 1, "_build_map": 1, "_merge": 1}
OF_ROTARY = {**OF_STATES, "new_zeros": 1}  # and a mask, by which attention is reached
LOG_N = {"_to_copy": 1, "constant_pad_nd": 1}  # 0 for the text
TRANSFORMERS = [
    ("sd3", "tome", {**OF_STATES, "_take": 1}),
    ("sd3", "asymmetric", {**OF_STATES, **LOG_N, "_take": 1}),
    ("sd3", "kv:tome+p", {**OF_STATES, **LOG_N}),
    ("flux", "asymmetric", {**OF_ROTARY, **LOG_N, "_merge": 3, "cat": 4, "_take": 1}),
    ("flux", "kv:tome+p", {**OF_ROTARY, **LOG_N, "_merge": 2, "cat": 2}),
]


@pytest.mark.parametrize(("name", "method", "each_block"), TRANSFORMERS, ids=[f"{a}-{b}" for a, b, _ in TRANSFORMERS])
def test_merging_in_a_transformer_copies_no_tokens_beside_the_text(
    name: str, method: str, each_block: dict[str, int], launches: Launches
) -> None:
    """Where q, k and v are merged, each is joined with the text's by one copy of what is left."""
    model = MODELS[name].make().half()
    more = launched(model, MODELS[name].inputs(), launches, recipes.named(method))
    more.subtract(launched(model, MODELS[name].inputs(), launches, None))
    singles = len(getattr(model, "single_transformer_blocks", ()))
    more["clone"] -= singles  # their part of the norm's output, which is compared
    blocks = len(model.transformer_blocks) + singles
    assert {name: count for name, count in more.items() if count} == {
        name: count * blocks for name, count in each_block.items()
    }
