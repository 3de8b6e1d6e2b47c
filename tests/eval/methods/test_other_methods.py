"""The peers do what they are known for, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from eval import EvalError
from eval.families.tiny import flux, flux_inputs, sd3
from eval.methods import attention, hypertile, schedule
from eval.methods import registry as methods
from tofu_sd.core.reductions import mean, prune

OF_UNETS = methods.known_methods(denoiser=UNet2DConditionModel)
OF_TRANSFORMERS = methods.known_methods(denoiser=FluxTransformer2DModel)


@pytest.mark.parametrize("name", [*OF_UNETS, "deepcache:tofu", "deepcache-2:tofu"])
def test_method_changes_the_output_and_is_removed(name: str) -> None:
    unet = tiny.sd15_unet()
    before = [(type(module), {*vars(module)}) for module in unet.modules()]
    call = {**tiny.inputs(unet, t=500)}
    plain = tiny.predict(unet, **call)
    [method] = methods.parse(name, [0.5])
    with method.apply(unet):
        outs = [unet(call["sample"], torch.tensor(t), call["encoder_hidden_states"]).sample for t in (500, 499)]
    assert any(not torch.equal(out, plain) for out in outs)
    assert torch.equal(tiny.predict(unet, **call), plain)
    if name != "tomesd":  # which leaves attributes of its own behind
        assert [(type(module), {*vars(module)}) for module in unet.modules()] == before


@pytest.mark.parametrize("inner", ["", ":tofu"])
def test_first_block_cache_skips_blocks_and_is_removed(inner: str) -> None:
    """The second step's first block is that of the first, so that no other block runs."""
    transformer = flux()
    before = [(type(module), {*vars(module)}) for module in transformer.modules()]
    plain = transformer(**flux_inputs()).sample
    [method] = methods.parse(f"first-block-cache{inner}", [0.5])
    calls: list[Any] = []
    with method.apply(transformer), transformer.cache_context("cond"):
        hook = transformer.transformer_blocks[1].attn.to_q.register_forward_hook(lambda *_: calls.append(1))
        first, second = (transformer(**flux_inputs()).sample for _ in range(2))
        hook.remove()
    assert len(calls) == 1
    assert torch.equal(first, plain) == (not inner)
    torch.testing.assert_close(second, first)
    assert torch.equal(transformer(**flux_inputs()).sample, plain)
    assert [(type(module), {*vars(module)}) for module in transformer.modules()] == before


@pytest.mark.parametrize(("name", "model", "why"), [
    *((name, flux, "it changes layers of a UNet, and FluxTransformer2DModel has none") for name in OF_UNETS),
    *((name, tiny.sd15_unet, "diffusers has no cache for UNet2DConditionModel") for name in OF_TRANSFORMERS),
    ("first-block-cache", sd3, "diffusers has no cache for SD3Transformer2DModel"),
])  # fmt: skip
def test_method_of_another_kind_of_model_is_refused(name: str, model: Any, why: str) -> None:
    [method] = methods.parse(name, [0.5])
    with pytest.raises(EvalError, match=why), method.apply(model()):
        pass


def test_deepcache_keeps_step_with_the_method_below() -> None:
    unet = tiny.sd15_unet()
    [method] = methods.parse("deepcache:tofu@match_interval=2", [0.5])
    assert method.period == 6
    call = tiny.inputs(unet)
    with method.apply(unet):
        for t in schedule.timesteps(method.period):
            unet(call["sample"], t, call["encoder_hidden_states"])


def test_failing_method_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    from DeepCache import DeepCacheSDHelper

    unet = tiny.sd15_unet()
    before = [{*vars(module)} for module in unet.modules()]
    wrap, calls = DeepCacheSDHelper.wrap_block_forward, []

    def failing(self: Any, *args: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("on the way")
        wrap(self, *args, **more)

    monkeypatch.setattr(DeepCacheSDHelper, "wrap_block_forward", failing)
    [method] = methods.parse("deepcache", [0.5])
    with pytest.raises(RuntimeError, match="on the way"), method.apply(unet):
        pass
    assert [{*vars(module)} for module in unet.modules()] == before


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, torch.Size]]:
    """Shapes of the queries and keys of every attention."""
    seen: list[tuple[torch.Size, torch.Size]] = []
    plain = F.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, *args: Any, **more: Any) -> Tensor:
        seen.append((query.shape, key.shape))
        return plain(query, key, *args, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    return seen


@pytest.mark.parametrize(("name", "batch", "queries", "keys"), [("todo", 2, 256, 64), ("hypertile", 8, 64, 64)])
def test_methods_reduce_the_keys_of_the_highest_resolution(
    name: str, batch: int, queries: int, keys: int, attended: list[tuple[torch.Size, torch.Size]]
) -> None:
    unet = tiny.sd15_unet()
    [method] = methods.parse(name, [0.5])
    with method.apply(unet):
        tiny.predict(unet)
    shapes = [(q[0], q[2], k[2]) for q, k in attended]
    assert shapes.count((batch, queries, keys)) == 5
    assert (2, 256, 256) not in shapes


def test_no_attention_leaves_out_the_highest_resolution_alone(attended: list[tuple[torch.Size, torch.Size]]) -> None:
    unet = tiny.sd15_unet()
    tiny.predict(unet)
    whole = [(q[2], k[2]) for q, k in attended]
    attended.clear()
    [method] = methods.parse("no-attention", [0.5])
    with method.apply(unet):
        tiny.predict(unet)
    assert [(q[2], k[2]) for q, k in attended] == [one for one in whole if one != (256, 256)]
    assert whole.count((256, 256)) == 5


def test_hypertile_tiles_contain_neighbours() -> None:
    """With values that are a token's own tile, attention inside a tile gives that tile everywhere."""
    tiled = hypertile.TiledAttention(4, heads=1, dim_head=4, bias=False, out_bias=False)
    for layer in (tiled.to_v, tiled.to_out[0]):
        layer.weight.data = torch.eye(4)
    row, column = torch.meshgrid(torch.arange(6) // 3, torch.arange(6) // 3, indexing="ij")
    tile = F.one_hot(2 * row + column, 4).float().view(1, 36, 4)
    assert torch.allclose(tiled(tile), tile, atol=1e-6)


def test_todo_keeps_every_other_token_of_every_other_row() -> None:
    tokens = torch.arange(16.0).view(1, 16, 1)
    assert attention.as_square_map(tokens)[:, ::2, ::2].flatten().tolist() == [0, 2, 8, 10]
    with pytest.raises(RuntimeError, match="invalid for input"):
        attention.as_square_map(torch.zeros(1, 15, 1))


def test_split_reductions_of_keys_and_values_are_the_asymmetric_recipe_where_they_are_equal() -> None:
    """benchmarks/split_kv.py: with the mean for both it is that method of the library; both are undone."""
    split_kv = methods._load(Path(__file__).parents[3] / "benchmarks" / "split_kv.py")
    unet = tiny.sd15_unet()
    [asymmetric] = methods.parse("mlerp+p@kv_early=mean@kv_late=mean", [0.5])
    with asymmetric.apply(unet):
        expected = tiny.predict(unet)
    with split_kv.split(unet, 0.5, mean, mean):
        assert torch.equal(tiny.predict(unet), expected)
    with split_kv.split(unet, 0.5, mean, prune):
        assert not torch.equal(tiny.predict(unet), expected)
    assert not any("forward" in vars(module) for module in unet.modules())


def test_survivor_phase_is_exact_where_tokens_and_positions_are_equal() -> None:
    """benchmarks/survivor_phase.py: a key that weighs n is n equal keys. Elsewhere phases decide; it is undone."""
    phase = methods._load(Path(__file__).parents[3] / "benchmarks" / "survivor_phase.py")
    transformer, call = flux(), flux_inputs(batch=1)
    with phase.survivor_phase(transformer, 0.5):
        changed = transformer(**call).sample
    plain = transformer(**call).sample
    assert not torch.allclose(changed, plain, atol=1e-2)
    equal = {**call, "hidden_states": call["hidden_states"][:, :1].expand_as(call["hidden_states"])}
    transformer.pos_embed.register_forward_hook(lambda module, args, out: tuple(x[:1].expand_as(x) for x in out))
    expected = transformer(**equal).sample
    with phase.survivor_phase(transformer, 0.5):
        torch.testing.assert_close(transformer(**equal).sample, expected, atol=2e-5, rtol=0)
        with pytest.raises(EvalError, match="--batch 1"):
            transformer(**flux_inputs(batch=2))
    assert torch.equal(transformer(**equal).sample, expected)
    with pytest.raises(EvalError, match="written for Flux"), phase.survivor_phase(sd3(), 0.5):
        pass
