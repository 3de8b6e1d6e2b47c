"""timm's vision transformers (ViT, DeiT; AugReg's and MAE's too): where their blocks are, and what takes their place.

`apply_patch(model, r=8)` fuses tokens from the next call on, `remove_patch(model)` makes it the model it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.matching import bipartite_soft_matching
from ..core.token_map import TokenMap
from ..kernels import take
from ..patching.block_info import ATTRIBUTE
from ..patching.linearity import ROLES, best_split, functional_linearity
from ..vit.methods import AdaptiveReduction, TokenReduction, alternating
from ..vit.reducer import Reducer

Model = TypeVar("Model", bound=nn.Module)
PAIRS = 5  # of a picture, in each layer, of which linearity is measured (ToFu section 3.1)


class FusedBlock(Block):  # type: ignore[misc]
    """A block whose tokens grow fewer between its attention and its MLP (ToFu Eq. 3)."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        place: tuple[int, Reducer] | None = getattr(self, ATTRIBUTE, None)
        if place is None or attn_mask is not None:  # a mask is one of all tokens
            out: Tensor = Block.forward(self, x, attn_mask=attn_mask, **more)
            return out
        layer, reducer = place
        reducer.begin(layer, x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=reducer.bias(x), **more)))
        x = reducer.reduce(layer, x)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class _ShowKeys:
    """Forward hook of an attention's key norm, which passes on the keys [B, H, N, d]."""

    def __init__(self, reducer: Reducer):
        self.reducer = reducer

    def __call__(self, module: nn.Module, args: Any, keys: Tensor) -> None:
        self.reducer.keys = keys.detach().mean(dim=1)


class _Patch:
    """What `apply_patch` has done to a model."""

    def __init__(self, reducer: Reducer, handles: list[RemovableHandle], blocks: list[Block]):
        self.reducer = reducer
        self.handles = handles
        self.blocks = blocks  # the model may have others by the time it is removed


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a vision transformer of timm's. ValueError where they are not its plain ones."""
    blocks = list(getattr(model, "blocks", ()))
    other = next((block for block in blocks if type(block) not in (Block, FusedBlock)), None)
    bare = next((block for block in blocks if other is None and not hasattr(block.attn, "k_norm")), None)
    if bare is not None:
        raise ValueError(
            f"{type(model).__name__} has no keys to compare tokens by: its attention is {type(bare.attn).__name__}, "
            "without timm's `k_norm`"
        )
    if not blocks or other is not None or not hasattr(model, "num_prefix_tokens"):
        what = (
            f"its blocks are {type(other).__module__}.{type(other).__qualname__}" if other is not None else "none found"
        )
        raise ValueError(
            f"{type(model).__name__} has no blocks to fuse tokens in: {what}; looked for "
            "timm.models.vision_transformer.Block in `blocks`, as ViT and DeiT have them"
        )
    return blocks


def apply_patch(
    model: nn.Module | str,
    r: int | TokenReduction | AdaptiveReduction = 8,
    *,
    pictures: Tensor | None = None,
    **options: Any,
) -> Any:
    """Fuses tokens in a classifier from the next call on, and returns it. One that is patched is patched anew.

    model: a vision transformer of timm's, or the name of one, which is made with its pretrained weights. r: tokens that
    leave in each layer, or a TokenReduction, whose fields the options are; or an AdaptiveReduction. pictures
    [B, 3, H, W], as the model is shown them: for depth_split="auto", which sets the split by the functional linearity
    of its MLPs on them (`measured_split`).

    ValueError for a value out of range, more than half of the model's tokens for r, or a model without such blocks;
    TypeError for an unknown option. The model is then as it was.
    """
    made: Any = timm.create_model(model, pretrained=True) if isinstance(model, str) else model
    blocks = find_blocks(made)
    auto = options.get("depth_split") == "auto"
    if auto != (pictures is not None):
        raise ValueError(
            "depth_split is 'auto', which measures the model on pictures: give some as pictures=, or a number"
            if auto
            else "pictures are given, and depth_split is not 'auto', which alone takes some"
        )
    if auto:
        options["depth_split"] = 0  # for the time being
    told = replace(r, **options) if isinstance(r, AdaptiveReduction) else TokenReduction.of(r, **options)
    tokens = getattr(getattr(made, "patch_embed", None), "num_patches", None)
    if isinstance(told, TokenReduction) and tokens is not None and told.r > tokens // 2:
        raise ValueError(f"r is {told.r}; of {tokens} patch tokens at most {tokens // 2} can leave in a layer")
    if isinstance(told, AdaptiveReduction) and told.class_only and getattr(made, "global_pool", "") != "token":
        raise ValueError(
            f"class_only is True, and {type(made).__name__} classifies by its patch tokens (global_pool is "
            f"{getattr(made, 'global_pool', None)!r}): set class_only=False"
        )
    before = vars(made).get(ATTRIBUTE)
    remove_patch(made)
    if pictures is not None and isinstance(told, TokenReduction):
        try:
            told = replace(told, depth_split=measured_split(made, pictures))
        except Exception:
            if isinstance(before, _Patch):
                apply_patch(made, before.reducer.told)
            raise
    if hasattr(made, "forward_intermediates"):
        made.forward_intermediates = _NoMaps(made)
    reducer = Reducer(told, len(blocks), int(made.num_prefix_tokens))
    for layer, block in enumerate(blocks):
        block.__class__ = FusedBlock
        setattr(block, ATTRIBUTE, (layer, reducer))
    handles = [block.attn.k_norm.register_forward_hook(_ShowKeys(reducer)) for block in blocks]
    setattr(made, ATTRIBUTE, _Patch(reducer, handles, blocks))
    return made


def remove_patch(model: Model) -> Model:
    """Classes, attributes, hooks and output are what they were before the patch; without one nothing happens."""
    patch = vars(model).get(ATTRIBUTE)
    if isinstance(patch, _Patch):
        for handle in patch.handles:
            handle.remove()
        for block in patch.blocks:
            vars(block).pop(ATTRIBUTE, None)
            block.__class__ = Block
        delattr(model, ATTRIBUTE)
        vars(model).pop("forward_intermediates", None)
    return model


class _NoMaps:
    """Stands before a patched model's `forward_intermediates`: tokens are too few to be laid out as maps."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = type(self.model).forward_intermediates  # type: ignore[attr-defined]
        told = signature(original).bind(self.model, *args, **kwargs)
        told.apply_defaults()
        if told.arguments.get("output_fmt") == "NCHW":
            raise ValueError("a patched model's tokens are too few for maps: output_fmt='NLC' gives them as they are")
        return original(self.model, *args, **kwargs)


def measured_split(model: nn.Module, pictures: Tensor) -> int:
    """d (ToFu Eq. 7): from which layer on averaging is better than pruning, by the `linearity` of the layers' MLPs."""
    layers = linearity(model, pictures).mean(dim=1).tolist()
    return best_split(dict(enumerate(layers)))


@torch.no_grad()
def linearity(model: nn.Module, pictures: Tensor, r: int = PAIRS, role: str = "mlp") -> Tensor:
    """Functional linearity (ToFu Eq. 8, Fig. 3) of each block's MLP: [blocks, B], the mean over a picture's pairs.

    The pairs are the r patch tokens that would be fused before the MLP in that block, each with the one it is most
    like; the model itself runs with all of them. role "attn": of its attention instead, as a function of a query among
    the keys and values of all tokens. The norm before a layer is a part of it, for tokens are fused before that.

    ValueError for a patched model, an r that is not a number of its sources, another role, or as `find_blocks` raises.
    """
    blocks = find_blocks(model)
    most = int(model.patch_embed.num_patches) // 2  # type: ignore[union-attr, arg-type]
    if not 1 <= r <= most:
        raise ValueError(f"r is {r}; of these patch tokens from 1 to {most} can be fused")
    if role not in ROLES:
        raise ValueError(f"role is {role!r}; it must be {' or '.join(ROLES)}")
    if isinstance(vars(model).get(ATTRIBUTE), _Patch):
        raise ValueError(f"{type(model).__name__} is patched: linearity is the model's own, remove_patch comes first")
    prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
    seen: dict[str, Tensor] = {}  # of the block that runs
    found: list[Tensor] = []

    def begin(norm1: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["x"] = args[0]

    def see(k_norm: nn.Module, args: Any, out: Tensor) -> None:
        seen["keys"] = out.mean(dim=1)[:, prefix:]

    def measure(block: Any, norm2: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, keys = seen["x"], seen["keys"]
        map = bipartite_soft_matching(keys, alternating(keys.shape[1], keys.device), r)
        home = map.kept_idx.gather(1, map.group_idx)  # of each token, the token that stands for it
        gone = (home != torch.arange(home.shape[1], device=home.device)).nonzero()[:, 1].view(len(home), -1)
        patches = (args[0] if role == "mlp" else x)[:, prefix:]
        x1, x2 = (take(patches, at) for at in (gone, home.gather(1, gone)))

        def layer(points: Tensor) -> Tensor:
            if role == "mlp":
                out: Tensor = block.mlp.forward(block.norm2.forward(points))
                return out
            return asked(block, x, points)

        found.append(functional_linearity(layer, x1, x2).mean(dim=1))  # `asked` shows keys too; the next block's follow

    handles = [block.norm1.register_forward_pre_hook(begin) for block in blocks]
    handles += [block.attn.k_norm.register_forward_hook(see) for block in blocks]
    handles += [block.norm2.register_forward_pre_hook(partial(measure, block)) for block in blocks]
    try:
        model(pictures)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def asked(block: Block, x: Tensor, points: Tensor) -> Tensor:
    """What a block's attention over the tokens x [B, N, C] answers to each of `points` [B, r, P, C]: of the same shape.

    They stand behind the tokens, and nobody looks at them.
    """
    N = x.shape[1]
    both = torch.cat([x, points.flatten(1, 2)], dim=1)
    mask = x.new_zeros(both.shape[1])
    mask[N:] = -torch.inf
    answers: Tensor = block.attn.forward(block.norm1.forward(both), attn_mask=mask[None, None, None])
    return answers[:, N:].view(points.shape)


@contextmanager
def record_maps(model: nn.Module) -> Iterator[list[tuple[int, TokenMap]]]:
    """`with watch(model) as seen: model(x)` keeps (layer, the map of the first patch tokens so far) of every layer
    that fuses some.

    ValueError for a model without a patch.
    """
    patch = vars(model).get(ATTRIBUTE)
    if not isinstance(patch, _Patch):
        raise ValueError(f"{type(model).__name__} is not patched: there are no maps to watch; apply_patch comes first")
    seen: list[tuple[int, TokenMap]] = []
    patch.reducer.watcher = lambda layer, map: seen.append((layer, map))
    try:
        yield seen
    finally:
        patch.reducer.watcher = None
