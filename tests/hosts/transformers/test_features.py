"""What users switch on beside the patch, before it or after it, on tiny models of each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import (
    HookRegistry,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    apply_group_offloading,
    apply_pyramid_attention_broadcast,
)
from tiny_transformers import JOINT, MODELS, Tiny, processors, set_processors

import tofu_sd
from tofu_sd.core.proportional import SDPA
from tofu_sd.hosts.diffusers_transformers import host_of

CPU = torch.device("cpu")
families = pytest.mark.parametrize("family", MODELS.values(), ids=MODELS)
joint_families = pytest.mark.parametrize("family", JOINT.values(), ids=JOINT)


def _lora(model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(5)
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False), model
    )


FEATURES: dict[str, Callable[[Any], Any]] = {
    "LoRA": _lora,
    "sequential offload": lambda model: accelerate.cpu_offload(model, execution_device=CPU),
    "model offload": lambda model: accelerate.cpu_offload_with_hook(model, CPU),
    "group offload by block": lambda model: apply_group_offloading(
        model, CPU, CPU, "block_level", num_blocks_per_group=1
    ),
    "group offload by leaf": lambda model: apply_group_offloading(model, CPU, CPU, "leaf_level"),
    "layerwise casting": lambda model: model.enable_layerwise_casting(torch.bfloat16, torch.float32),
}


@families
@pytest.mark.parametrize("options", [{}, {"kv_only": True}], ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_feature_and_patch_combine_in_either_order(family: Tiny, name: str, options: dict[str, Any]) -> None:
    results = []
    for patch_first in (True, False):
        model = family.make()
        if patch_first:
            tofu_sd.apply_patch(model, 0.5, **options)
        FEATURES[name](model)
        if not patch_first:
            tofu_sd.apply_patch(model, 0.5, **options)
        results.append(family.predict(model))
    plain = family.predict(tofu_sd.remove_patch(model))
    assert torch.equal(*results)
    assert not torch.allclose(results[0], plain, atol=1e-3)
    if "offload" not in name:
        assert not torch.equal(plain, family.predict(family.make()))


class _DoubleOutput(ModelHook):
    def post_forward(self, module: Any, output: Any) -> Any:
        return output[0] * 2, *output[1:]


@families
def test_hook_set_before_the_patch_is_refused(family: Tiny) -> None:
    """A cache that holds the attention's own forward would bypass merging. Set after the patch it works."""
    model = family.make()
    baseline = family.predict(model)
    attention = host_of(model).find_blocks(model)[0].layers["attn"]
    HookRegistry.check_if_exists_or_initialize(attention).register_hook(ModelHook(), "mine")
    with pytest.raises(RuntimeError, match=r"(transformer_blocks|layers)\.0's attn layer has a `forward` of its own"):
        tofu_sd.apply_patch(model, 0.5)
    model = tofu_sd.apply_patch(family.make(), 0.5)
    merged = family.predict(model)
    attention = host_of(model).find_blocks(model)[0].layers["attn"]
    HookRegistry.check_if_exists_or_initialize(attention).register_hook(ModelHook(), "mine")
    assert torch.equal(family.predict(model), merged)
    assert torch.equal(family.predict(tofu_sd.remove_patch(model)), baseline)


@families
def test_pyramid_attention_broadcast_works_after_the_patch(family: Tiny) -> None:
    """In skipped calls attention gives its stored output, of all tokens."""
    model = family.make()
    step = 500
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("transformer_blocks", "layers"),
        current_timestep_callback=lambda: step,
    )
    tofu_sd.apply_patch(model, 0.5)
    first, other = family.predict(model), family.predict(model, seed=9)
    apply_pyramid_attention_broadcast(model, config)
    assert torch.equal(family.predict(model), first)
    skipped = family.predict(model, seed=9)
    assert skipped.isfinite().all()
    assert not torch.equal(skipped, other)


@families
@pytest.mark.parametrize("while_patched", [True, False])
def test_removed_cache_leaves_nothing_that_hides_merging(family: Tiny, while_patched: bool) -> None:
    """Hooks of diffusers leave the class's own `forward` on a layer, which would hide that of another class."""
    model = family.make()
    baseline, merged = family.predict(model), family.predict(tofu_sd.apply_patch(family.make(), 0.5))
    if while_patched:
        tofu_sd.apply_patch(model, 0.5)
    for info in host_of(model).find_blocks(model):
        registry = HookRegistry.check_if_exists_or_initialize(info.layers["attn"])
        registry.register_hook(ModelHook(), "mine")
        registry.remove_hook("mine")
        assert "forward" in vars(info.layers["attn"])
    assert torch.equal(family.predict(tofu_sd.remove_patch(model)), baseline)
    assert torch.equal(family.predict(tofu_sd.apply_patch(model, 0.5)), merged)
    assert torch.equal(family.predict(tofu_sd.remove_patch(model)), baseline)


@joint_families
def test_unknown_processor_is_refused_before_and_after_the_patch(family: Tiny) -> None:
    class Mine:
        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **more: Any) -> Any:
            return hidden_states

    message = "Mine is not known to run on merged tokens: set one of .*AttnProcessor"
    model = family.make()
    own = processors(model)
    set_processors(model, Mine())
    with pytest.raises(RuntimeError, match=message):
        tofu_sd.apply_patch(model, 0.5)
    set_processors(model, own)
    tofu_sd.apply_patch(model, 0.5)
    set_processors(model, Mine())
    with pytest.raises(RuntimeError, match=message):
        family.predict(model)


@joint_families
@pytest.mark.parametrize("options", [{}, {"match_interval": 2}, {"share_across_blocks": True}], ids=str)
def test_call_that_failed_leaves_nothing(family: Tiny, options: dict[str, Any]) -> None:
    """A call that stops between two blocks has no effect on the next one, merged or not."""
    model = family.make()
    baseline = family.predict(model)
    expected = family.predict(tofu_sd.apply_patch(family.make(), 0.5, **options))
    tofu_sd.apply_patch(model, 0.5, **options)
    blocks = host_of(model).find_blocks(model)
    last = model.get_submodule(blocks[-1].name)

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    handle = last.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        family.predict(model, 6, 10, seed=4)
    handle.remove()
    assert torch.equal(family.predict(model), expected)
    assert torch.equal(family.predict(tofu_sd.remove_patch(model)), baseline)


@joint_families
def test_replaced_kernel_is_refused(family: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries such as SageAttention put their own function in the place of torch's."""

    def sage(query: Any, key: Any, value: Any, attn_mask: Any = None, **more: Any) -> Any:
        assert attn_mask is None
        return query.softmax(-1) @ (key.mT @ value)

    model = tofu_sd.apply_patch(family.make(), 0.5)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sage)
    with pytest.raises(RuntimeError, match="sage"):
        family.predict(model, batch=1)  # prompts of one length: Z-Image's refiners get no mask
    assert F.scaled_dot_product_attention is not SDPA
