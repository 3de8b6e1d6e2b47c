"""timm's vision transformers (ViT, DeiT; also AugReg's and MAE's): token reduction in classifiers.

`apply_patch(model, r=8)` merges tokens from the next call on, `remove_patch(model)` restores the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, TypeVar

import timm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..core.token_map import TokenMap
from ..patching import patch as patching
from ..patching.host import ATTRIBUTE, Argument, ArgumentNames, BlockInfo
from ..vit.methods import AdaptiveReduction, TokenReduction
from ..vit.reducer import Reducer

Model = TypeVar("Model", bound=nn.Module)
Method = TokenReduction | AdaptiveReduction
ARGUMENTS = ArgumentNames(
    latent=Argument(0, ("x",)),
    timestep=Argument(1, ()),
    conditioning=Argument(2, ()),
    tokens=Argument(0, ("x",)),
    keys="",
)


class ReducedBlock(Block):  # type: ignore[misc]
    """A block that merges tokens between its attention and its MLP (ToFu Eq. 3)."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        state: tuple[int, Reducer] | None = getattr(self, ATTRIBUTE, None)
        if state is None or attn_mask is not None:  # a mask covers all tokens
            out: Tensor = Block.forward(self, x, attn_mask=attn_mask, **more)
            return out
        layer, reducer = state
        reducer.start_layer(layer, x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=reducer.bias(x), **more)))
        x = reducer.reduce(layer, x)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class _KeysHook:
    """Forward hook of an attention's key norm: stores the keys [B, H, N, d], averaged over the heads."""

    def __init__(self, reducer: Reducer):
        self.reducer = reducer

    def __call__(self, module: nn.Module, args: Any, keys: Tensor) -> None:
        self.reducer.keys = keys.detach().mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class ClassifierPatch(patching.ModulePatch):
    """The patch of a classifier, and the state that its layers share."""

    reducer: Reducer


# --- the host's functions ---------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module) -> list[BlockInfo]:
    """Returns the blocks of a vision transformer of timm's, in order.

    Raises:
        ValueError: they are not timm's plain blocks. Names what was looked for.
    """
    blocks: list[Any] = list(getattr(model, "blocks", ()))
    other = next((block for block in blocks if type(block) not in (Block, ReducedBlock)), None)
    bare = next((block for block in blocks if other is None and not hasattr(block.attn, "k_norm")), None)
    if bare is not None:
        raise ValueError(
            f"{type(model).__name__} has no keys to compare tokens by: its attention is {type(bare.attn).__name__}, "
            "without timm's `k_norm`"
        )
    if not blocks or other is not None or not hasattr(model, "num_prefix_tokens"):
        kind = f"its blocks are {type(other).__module__}.{type(other).__qualname__}"
        raise ValueError(
            f"{type(model).__name__} has no blocks to merge tokens in: {'none found' if other is None else kind}; "
            "looked for timm.models.vision_transformer.Block in `blocks`, as ViT and DeiT have them"
        )
    downsample = int(getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0])
    return [
        BlockInfo(
            f"blocks.{depth}", depth, "down", 0, downsample, block.norm1.normalized_shape[0], model,
            {"block": block, "norm": block.norm1, "attn": block.attn, "mlp": block.mlp}, type(block),
        )
        for depth, block in enumerate(blocks)
    ]  # fmt: skip


def swap_class(block: BlockInfo, layer: str, swapped: Collection[nn.Module] = ()) -> type[nn.Module]:
    """Returns the class that replaces a block's class. ValueError for another layer."""
    if layer != "block":
        raise ValueError(f"{layer} layers are not patched here, only whole blocks")
    return ReducedBlock


def latent_size(model: nn.Module) -> tuple[int, int] | None:
    """Returns height and width of the images that a model is made for; None where it is unknown."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


# --- patching ---------------------------------------------------------------------------------------------------------


def apply_patch(
    model: nn.Module | str,
    r: int | Method = 8,
    *,
    images: Tensor | None = None,
    **options: Any,
) -> Any:
    """Merges tokens in a classifier from the next call on. A patch that it already has is replaced.

    Args:
        model: a vision transformer of timm's, or the name of one, which is created with its pretrained weights.
        r: number of tokens merged in each layer, or a TokenReduction or AdaptiveReduction.
        images: [B, 3, H, W], as the model takes them; only for depth_split="auto", which measures the functional
            linearity of its MLPs on them (`measured_split`).
        options: fields of the reduction.

    Returns:
        The model, patched in place.

    Raises:
        ValueError: a value is out of range, r is more than half of the model's tokens, or there are no such blocks.
        TypeError: an unknown option. After any error the model is unchanged.
    """
    net: Any = timm.create_model(model, pretrained=True) if isinstance(model, str) else model
    blocks = find_blocks(net)
    auto = _is_auto(images, options)
    method = _method(r, {**options, "depth_split": 0} if auto else options)
    _check_fits(net, method)
    before = vars(net).get(ATTRIBUTE)
    remove_patch(net)
    if auto and images is not None and isinstance(method, TokenReduction):
        from .timm_linearity import measured_split

        try:
            method = replace(method, depth_split=measured_split(net, images))
        except BaseException:  # an interrupt too must not lose the earlier patch; raised again below
            if isinstance(before, ClassifierPatch):
                apply_patch(net, before.reducer.method)
            raise
    _attach(net, blocks, method)
    return net


def _is_auto(images: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether depth_split is to be measured. ValueError where images are missing for it, or given without it."""
    auto = options.get("depth_split") == "auto"
    if auto and images is None:
        raise ValueError("depth_split is 'auto', which is measured on images: give some as images=, or a number")
    if images is not None and not auto:
        raise ValueError("images are given, and depth_split is not 'auto', which alone needs them")
    return auto


def _method(r: int | Method, options: dict[str, Any]) -> Method:
    return replace(r, **options) if isinstance(r, AdaptiveReduction) else TokenReduction.of(r, **options)


def _check_fits(model: Any, method: Method) -> None:
    """Raises ValueError for a method that does not fit a model."""
    tokens = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if isinstance(method, TokenReduction) and tokens is not None and method.r > tokens // 2:
        raise ValueError(f"r is {method.r}; of {tokens} patch tokens at most {tokens // 2} can be merged in a layer")
    if isinstance(method, AdaptiveReduction) and method.class_only and getattr(model, "global_pool", "") != "token":
        raise ValueError(
            f"class_only is True, and {type(model).__name__} classifies by its patch tokens (global_pool is "
            f"{getattr(model, 'global_pool', None)!r}): set class_only=False"
        )


def _attach(model: Any, blocks: list[BlockInfo], method: Method) -> None:
    reducer = Reducer(method, len(blocks), int(model.num_prefix_tokens))
    layers: list[Any] = [block.layers["block"] for block in blocks]
    swaps = tuple(
        (layer, Block, swap_class(block, "block"), (block.depth, reducer))
        for block, layer in zip(blocks, layers, strict=True)
    )
    after = tuple((layer.attn.k_norm, _KeysHook(reducer)) for layer in layers)
    patching.attach(model, ClassifierPatch(swaps, after=after, reducer=reducer))
    if hasattr(model, "forward_intermediates"):
        model.forward_intermediates = _NoMaps(model)


def remove_patch(model: Model) -> Model:
    """Removes the patch: restores classes, attributes, hooks and output. A model without one stays unchanged."""
    if isinstance(vars(model).get(ATTRIBUTE), ClassifierPatch):
        patching.detach(model)
        vars(model).pop("forward_intermediates", None)
    return model


class _NoMaps:
    """Replaces a patched model's `forward_intermediates`: merged tokens cannot be laid out as maps."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = type(self.model).forward_intermediates  # type: ignore[attr-defined]
        call = signature(original).bind(self.model, *args, **kwargs)
        call.apply_defaults()
        if call.arguments.get("output_fmt") == "NCHW":
            raise ValueError("a patched model's tokens are too few for maps: output_fmt='NLC' gives them as they are")
        return original(self.model, *args, **kwargs)


@contextmanager
def record_maps(model: nn.Module) -> Iterator[list[tuple[int, TokenMap]]]:
    """Records the maps of a patched model: `with record_maps(model) as maps: model(x)`.

    Yields:
        A list of (layer, map from the initial patch tokens to those that are left), one for each layer that merges.

    Raises:
        ValueError: the model has no patch.
    """
    patch = vars(model).get(ATTRIBUTE)
    if not isinstance(patch, ClassifierPatch):
        raise ValueError(f"{type(model).__name__} is not patched: it makes no maps; call apply_patch first")
    maps: list[tuple[int, TokenMap]] = []
    patch.reducer.on_map = lambda layer, map: maps.append((layer, map))
    try:
        yield maps
    finally:
        patch.reducer.on_map = None
