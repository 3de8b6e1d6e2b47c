"""What users combine with a patch: options, calls, hooks, caches, compilers and copies."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import accelerate
import diffusers
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

import tofu_sd

from . import calls
from .cells import Absent, Feature
from .random_weights import lively
from .tiny import Tiny

CPU = torch.device("cpu")
STEPS = 3  # calls that a cache gets


# --- before or after the patch ----------------------------------------------------------------------------------------


def lora(model: Any) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Absent("peft is not installed") from error
    with torch.random.fork_rng():
        torch.manual_seed(5)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)


def group_offload(model: Any) -> None:
    diffusers.hooks.apply_group_offloading(model, CPU, CPU, "block_level", num_blocks_per_group=1)


def fused(model: Any) -> None:
    if not hasattr(model, "fuse_qkv_projections"):
        raise Absent("no fuse_qkv_projections()")
    model.fuse_qkv_projections()


def cache(config: Callable[[], Any], model: Any) -> None:
    if not hasattr(model, "enable_cache"):
        raise Absent("no enable_cache()")
    model.enable_cache(config())


def processors_of(model: Any) -> dict[Any, Any]:
    return {module: module.processor for module in model.modules() if hasattr(module, "processor")}


def own_processor(model: Any) -> None:
    """Processors of a class that is not diffusers'."""
    for module, processor in processors_of(model).items():
        own = copy.copy(processor)
        own.__class__ = type("OwnProcessor", (type(processor),), {"__module__": "somewhere"})
        module.processor = own


def image_prompt_processors(model: Any) -> None:
    """Processors of IP-Adapters, which SD3 has in all blocks and Flux in its double blocks."""
    for name, module in model.named_modules():
        if not hasattr(module, "processor"):
            continue
        if isinstance(model, diffusers.SD3Transformer2DModel):
            own = attention_processor.SD3IPAdapterJointAttnProcessor2_0(16, 16, 8, timesteps_emb_dim=8, scale=0.8)
        elif name.startswith("transformer_blocks"):
            own = diffusers.models.transformers.transformer_flux.FluxIPAdapterAttnProcessor(32, 16, (5,), 0.8)
        else:
            continue
        module.set_processor(lively(own, 6))


def other_backend(model: Any) -> None:
    processors = [p for p in processors_of(model).values() if hasattr(p, "_attention_backend")]
    if not processors:
        raise Absent("its processors call torch's attention themselves")
    for processor in processors:  # set_attention_backend() would also set that of all other models
        processor._attention_backend = AttentionBackendName("_native_math")


def parallel(model: Any) -> None:
    """As enable_parallelism() leaves the processors. Running it needs several devices."""
    if getattr(model, "_cp_plan", None) is None:
        raise Absent("no plan for context parallelism")
    for processor in processors_of(model).values():
        processor._parallel_config = object()


# --- runs -------------------------------------------------------------------------------------------------------------


def with_cache(tiny: Tiny, model: Any, call: dict[str, Any]) -> Tensor:
    """Several steps of one image, in a context of the cache."""
    with model.cache_context("image"):
        return torch.stack([tiny.predict(model, seed=seed) for seed in range(STEPS)])


def with_gradients(tiny: Tiny, model: Any, call: dict[str, Any]) -> Tensor:
    """The gradients of a checkpointed model."""
    model.train().enable_gradient_checkpointing()
    model.zero_grad()
    # diffusers drops Chroma's mask in checkpointed single blocks
    call = {"attention_mask": None} if "attention_mask" in tiny.inputs() else {}
    tiny.run(model, **call).square().mean().backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def with_replaced_kernel(tiny: Tiny, model: Any, call: dict[str, Any]) -> Tensor:
    """A function in the place of torch's, as libraries of attention kernels set it."""
    torchs = F.scaled_dot_product_attention

    def replacement(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **more: Any) -> Tensor:
        logits = query @ key.mT * query.shape[-1] ** -0.5
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        return logits.softmax(-1) @ value

    F.scaled_dot_product_attention = replacement  # type: ignore[assignment]
    try:
        return tiny.predict(model, **call)
    finally:
        F.scaled_dot_product_attention = torchs


def compiled(compile: Callable[[Any], Any], tiny: Tiny, model: Any, call: dict[str, Any]) -> Tensor:
    """The result of a model, which must be that of the compiled one where it merges tokens."""
    eager = tiny.predict(model, **call)
    config = tofu_sd.summary(model).config
    if config is None or not config.ratio:  # compiling takes seconds
        return eager
    torch._dynamo.reset()
    result = tiny.predict(compile(model), **call)
    if not torch.allclose(result, eager, atol=1e-5):
        raise AssertionError("the compiled model gives another result")
    return eager


def compile_blocks(model: Any) -> Any:
    """Compiles blocks one by one. The eager backend computes what the model does."""
    kinds = getattr(model, "_repeated_blocks", None) or ["JointTransformerBlock", "BasicTransformerBlock"]
    for module in model.modules():
        if type(module).__name__ in kinds:
            module.compile(fullgraph=True, backend="eager")
    return model


def copied(copy_of: Callable[[Any], Any], tiny: Tiny, model: Any, call: dict[str, Any]) -> Tensor:
    """The result of a copy, which must be that of the model."""
    result = tiny.predict(copy_of(model), **call)
    if not torch.equal(result, tiny.predict(model, **call)):
        raise AssertionError("the copy gives another result")
    return result


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def saved(tiny: Tiny, model: Any, call: dict[str, Any]) -> Tensor:
    """The result of the model, whose saved form must be the unpatched model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
    if not torch.equal(tiny.predict(loaded, **call), tiny.predict(tiny.make(), **call)):
        raise AssertionError("the saved model is not the unpatched one")
    return tiny.predict(model, **call)


def guided(family: str, tiny: Tiny) -> Any:
    """The model with embedded guidance."""
    return tiny.make(guidance_embeds=True) if family in ("flux.1", "flux.2") else tiny.make()


def shallow(family: str, tiny: Tiny) -> Any:
    """The model with one block of each kind, which is compiled sooner."""
    if family == "z-image":
        return tiny.make(n_layers=1)
    return tiny.make(num_layers=1, **({"num_single_layers": 1} if family in calls.WITH_IDS else {}))


def timestep_now() -> int:
    return 500


CACHES: dict[str, Callable[[], Any]] = {
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=1e9),
    "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=timestep_now,
    ),
    "TaylorSeer": lambda: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    ),
    "MagCache": lambda: diffusers.MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, threshold=1e9, retention_ratio=0.3
    ),
}
MEAN_OF_KEYS = {"kv_early": "mean", "kv_late": "mean"}

FEATURES = (
    Feature("default"),
    Feature("keys and values alone (`kv_only`)", {"kv_only": True}),
    Feature("their own reduction (`kv_early`, `kv_late`)", MEAN_OF_KEYS),
    Feature("`matching=\"pairs\"`, groups of one size", {"matching": "pairs"}),
    Feature("`merge_mlp`", {"merge_mlp": True}),
    Feature("`merge_crossattn`", {"merge_crossattn": True}),
    Feature("`share_across_blocks`", {"share_across_blocks": True}),
    Feature("`share_across_cfg`", {"share_across_cfg": True}, call=calls.same_latents),
    Feature("`match_interval`", {"match_interval": 2}),
    Feature("`start`, `end`", {"start": 0.2, "end": 0.8}),
    Feature("`levels=2`", {"levels": 2}),
    Feature("`depth_split=\"auto\"`", {"depth_split": "auto"}),
    Feature("image that is not square", call=calls.size(6, 10)),
    Feature("odd number of tokens a side", call=calls.size(5, 7)),
    Feature("images of several sizes in a batch", call=calls.two_sizes),
    Feature("tokens that are no grid, several frames", call=calls.no_grid),
    Feature("prompts of several lengths", call=calls.two_lengths),
    Feature("mask that hides image tokens", call=calls.mask_of_image),
    Feature("embedded guidance", make=guided, call=calls.embedded_guidance),
    Feature("reference image", call=calls.reference),
    Feature("ControlNet", call=calls.control),
    Feature("IP-Adapter, before the patch", prepare=image_prompt_processors, call=calls.image_prompt, before=True),
    Feature("IP-Adapter, after the patch", prepare=image_prompt_processors, call=calls.image_prompt),
    Feature("LoRA, before the patch", prepare=lora, before=True),
    Feature("LoRA, after the patch", prepare=lora),
    Feature("bfloat16", prepare=lambda model: model.to(torch.bfloat16), call=calls.half),
    Feature("layerwise casting", prepare=lambda m: m.enable_layerwise_casting(torch.bfloat16, torch.float32)),
    Feature("model offload", prepare=lambda model: accelerate.cpu_offload_with_hook(model, CPU)),
    Feature("sequential offload", prepare=lambda model: accelerate.cpu_offload(model, execution_device=CPU)),
    Feature("group offload", prepare=group_offload),
    Feature("fused projections", prepare=fused),
    Feature("gradient checkpointing", run=with_gradients),
    *(Feature(f"{name}, after the patch", prepare=partial(cache, config), run=with_cache, undone=False)
      for name, config in CACHES.items()),
    *(Feature(f"{name}, before the patch", prepare=partial(cache, config), run=with_cache, undone=False, before=True)
      for name, config in CACHES.items()),
    Feature("processors of another library", prepare=own_processor),
    Feature("another attention backend", prepare=other_backend),
    Feature("another function for torch's attention", run=with_replaced_kernel),
    Feature("context parallelism", prepare=parallel, alone=False),
    Feature("blocks compiled, `fullgraph=True`", make=shallow, run=partial(compiled, compile_blocks), undone=False),
    Feature(
        "whole model compiled, `fullgraph=True`", make=shallow, undone=False,
        run=partial(compiled, partial(torch.compile, fullgraph=True, backend="eager")),
    ),
    Feature("`copy.deepcopy`", run=partial(copied, copy.deepcopy)),
    Feature("`pickle`", run=partial(copied, pickled)),
    Feature("`torch.save`", run=partial(copied, torch_saved)),
    Feature("`save_pretrained`", run=saved),
)  # fmt: skip
