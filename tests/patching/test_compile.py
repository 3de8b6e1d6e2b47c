"""torch.compile: one graph, hardly more graphs than without the patch, and what comes out is what eager gives.

Backend "eager": what is traced is the question, not the kernels. Graphs are counted as the backend receives them.
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
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(unet: Any, regional: bool) -> tuple[Any, CompileCounter]:
    counter = CompileCounter()
    if not regional:
        return torch.compile(unet, fullgraph=True, backend=counter), counter
    unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    return unet, counter


@cache
def graphs(regional: bool, fusion: tofu_sd.TokenFusionConfig | None) -> int:
    """Graphs of a compiled UNet over all sizes and ratios; each of its outputs has to be eager's."""
    torch._dynamo.reset()
    shape = {} if regional else {"mid_block_type": None}  # unfused blocks are of interest where blocks are compiled
    unet, eager = tiny.shallow_unet(**shape), tiny.shallow_unet(**shape)
    model, counter = compiled(unet, regional)
    for h, w in SIZES:
        for ratio in RATIOS if fusion is not None else [None]:
            for each in (model, eager) if fusion is not None else ():
                tofu_sd.apply_patch(each, TokenFusionConfig.of(fusion, ratio=ratio))
            assert torch.equal(tiny.predict(model, h, w), tiny.predict(eager, h, w))
    return int(counter.frame_count)


@pytest.mark.parametrize(
    "fusion",
    [
        TokenFusionConfig(),
        named("tome"),
        named("kv:mlerp+p"),
        TokenFusionConfig(seed=3, merge_mlp=True, merge_crossattn=True),
    ],
    ids=lambda f: f.slug,
)
def test_regional_compilation_costs_one_graph_more(fusion: TokenFusionConfig) -> None:
    """Fused and unfused blocks are two kinds; sizes, ratios and reductions reach them as lengths of tensors."""
    assert graphs(True, fusion) <= graphs(True, None) + 1


def test_a_whole_compiled_unet_costs_two_graphs_more() -> None:
    """One is for the ratio, a constant until a second one comes, one for the own size, which is laid out before.

    The UNet itself takes four: a first size, either side dynamic, and odd sides, for which it upsamples another way.
    (Where odd sides come before the second ratio does, they too are traced once more.)
    """
    assert graphs(False, TokenFusionConfig()) <= graphs(False, None) + 2


@pytest.mark.parametrize("window", [None, 4])
def test_a_compiled_unet_does_not_lay_out_its_own_size_in_every_call(window: int | None) -> None:
    """Laying windows out sorts tokens a few times, in every call and for every map; on a GPU it outweighed all else."""
    sorts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        sorts.append(sum("sort" in str(node.target) for node in graph.graph.nodes))
        return graph

    unet = tiny.shallow_unet(sample_size=24)
    tofu_sd.apply_patch(unet, 0.5, window=window)
    model = torch.compile(unet, fullgraph=True, backend=backend, dynamic=False)
    for side in (24, 16):
        tiny.predict(model, side, side)
    at_home, elsewhere = sorts
    assert at_home == 0
    assert elsewhere > 0


EVERYTHING = {"kv_only": True, "proportional": True, "seed": 3, "match_on": "normed", "merge_mlp": True}


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["tofu", "everything"])
@pytest.mark.parametrize("regional", [True, False], ids=["regional", "whole"])
def test_patching_and_restoring_a_compiled_model_takes_effect(regional: bool, options: dict[str, Any]) -> None:
    """dynamo does not guard hooks: what is put on by hooks alone after compiling is passed over in silence."""
    unet, eager = tiny.shallow_unet(), tiny.shallow_unet()
    model, _ = compiled(unet, regional)
    plain = tiny.predict(model)
    assert torch.equal(plain, tiny.predict(eager))
    for ratio in (0.5, 0.25):
        tofu_sd.apply_patch(model, ratio, **options)
        tofu_sd.apply_patch(eager, ratio, **options)
        fused = tiny.predict(model)
        assert torch.equal(fused, tiny.predict(eager))
        assert not torch.equal(fused, plain)
    tofu_sd.remove_patch(model)
    assert torch.equal(tiny.predict(model), plain)


def test_a_reduction_of_ones_own_compiles_before_it_ever_ran() -> None:
    """Compiled code knows reductions by number; a number given out while it is traced would come too late."""

    def halved(x: Any, map: Any) -> Any:
        return 0.5 * prune(x, map)

    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, early=halved, late=halved) for _ in range(2))
    model, _ = compiled(unet, regional=False)
    assert torch.equal(tiny.predict(model), tiny.predict(eager))


def test_gradients_flow_through_compiled_fusion() -> None:
    """The operator of all reductions has no gradient; where one is wanted, the reduction itself is traced."""
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), 0.5) for _ in range(2))
    model, _ = compiled(unet, regional=True)
    wanted = []
    for each in (model, eager):
        call = tiny.inputs(eager)
        call["sample"].requires_grad_()
        each(**call).sample.square().sum().backward()
        wanted.append(call["sample"].grad)
    assert torch.equal(*wanted)


def test_drawn_destinations_move_from_step_to_step_in_a_compiled_model() -> None:
    """A draw that dynamo had taken for a constant would give every step the first one's destinations."""
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, seed=3) for _ in range(2))
    model, counter = compiled(unet, regional=False)
    for t in (900, 500, 100):
        assert torch.equal(tiny.predict(model, t=t), tiny.predict(eager, t=t))
    assert counter.frame_count == 1


def test_a_step_window_needs_regional_compilation() -> None:
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, start=0.3) for _ in range(2))
    with pytest.raises(RuntimeError, match=r"start and end .* only the blocks, with compile_repeated_blocks\(\)"):
        tiny.predict(compiled(unet, regional=False)[0])
    torch._dynamo.reset()
    model, _ = compiled(unet, regional=True)
    for t in (900, 500, 100, 900):
        assert torch.equal(tiny.predict(model, t=t), tiny.predict(eager, t=t))
    assert not torch.equal(tiny.predict(model, t=100), tiny.predict(tiny.shallow_unet(), t=100))


def test_a_compiled_pipeline_draws_what_an_eager_one_draws() -> None:
    pipe = tiny.sd15_pipe()
    plain = tiny.images(pipe)
    fused = tiny.images(tofu_sd.apply_patch(pipe, 0.5))
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(tiny.images(pipe), fused)
    assert torch.equal(tiny.images(tofu_sd.remove_patch(pipe)), plain)


def test_the_operator_of_the_map_lies_in_memory_as_a_compiler_is_told() -> None:
    """Inductor asserts the strides of what an operator returns, and does not look at its values to find them."""
    parts = partition(8, 8, 2, 2, torch.device("cpu"))
    best = torch.rand(3, len(parts.src), generator=torch.Generator().manual_seed(0))
    target = parts.dst[torch.zeros(3, len(parts.src), dtype=torch.long)]
    for r in (0, 10, len(parts.src)):
        torch.library.opcheck(torch.ops.tofu_sd.build_map.default, (best, target, *parts, r))
