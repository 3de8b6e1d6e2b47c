"""diffusers: where a UNet's transformer blocks are, and which subclasses replace the classes of their layers.

Written for diffusers 0.32 to 0.42.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from ..config import TokenFusionConfig
from ..patching.host import Argument, ArgumentNames, BlockInfo
from ..patching.patch import Patch
from ._norm import NormForMatching, check_forward
from .diffusers_layers import MergedAttention, MergedCrossAttention, MergedFeedForward
from .diffusers_processors import _check_cross_processor, _check_processor, _stores_attention_maps
from .unwrapping import unwrapped

ARGUMENTS = ArgumentNames(
    latent=Argument(0, ("sample",)),
    timestep=Argument(1, ("timestep",)),
    conditioning=Argument(2, ("encoder_hidden_states",)),
    tokens=Argument(0, ("hidden_states",)),
    keys="encoder_hidden_states",
)


def unwrap(model: Any) -> tuple[nn.Module, int | None]:
    """Returns (the UNet of a pipeline, or the module itself without its wrappers; the scheduler's training steps).

    Wrappers are those of torch.compile, DistributedDataParallel, DataParallel and PEFT. The steps are None for a
    scheduler whose timesteps do not count down from them, but are functions of the noise.

    Raises:
        TypeError: there is no UNet.
    """
    unet = unwrapped(getattr(unwrapped(model), "unet", model))
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


def _no_unet(model: Any, unet: Any) -> str:
    """Returns the message for a model that has no UNet of torch."""
    if unet is not model:
        kind = f"{type(unet).__module__}.{type(unet).__qualname__}"
        return (
            f"the `unet` of {type(model).__name__} is a {kind} and no torch module (ONNX Runtime, OpenVINO and "
            "TensorRT run exported models, which cannot be patched): use the pipeline of diffusers"
        )
    return (
        f"{type(model).__name__} has no `unet`: token fusion patches the transformer blocks of Stable Diffusion's "
        "UNets (SD 1.x, 2.x, SDXL and their relatives) and of diffusion transformers (SD3, Flux); pass such a "
        "pipeline, its UNet or its transformer"
    )


def latent_size(unet: nn.Module) -> tuple[int, int]:
    """Returns height and width of the latent that the model was made for; 64 x 64 where its config has none."""
    size = getattr(getattr(unet, "config", None), "sample_size", None) or 64
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def default_options() -> Mapping[str, Any]:
    """Returns the options that differ from the configuration's own defaults: none."""
    return {}


def check_config(unet: nn.Module, config: TokenFusionConfig) -> None:
    """Raises for an option that does not work with the model. UNets take all."""


def attention_share(unet: nn.Module, blocks: list[BlockInfo], latent: tuple[int, int]) -> float | None:
    """Returns None: which share of a step attention takes is not counted for UNets."""
    return None


def find_blocks(unet: nn.Module) -> list[BlockInfo]:
    """Returns all transformer blocks with self-attention over a 4-D map, in execution order, found by structure.

    Raises:
        ValueError: there is none. Names what was looked for.
    """
    modules = [
        (path, downsample, name, module)
        for path, downsample, prefix, stage in _stages(unet)
        for name, module in stage.named_modules(prefix=prefix)
        if isinstance(module, Transformer2DModel) and ".ctrl_" not in name  # ControlNet-XS's control side
    ]
    blocks = [
        (path, downsample, spatial_module, f"{name}.transformer_blocks.{i}", block)
        for path, downsample, name, spatial_module in modules
        for i, block in enumerate(getattr(spatial_module, "transformer_blocks", ()))
        if isinstance(block, BasicTransformerBlock) and not _only_cross(block)
    ]
    if not blocks:
        raise ValueError(
            f"no eligible block in {type(unet).__name__}: looked in down_blocks, mid_block and up_blocks for "
            f"Transformer2DModel whose BasicTransformerBlocks have self-attention, found {len(modules)} "
            "Transformer2DModel; Kandinsky's UNets have none"
        )
    levels = sorted({downsample for _, downsample, *_ in blocks})
    infos = []
    for depth, (path, downsample, spatial_module, name, block) in enumerate(blocks):
        layers = {"norm": block.norm1, "attn": block.attn1, "crossattn": block.attn2, "mlp": block.ff}
        layers = {key: layer for key, layer in layers.items() if layer is not None}
        level, width = levels.index(downsample), block.attn1.query_dim
        infos.append(BlockInfo(name, depth, path, level, downsample, width, spatial_module, layers, type(block)))
    return infos


def _stages(unet: nn.Module) -> Iterator[tuple[str, int, str, nn.Module]]:
    """Yields (path, downsample, name, module) of every stage in execution order; downsample is relative to the latent.

    A stage changes the size of its map at its end.
    """
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
    """Raises RuntimeError for processors that do not work with a patch, before anything is generated."""
    for layer, _, new_class, state in patch.swaps:
        processor: Any = getattr(layer, "processor", None)
        if new_class is MergedAttention and not _stores_attention_maps(processor):
            _check_processor(layer, state)
        elif new_class is MergedCrossAttention:
            _check_cross_processor(processor)


SWAPS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "norm": (nn.LayerNorm, NormForMatching),
    "attn": (Attention, MergedAttention),
    "crossattn": (Attention, MergedCrossAttention),
    "mlp": (FeedForward, MergedFeedForward),
}


def swap_class(block: BlockInfo, layer: str, swapped: Collection[nn.Module] = ()) -> type[nn.Module]:
    """Returns the subclass that replaces the class of a block's layer. RuntimeError where something has wrapped it."""
    module, (plain, merged) = block.layers[layer], SWAPS[layer]
    where = f"{block.name}'s {layer} layer"
    if block.block_class is not BasicTransformerBlock:
        name = f"{block.block_class.__module__}.{block.block_class.__qualname__}"
        raise RuntimeError(
            f"{block.name} is a {name}: something else has already wrapped this block (tomesd?); remove it first"
        )
    if type(module) is not plain:
        raise RuntimeError(
            f"{where} is a {type(module).__module__}.{type(module).__qualname__}, not a plain {plain.__name__}: "
            "something else has already wrapped it"
        )
    if layer != "norm" and module not in swapped:
        check_forward(module, where, merged)
    return merged
