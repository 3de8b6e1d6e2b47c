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
from torch.utils._python_dispatch import TorchDispatchMode

import tofu_sd
from tofu_sd import kernels, recipes
from tofu_sd.core import proportional

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels are Triton's, not its interpreter's", allow_module_level=True)
from triton.runtime import interpreter

from tofu_sd.kernels import triton as triton_kernels

NO_LAUNCH = {"alias", "detach", "empty", "expand", "new_empty", "select", "slice", "split", "t", "transpose", "unbind",
             "unsqueeze", "view", "_unsafe_view"}  # fmt: skip


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


def launched(unet: Any, counter: Launches, config: tofu_sd.TokenFusionConfig | None) -> list[str]:
    """Returns the kernels of one step of a UNet in half precision; None for the baseline."""
    inputs = tiny.inputs(unet, 8, 16, batch=1)  # few tokens, as each program of a kernel is interpreted
    call = {name: x.half() if x.ndim and x.is_floating_point() else x for name, x in inputs.items()}
    with nullcontext() if config is None else tofu_sd.patched(unet, replace(config, min_tokens=0)):
        tiny.predict(unet, **call)  # the first step computes sources and destinations, which are kept
        counter.names.clear()
        counter.counting = True
        with counter:
            tiny.predict(unet, **call)
        counter.counting = False
    return list(counter.names)


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
    baseline = launched(unet, launches, None)
    more = Counter(launched(unet, launches, recipes.named(method)))
    more.subtract(baseline)
    # of tokens whose channels come first in memory: the norm makes the same copy itself, out of sight, in the baseline
    assert more.pop("clone") == blocks
    found = {name: count for name, count in more.items() if count}
    copies = "_merge or _take"
    if copies in each_block:
        found[copies] = found.pop("_merge") + found["_take"] - blocks
        found["_take"] = blocks
    assert found == dict.fromkeys(each_block, blocks)
    assert sum(more.values()) <= 5 * blocks
