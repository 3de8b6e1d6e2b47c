"""torch.compile: no graph breaks, at most two graphs more than without the patch, and the results of eager mode.

Backend "eager" suffices: the tests check tracing, not kernels. The backend counts the graphs it receives.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter

import tofu_sd
from tofu_sd import TokenFusionConfig
from tofu_sd.core.partition import partition
from tofu_sd.core.reductions import prune
from tofu_sd.recipes import named

SIZES = [(16, 16), (24, 16), (16, 24), (32, 16), (8, 24), (40, 16), (20, 20), (17, 13)]
RATIOS = [0.5, 0.25, 0.75, 0.1, 0.6]


@pytest.fixture(autouse=True)
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_model(unet: Any, regional: bool) -> tuple[Any, CompileCounter]:
    counter = CompileCounter()
    if not regional:
        return torch.compile(unet, fullgraph=True, backend=counter), counter
    unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    return unet, counter


@cache
def count_graphs(regional: bool, config: tofu_sd.TokenFusionConfig | None) -> int:
    """Counts the graphs of a compiled UNet over all sizes and ratios; each output equals that of eager mode."""
    torch._dynamo.reset()
    shape = {} if regional else {"mid_block_type": None}  # unmerged blocks matter only where blocks are compiled
    unet, eager = tiny.shallow_unet(**shape), tiny.shallow_unet(**shape)
    model, counter = compile_model(unet, regional)
    for h, w in SIZES:
        for ratio in RATIOS if config is not None else [None]:
            for module in (model, eager) if config is not None else ():
                tofu_sd.apply_patch(module, TokenFusionConfig.of(config, ratio=ratio))
            assert torch.equal(tiny.predict(model, h, w), tiny.predict(eager, h, w))
    return int(counter.frame_count)


@pytest.mark.parametrize(
    "config",
    [
        TokenFusionConfig(),
        named("tome"),
        named("kv:mlerp+p"),
        TokenFusionConfig(seed=3, merge_mlp=True, merge_crossattn=True),
        TokenFusionConfig(kv_early="mean", kv_late="prune", proportional=True),
        TokenFusionConfig(matching="cells"),
    ],
    ids=lambda f: f.slug,
)
def test_regional_compile_adds_one_graph(config: TokenFusionConfig) -> None:
    """Merged and unmerged blocks are two graphs; size, ratio and reduction enter as tensor lengths."""
    assert count_graphs(True, config) <= count_graphs(True, None) + 1


def test_whole_unet_compile_adds_two_graphs() -> None:
    """One graph is for the ratio, a constant until a second ratio appears; one for the native size (cached partition).

    The unpatched UNet takes four: the first size, each side dynamic, and odd sides, which it upsamples differently.
    (If odd sides appear before the second ratio, they are traced once more.)
    """
    assert count_graphs(False, TokenFusionConfig(min_tokens=0)) <= count_graphs(False, None) + 2


@pytest.mark.parametrize("window", [None, 4])
def test_compiled_unet_caches_partition_of_native_size(window: int | None) -> None:
    """Building windows sorts tokens several times per call and map; on a GPU this took more time than all else."""
    sorts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        sorts.append(sum("sort" in str(node.target) for node in graph.graph.nodes))
        return graph

    unet = tiny.shallow_unet(sample_size=24)
    tofu_sd.apply_patch(unet, 0.5, window=window)
    model = torch.compile(unet, fullgraph=True, backend=backend, dynamic=False)
    for side in (24, 16):
        tiny.predict(model, side, side)
    native_sorts, other_sorts = sorts
    assert native_sorts == 0
    assert other_sorts > 0


MANY_OPTIONS = {"kv_only": True, "proportional": True, "seed": 3, "match_on": "normed", "merge_mlp": True}


@pytest.mark.parametrize("options", [{}, MANY_OPTIONS], ids=["tofu", "everything"])
@pytest.mark.parametrize("regional", [True, False], ids=["regional", "whole"])
def test_apply_and_remove_patch_take_effect_after_compile(regional: bool, options: dict[str, Any]) -> None:
    """dynamo does not guard hooks: a patch made only of hooks would silently have no effect after compilation."""
    unet, eager = tiny.shallow_unet(), tiny.shallow_unet()
    model, _ = compile_model(unet, regional)
    baseline = tiny.predict(model)
    assert torch.equal(baseline, tiny.predict(eager))
    for ratio in (0.5, 0.25):
        tofu_sd.apply_patch(model, ratio, **options)
        tofu_sd.apply_patch(eager, ratio, **options)
        merged = tiny.predict(model)
        assert torch.equal(merged, tiny.predict(eager))
        assert not torch.equal(merged, baseline)
    tofu_sd.remove_patch(model)
    assert torch.equal(tiny.predict(model), baseline)


def test_custom_reduction_compiles_before_its_first_eager_call() -> None:
    """Compiled code refers to reductions by id; an id assigned during tracing would be too late."""

    def halved(x: Any, map: Any) -> Any:
        return 0.5 * prune(x, map)

    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, early=halved, late=halved) for _ in range(2))
    model, _ = compile_model(unet, regional=False)
    assert torch.equal(tiny.predict(model), tiny.predict(eager))


def test_gradients_flow_through_compiled_merging() -> None:
    """The reduce_by_id operator has no gradient; where gradients are required, the reduction itself is traced."""
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), 0.5) for _ in range(2))
    model, _ = compile_model(unet, regional=True)
    gradients = []
    for module in (model, eager):
        call = tiny.inputs(eager)
        call["sample"].requires_grad_()
        module(**call).sample.square().sum().backward()
        gradients.append(call["sample"].grad)
    assert torch.equal(*gradients)


def test_random_destinations_change_per_step_in_compiled_model() -> None:
    """If dynamo treated the random draw as a constant, every step would use the destinations of the first."""
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, seed=3) for _ in range(2))
    model, counter = compile_model(unet, regional=False)
    for t in (900, 500, 100):
        assert torch.equal(tiny.predict(model, t=t), tiny.predict(eager, t=t))
    assert counter.frame_count == 1


def test_step_window_requires_regional_compile() -> None:
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, start=0.3) for _ in range(2))
    with pytest.raises(RuntimeError, match=r"start and end .* only the blocks, with compile_repeated_blocks\(\)"):
        tiny.predict(compile_model(unet, regional=False)[0])
    torch._dynamo.reset()
    model, _ = compile_model(unet, regional=True)
    for t in (900, 500, 100, 900):
        assert torch.equal(tiny.predict(model, t=t), tiny.predict(eager, t=t))
    assert not torch.equal(tiny.predict(model, t=100), tiny.predict(tiny.shallow_unet(), t=100))


def test_compiled_pipeline_equals_eager_pipeline() -> None:
    pipe = tiny.sd15_pipe()
    baseline = tiny.images(pipe)
    merged = tiny.images(tofu_sd.apply_patch(pipe, 0.5))
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(tiny.images(pipe), merged)
    assert torch.equal(tiny.images(tofu_sd.remove_patch(pipe)), baseline)


def test_build_map_operator_has_the_strides_that_compile_expects() -> None:
    """Inductor asserts the strides that the fake implementation of an operator declares."""
    parts = partition(8, 8, 2, 2, torch.device("cpu"))
    best = torch.rand(3, len(parts.src), generator=torch.Generator().manual_seed(0))
    target = parts.dst[torch.zeros(3, len(parts.src), dtype=torch.long)]
    for r in (0, 10, len(parts.src)):
        torch.library.opcheck(torch.ops.tofu_sd.build_map.default, (best, target, *parts, r))
