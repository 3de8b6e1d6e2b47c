"""The verbs a user calls. Everything heavy is imported when a model comes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

from .config import TokenFusionConfig
from .environment import check_torchvision
from .patching.autotune import break_even
from .patching.block_info import BlockInfo
from .patching.patch import Patch, attach, detach, min_tokens_by_level, patch_of, plan, set_min_tokens, states_of
from .patching.recording import MapRecord, recording
from .patching.summary import Summary, summarize
from .utils import did_you_mean

Model = TypeVar("Model")
logger = logging.getLogger("tofu_sd")
if not logger.handlers:  # loud by default, as diffusers and transformers are; logging.getLogger("tofu_sd") quietens it
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


TOMESD = ("max_downsample", "sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp")  # in its order
CONTEXTS = "_tofu_contexts"


def apply_patch(model: Model, ratio: float | TokenFusionConfig = 0.5, *more: Any, **options: Any) -> Model:
    """Fuses tokens in the self-attention of a Stable Diffusion pipeline or UNet, from the next call on.

    model: a diffusers pipeline with a `unet`, a UNet, or a ControlNet; torch.compile'd or not.
    ratio: share of tokens fused away, or a TokenFusion. options: TokenFusion's fields, and tomesd's names:
    `max_downsample` (fuse down to that downsampling; the highest resolution with attention is always fused) and
    `use_rand` (draw destinations; reproducible here, from `seed`, 0 if none is given). more: tomesd's arguments by
    place.

    Returns `model`, patched in place. A model that is already patched is patched anew. In training with gradient
    checkpointing, go backward while patched and before the next forward: blocks run again and match again.
    Raises ValueError (value out of range, no eligible block), TypeError (unknown option, no UNet) or RuntimeError (a
    layer that something else has wrapped); the model is then as it was.
    """
    host = _host()
    options = _by_name(more, options)
    unet, train_steps = host.unwrap(model)
    before = patch_of(unet)
    if before is not None:
        detach(unet)
    try:
        blocks = host.find_blocks(unet)
        swap = partial(host.swap, ours={part for part, *_ in before.swaps} if before else set())
        fusion = _fusion(blocks, ratio, options)
        if fusion.depth_split == "auto":
            from .linearity import (
                measure_split,  # here: `python -m tofu_sd.linearity` begins with this package
            )

            fusion = replace(fusion, depth_split=measure_split(model, blocks, fusion))
        patch = plan(unet, blocks, fusion, swap, train_steps, host.latent_size(unet))
        host.check_processors(patch)
        attach(unet, patch)
        if patch.fusion.min_tokens == "auto":
            set_min_tokens(unet, break_even(unet))
        report = _summary(unet, blocks, host.latent_size(unet))
    except BaseException:  # an interrupt too must not lose the patch that was there; raised again below
        if patch_of(unet) is not None:
            detach(unet)
        if before is not None:
            attach(unet, before)
        raise
    logger.info(report.headline)
    return model


def remove_patch(model: Model) -> Model:
    """Takes the patch off: classes, attributes, hooks and output are what they were before it.

    model: what was patched, or anything that wraps or holds it. A model without a patch stays as it is.
    """
    for unet in _patched_modules(model):
        detach(unet)
    return model


@contextmanager
def patched(model: Model, ratio: float | TokenFusionConfig = 0.5, *more: Any, **options: Any) -> Iterator[Model]:
    """`with patched(pipe, 0.5): …` applies the patch and, however the block ends, puts back what was there before.

    Contexts on one model may end in any order: the patch of the latest one that is open counts.
    """
    unet, _ = _host().unwrap(model)
    context = _Context(patch_of(unet))
    apply_patch(model, ratio, *more, **options)
    vars(unet).setdefault(CONTEXTS, []).append(context)
    try:
        yield model
    finally:
        _leave(unet, context)


@dataclass(eq=False)
class _Context:
    """An open `patched` block. before: what it puts back."""

    before: Patch | None


def _leave(unet: Any, context: _Context) -> None:
    """Ends a context: the last one opened puts back what was there, an earlier one hands that to the next."""
    contexts: list[_Context] = vars(unet)[CONTEXTS]
    place = contexts.index(context)
    if place + 1 < len(contexts):
        contexts[place + 1].before = context.before
    else:
        if patch_of(unet) is not None:
            detach(unet)
        if context.before is not None:
            attach(unet, context.before)
    del contexts[place]
    if not contexts:
        delattr(unet, CONTEXTS)


def _patched_modules(model: Any) -> list[Any]:
    """The patched modules that a model is, wraps or holds."""
    unet, _ = _host().unwrap(model)
    if patch_of(unet) is not None:
        return [unet]
    return [module for module in unet.modules() if patch_of(module) is not None]


@contextmanager
def record_maps(model: Any) -> Iterator[list[MapRecord]]:
    """Records every map that the patched blocks make: `with record_maps(pipe) as records: pipe(...)`.

    Compiled blocks record none.

    Args:
        model: a patched pipeline or UNet.

    Yields:
        A list of MapRecord. `records[i].map` is a TokenMap on the CPU (kept_idx [B, K], group_idx [B, N]), made by
        `.block` in `.call` of the model over `.h` x `.w` = N tokens. `draw_merge_map` draws it.

    Raises:
        ValueError: the model has no patch.
    """
    for unet in _patched_modules(model)[:1]:
        patch = patch_of(unet)
        assert patch is not None
        with recording(unet, patch) as records:
            yield records
        return
    raise ValueError(f"{type(model).__name__} is not patched: it makes no maps; call apply_patch first")


def summary(model: Any, latent: tuple[int, int] | None = None) -> Summary:
    """Which blocks of a model are fused, and how many tokens each keeps. `print` it.

    latent: height and width of the latent (pixels / 8), by default the model's own sample size. After a run it also
    says how many calls have run on merged tokens (compiled blocks do not count). ValueError for a latent without area.
    """
    host = _host()
    unet, _ = host.unwrap(model)
    unet = next(iter(_patched_modules(unet)), unet)
    return _summary(unet, host.find_blocks(unet), latent or host.latent_size(unet))


def _summary(unet: Any, blocks: list[BlockInfo], latent: tuple[int, int]) -> Summary:
    patch = patch_of(unet)
    least = min_tokens_by_level(patch) if patch else {}
    counts = {name: state.counts for name, state in states_of(patch).items()} if patch else {}
    return summarize(type(unet).__name__, blocks, patch.fusion if patch else None, least, latent, counts)


def _host() -> ModuleType:
    """The diffusers host, imported when the first model comes."""
    check_torchvision()
    from .hosts import diffusers_unet as diffusers

    return diffusers


def _by_name(more: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Options with tomesd's arguments by place among them. TypeError for too many, or for one given twice."""
    if len(more) > len(TOMESD):
        raise TypeError(f"{len(more)} arguments after the ratio; tomesd has {len(TOMESD)}: {', '.join(TOMESD)}")
    by_place = dict(zip(TOMESD, more, strict=False))
    twice = [name for name in by_place if name in options]
    if twice:
        raise TypeError(f"{twice[0]} is given by position and by name: give it once")
    return {**by_place, **options}


def _fusion(blocks: list[BlockInfo], ratio: float | TokenFusionConfig, options: dict[str, Any]) -> TokenFusionConfig:
    """TokenFusion.of, with tomesd's two names said in ours."""
    known = [*(f.name for f in fields(TokenFusionConfig)), "max_downsample", "use_rand"]
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    options = dict(options)
    if "max_downsample" in options:
        if "levels" in options:
            raise ValueError("set only one of levels and max_downsample, which mean the same")
        limit = options.pop("max_downsample")
        if limit not in (1, 2, 4, 8):
            raise ValueError(f"max_downsample is {limit!r}; it must be 1, 2, 4 or 8")
        options["levels"] = max(1, len({block.level for block in blocks if block.downsample <= limit}))
    if "use_rand" in options:
        given = options.get("seed", ratio.seed if isinstance(ratio, TokenFusionConfig) else None)
        options["seed"] = (given or 0) if options.pop("use_rand") else None
    return TokenFusionConfig.of(ratio, **options)
