"""diffusers: where a UNet's transformer blocks are, and the subclasses that take their layers' places.

Written against diffusers 0.32 to 0.42. Host words (hidden_states, encoder_hidden_states) live here alone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ..kernels.operators import is_compiling
from ..patch import ATTRIBUTE, Patch, Site, SiteFusion
from ..proportional import check_kernel
from ..reduce import unmerge
from .norm import FusedNorm, refuse_wrapped

logger = logging.getLogger("tofu_sd")


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


def find_sites(unet: nn.Module) -> list[Site]:
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
        (path, downsample, canvas, f"{name}.transformer_blocks.{i}", block)
        for path, downsample, name, canvas in places
        for i, block in enumerate(getattr(canvas, "transformer_blocks", ()))
        if isinstance(block, BasicTransformerBlock) and not _only_cross(block)
    ]
    if not blocks:
        raise ValueError(
            f"no eligible block in {type(unet).__name__}: looked in down_blocks, mid_block and up_blocks for "
            f"Transformer2DModel whose BasicTransformerBlocks have self-attention, found {len(places)} "
            "Transformer2DModel; diffusion transformers (DiT, SD3, Flux) and Kandinsky's UNets have none"
        )
    levels = sorted({downsample for _, downsample, *_ in blocks})
    sites = []
    for depth, (path, downsample, canvas, name, block) in enumerate(blocks):
        parts = {"norm": block.norm1, "attn": block.attn1, "crossattn": block.attn2, "mlp": block.ff}
        parts = {role: part for role, part in parts.items() if part is not None}
        level, width = levels.index(downsample), block.attn1.query_dim
        sites.append(Site(name, depth, path, level, downsample, width, canvas, parts, type(block)))
    return sites


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


# --- what is swapped in -----------------------------------------------------------------------------------------------
# Importable, so that a patched model pickles. Each reads tensors of its SiteFusion alone, so that it compiles. Whatever
# hooked such a layer keeps its method when the patch has gone: without a SiteFusion each is the host's own.


class FusedAttention(Attention):  # type: ignore[misc]
    """Self-attention over fused tokens. The processor, whichever it is, runs untouched on fewer tokens."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        site: SiteFusion | None = getattr(self, ATTRIBUTE, None)
        if site is None:
            return Attention.forward(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if site.normed:
            site.observe(hidden_states)
        map = site.take("attn", hidden_states)
        if map is None or encoder_hidden_states is not None or attention_mask is not None:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if _keeps_maps(self.processor):
            if not is_compiling():
                _report_left_alone(self.processor)
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        _check_processor(self, site)
        fused = site.reduce(hidden_states, map)
        bias = site.key_bias(hidden_states, map, sdpa=type(self.processor) in _SDPA)
        if bias is not None and self.upcast_attention and isinstance(self.processor, _UPCASTING):
            bias = bias.float()
        if site.keys_only:
            return super().forward(hidden_states, fused, bias, **kwargs)
        return unmerge(super().forward(fused, attention_mask=bias, **kwargs), map)


_SDPA = (AttnProcessor2_0, FusedAttnProcessor2_0)  # others look closely at their mask (xformers), or add it themselves
_UPCASTING = (AttnProcessor, SlicedAttnProcessor)  # they add the bias to scores in float32 under upcast_attention
_STOCK = Attention.__module__  # processors of diffusers itself, which tell cross-attention by nothing
_reads_mask: dict[type[Any], bool] = {}  # whether processors of a class heed their mask


def check_processors(patch: Patch) -> None:
    """RuntimeError for processors that cannot do what a patch asks of them, before anything is generated."""
    for part, _, fused, state in patch.swaps:
        if fused is FusedAttention and not _keeps_maps(part.processor):
            _check_processor(part, state)
        elif fused is FusedCrossAttention:
            _check_cross_processor(part.processor)


def _check_processor(attention: Attention, site: SiteFusion) -> None:
    """RuntimeError for a processor that does not attend to the keys and weights it is given."""
    if not (site.keys_only or site.proportional):
        return
    processor = attention.processor
    name = type(processor).__name__
    if name.startswith("PAG") or "CrossFrame" in name:  # they split the batch, or take the keys of another frame
        option = "keys_only" if site.keys_only else "proportional"
        raise RuntimeError(f"{option} does not work with {name}, which takes keys of its own: leave {option} off")
    if site.keys_only and isinstance(processor, FusedAttnProcessor2_0):
        raise RuntimeError(
            "keys_only fuses keys and values apart from the queries, which fuse_qkv_projections() has made one "
            "projection: call unfuse_qkv_projections() first, or leave keys_only off"
        )
    if site.keys_only and type(processor).__module__ != _STOCK:
        raise RuntimeError(
            f"keys_only gives self-attention keys of its own, by which {name} may take it for cross-attention: leave "
            "keys_only off, or set a processor of diffusers.models.attention_processor"
        )
    if site.proportional and not is_compiling():
        check_kernel(attention.to_q.weight.device, attention.to_q.weight.dtype)
        if type(processor).__module__ != _STOCK and not _heeds_mask(attention):
            raise RuntimeError(
                f"proportional adds log(n) to the logits as an attention mask, which {name} does not heed: leave "
                "proportional off, or set a processor that does"
            )


def _check_cross_processor(processor: Any) -> None:
    """RuntimeError for a processor that may read maps of words, which have a row for each pixel."""
    if type(processor).__module__ != _STOCK:
        raise RuntimeError(
            f"merge_crossattn gives {type(processor).__name__} fewer queries than the map has pixels, and it may read "
            "attention maps: leave merge_crossattn off, or set a processor of diffusers.models.attention_processor"
        )


def _heeds_mask(attention: Attention) -> bool:
    """Whether a processor's result depends on its mask, found once for each class on a copy of it."""
    kind = type(attention.processor)
    if kind not in _reads_mask:
        weight = attention.to_q.weight
        x = torch.linspace(-1, 1, 4 * attention.query_dim, dtype=weight.dtype, device=weight.device).sin()
        x = x.view(1, 4, attention.query_dim)
        mask = x.new_tensor([0.0, 0.0, 0.0, 8.0]).view(1, 1, 4)
        with torch.no_grad():
            one, other = (copy.deepcopy(attention.processor)(attention, x, attention_mask=m) for m in (0 * mask, mask))
        _reads_mask[kind] = not torch.equal(one, other)
    return _reads_mask[kind]


def _keeps_maps(processor: Any) -> bool:
    """Whether a processor keeps attention maps, which its pipeline reads as images (self-attention guidance)."""
    return "Store" in type(processor).__name__


_reported: set[type[Any]] = set()


def _report_left_alone(processor: Any) -> None:
    if type(processor) not in _reported:
        _reported.add(type(processor))
        logger.warning(
            f"{type(processor).__name__} keeps attention maps for its pipeline: blocks that have it are not merged"
        )


class FusedCrossAttention(Attention):  # type: ignore[misc]
    """Cross-attention whose queries are fused tokens."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        site: SiteFusion | None = getattr(self, ATTRIBUTE, None)
        if site is None:
            return Attention.forward(self, hidden_states, *args, **kwargs)
        attend = super().forward
        if kwargs.get("ip_adapter_masks") is not None:  # they are laid on the full map
            return attend(hidden_states, *args, **kwargs)
        _check_cross_processor(self.processor)
        return site.around("crossattn", lambda x: attend(x, *args, **kwargs), hidden_states)


class FusedFeedForward(FeedForward):  # type: ignore[misc]
    """Feed-forward on fused tokens. A chunk of the tokens (chunked feed-forward) passes through unfused."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        site: SiteFusion | None = getattr(self, ATTRIBUTE, None)
        if site is None:
            return FeedForward.forward(self, hidden_states, *args, **kwargs)
        layer = super().forward
        return site.around("mlp", lambda x: layer(x, *args, **kwargs), hidden_states)


_SWAPS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "norm": (nn.LayerNorm, FusedNorm),
    "attn": (Attention, FusedAttention),
    "crossattn": (Attention, FusedCrossAttention),
    "mlp": (FeedForward, FusedFeedForward),
}


def swap(site: Site, role: str, ours: Collection[nn.Module] = ()) -> type[nn.Module]:
    """The class that takes the place of the site's layer `role`. RuntimeError where something else has wrapped it.

    ours: layers that an earlier patch had swapped; what hooked them since lies outside and goes on with the new one.
    """
    part, (known, fused) = site.parts[role], _SWAPS[role]
    where = f"{site.name}'s {role} layer"
    if site.block is not BasicTransformerBlock:
        raise RuntimeError(
            f"{site.name} is a {site.block.__module__}.{site.block.__qualname__}: something else has already wrapped "
            "this block (tomesd?); remove that patch first"
        )
    if type(part) is not known:
        raise RuntimeError(
            f"{where} is a {type(part).__module__}.{type(part).__qualname__}, not a plain {known.__name__}: something "
            "else has already wrapped it"
        )
    if role != "norm" and "forward" in vars(part) and part not in ours:
        refuse_wrapped(where)
    return fused
