"""diffusers: where a UNet's transformer blocks are, and the subclasses that take their layers' places.

Written against diffusers 0.32 to 0.42. Host words (hidden_states, encoder_hidden_states) live here alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import (
    Attention,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from ..patching.block_info import BlockInfo
from ..patching.patch import Patch
from ._norm import FusedNorm, refuse_wrapped
from .diffusers_layers import FusedAttention, FusedCrossAttention, FusedFeedForward
from .diffusers_processors import _check_cross_processor, _check_processor, _keeps_maps


def unwrap(model: Any) -> tuple[nn.Module, int | None]:
    """(the UNet of a pipeline or the module itself, out of its wrappers; the scheduler's training steps).

    Wrappers are those of torch.compile, DistributedDataParallel, DataParallel and PEFT. The steps are None for a
    scheduler whose timesteps do not count down from them: they are functions of the noise. TypeError where there is no
    UNet.
    """
    unet = _out_of_wrappers(getattr(_out_of_wrappers(model), "unet", model))
    if not isinstance(unet, nn.Module):
        raise TypeError(_no_unet(model, unet))
    nets = getattr(unet, "nets", None)
    if isinstance(nets, nn.ModuleList):  # MultiControlNetModel
        raise TypeError(
            f"{type(unet).__name__} holds {len(nets)} models: patch each of its `nets`, or the pipeline's `unet`"
        )
    scheduler = getattr(model, "scheduler", None)
    config = getattr(scheduler, "config", None)
    if getattr(config, "timestep_type", None) == "continuous" or type(scheduler).__name__.startswith("EDM"):
        return unet, None
    return unet, int(getattr(config, "num_train_timesteps", None) or 1000)


def _out_of_wrappers(model: Any) -> Any:
    """The model inside of torch.compile's, DistributedDataParallel's, DataParallel's and PEFT's wrappers."""
    while isinstance(model, nn.Module):
        inner: Any = getattr(model, "_orig_mod", None)
        base = getattr(model, "get_base_model", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif hasattr(model, "peft_config") and callable(base):
            inner = base()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner
    return model


def _no_unet(model: Any, unet: Any) -> str:
    """Why a model cannot be patched that has no UNet of torch."""
    if unet is not model:
        kind = f"{type(unet).__module__}.{type(unet).__qualname__}"
        return (
            f"the `unet` of {type(model).__name__} is a {kind} and no torch module (ONNX Runtime, OpenVINO and "
            "TensorRT run exported models, which cannot be patched): use the pipeline of diffusers"
        )
    return (
        f"{type(model).__name__} has no `unet`: token fusion acts on the transformer blocks of Stable Diffusion's "
        "UNets (SD 1.x, 2.x, SDXL and their relatives); pass such a pipeline or its UNet"
    )


def latent_size(unet: nn.Module) -> tuple[int, int]:
    """Height and width of the latent the model was made for; 64 x 64 where it does not say."""
    size = getattr(getattr(unet, "config", None), "sample_size", None) or 64
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def find_blocks(unet: nn.Module) -> list[BlockInfo]:
    """All transformer blocks with self-attention over a 4-D map, in execution order, found by structure.

    ValueError where there is none, saying what was looked for.
    """
    places = [
        (path, downsample, name, module)
        for path, downsample, prefix, stage in _stages(unet)
        for name, module in stage.named_modules(prefix=prefix)
        if isinstance(module, Transformer2DModel) and ".ctrl_" not in name  # ControlNet-XS's control side
    ]
    blocks = [
        (path, downsample, spatial_module, f"{name}.transformer_blocks.{i}", block)
        for path, downsample, name, spatial_module in places
        for i, block in enumerate(getattr(spatial_module, "transformer_blocks", ()))
        if isinstance(block, BasicTransformerBlock) and not _only_cross(block)
    ]
    if not blocks:
        raise ValueError(
            f"no eligible block in {type(unet).__name__}: looked in down_blocks, mid_block and up_blocks for "
            f"Transformer2DModel whose BasicTransformerBlocks have self-attention, found {len(places)} "
            "Transformer2DModel; diffusion transformers (DiT, SD3, Flux) and Kandinsky's UNets have none"
        )
    levels = sorted({downsample for _, downsample, *_ in blocks})
    infos = []
    for depth, (path, downsample, spatial_module, name, block) in enumerate(blocks):
        parts = {"norm": block.norm1, "attn": block.attn1, "crossattn": block.attn2, "mlp": block.ff}
        parts = {role: part for role, part in parts.items() if part is not None}
        level, width = levels.index(downsample), block.attn1.query_dim
        infos.append(BlockInfo(name, depth, path, level, downsample, width, spatial_module, parts, type(block)))
    return infos


def _stages(unet: nn.Module) -> Iterator[tuple[str, int, str, nn.Module]]:
    """(path, downsample, name, module) of every stage in execution order; downsample counts from the latent's side."""
    downsample = 1
    for i, stage in enumerate(getattr(unet, "down_blocks", None) or ()):
        yield "down", downsample, f"down_blocks.{i}", stage
        shrinks = getattr(stage, "downsamplers", None) or getattr(stage, "base_downsamplers", None)  # ControlNet-XS
        downsample *= 2 if shrinks else 1
    if getattr(unet, "mid_block", None) is not None:
        yield "mid", downsample, "mid_block", unet.mid_block  # type: ignore[misc]
    for i, stage in enumerate(getattr(unet, "up_blocks", None) or ()):
        yield "up", downsample, f"up_blocks.{i}", stage
        downsample //= 2 if getattr(stage, "upsamplers", None) else 1


def _only_cross(block: BasicTransformerBlock) -> bool:
    return bool(block.only_cross_attention or block.attn1.is_cross_attention)


def check_processors(patch: Patch) -> None:
    """RuntimeError for processors that cannot do what a patch asks of them, before anything is generated."""
    for part, _, fused, state in patch.swaps:
        if fused is FusedAttention and not _keeps_maps(part.processor):
            _check_processor(part, state)
        elif fused is FusedCrossAttention:
            _check_cross_processor(part.processor)


_SWAPS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "norm": (nn.LayerNorm, FusedNorm),
    "attn": (Attention, FusedAttention),
    "crossattn": (Attention, FusedCrossAttention),
    "mlp": (FeedForward, FusedFeedForward),
}


def swap(info: BlockInfo, role: str, ours: Collection[nn.Module] = ()) -> type[nn.Module]:
    """The class that takes the place of the site's layer `role`. RuntimeError where something else has wrapped it.

    ours: layers that an earlier patch had swapped; what hooked them since lies outside and goes on with the new one.
    """
    part, (known, fused) = info.layers[role], _SWAPS[role]
    where = f"{info.name}'s {role} layer"
    if info.block_class is not BasicTransformerBlock:
        name = f"{info.block_class.__module__}.{info.block_class.__qualname__}"
        raise RuntimeError(
            f"{info.name} is a {name}: something else has already wrapped this block (tomesd?); remove that patch first"
        )
    if type(part) is not known:
        raise RuntimeError(
            f"{where} is a {type(part).__module__}.{type(part).__qualname__}, not a plain {known.__name__}: something "
            "else has already wrapped it"
        )
    if role != "norm" and "forward" in vars(part) and part not in ours:
        refuse_wrapped(where)
    return fused
