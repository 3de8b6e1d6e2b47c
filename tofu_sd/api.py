"""The functions a user calls. Hosts are imported when the first model comes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from .config import TokenFusionConfig
from .environment import check_torchvision
from .linearity import measure_split
from .patching.host import BlockInfo
from .patching.patch import Patch, attach, detach, patch_of, plan, rules_of, states_of
from .patching.recording import MapRecord, recording
from .patching.summary import Summary, summarize
from .utils import did_you_mean

Model = TypeVar("Model")
logger = logging.getLogger("tofu_sd")

TOMESD = ("max_downsample", "sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp")  # in its order
CONTEXTS = "_tofu_contexts"


def apply_patch(model: Model, ratio: float | TokenFusionConfig = 0.5, *more: Any, **options: Any) -> Model:
    """Merges tokens in the self-attention of a Stable Diffusion pipeline or model, from the next call on.

    A model that is already patched is patched again with the new options. In training with gradient checkpointing, run
    backward while the model is patched and before the next forward: blocks run again and match again. What was patched
    is logged at INFO.

    Args:
        model: a diffusers pipeline, its UNet or diffusion transformer, or a ControlNet; compiled by torch.compile or
            not.
        ratio: share of tokens that are merged, or a TokenFusionConfig.
        more: tomesd's arguments by position.
        options: the fields of TokenFusionConfig, and tomesd's `max_downsample` and `use_rand`. `max_downsample` merges
            at resolutions down to that downsampling, always including the highest with attention. `use_rand` draws the
            destinations, reproducibly from `seed` (0 by default). Where text and image share one attention (Stable
            Diffusion 3, Flux, Qwen-Image), `proportional` is True by default, or the text would gain weight; a
            TokenFusionConfig is taken literally.

    Returns:
        The model, patched in place.

    Raises:
        ValueError: a value is out of range, or there is no eligible block.
        TypeError: an unknown option, or a model that is not supported. Names the class and the reason.
        RuntimeError: something else has wrapped a layer. After any error the model is unchanged.
    """
    host = _host(model)
    options = _by_name(more, options)
    if not isinstance(ratio, TokenFusionConfig):
        options = {**host.default_options(), **options}
    unet, train_steps = host.unwrap(model)
    before = patch_of(unet)
    if before is not None:
        detach(unet)
    try:
        blocks = host.find_blocks(unet)
        config = _config(blocks, ratio, options)
        host.check_config(unet, config)
        config = _measured(model, blocks, config)
        swapped = {layer for layer, *_ in before.swaps} if before else set()
        patch = plan(unet, blocks, config, host, train_steps=train_steps, swapped=swapped)
        host.check_processors(patch)
        attach(unet, patch)
        report = _summary(host, unet, blocks, host.latent_size(unet))
    except BaseException:  # also an interrupt must not lose the earlier patch
        if patch_of(unet) is not None:
            detach(unet)
        if before is not None:
            attach(unet, before)
        raise
    logger.info(report.headline)
    return model


def remove_patch(model: Model) -> Model:
    """Removes the patch: restores classes, attributes, hooks and output exactly.

    Args:
        model: what was patched, or anything that wraps or holds it. A model without a patch stays unchanged.
    """
    for unet in _patched_modules(model):
        detach(unet)
    return model


@contextmanager
def patched(model: Model, ratio: float | TokenFusionConfig = 0.5, *more: Any, **options: Any) -> Iterator[Model]:
    """Patches a model inside a `with` block and restores the earlier state after it: `with patched(pipe, 0.5): …`.

    Contexts on one model may end in any order: the patch of the latest open one is in effect. Arguments and errors are
    those of `apply_patch`.
    """
    unet, _ = _host(model).unwrap(model)
    context = _Context(patch_of(unet))
    apply_patch(model, ratio, *more, **options)
    vars(unet).setdefault(CONTEXTS, []).append(context)
    try:
        yield model
    finally:
        _leave(unet, context)


@dataclass(eq=False)
class _Context:
    """An open `patched` block, and the patch that it restores."""

    before: Patch | None


def _leave(unet: Any, context: _Context) -> None:
    """Ends a context: the latest one restores the earlier patch, an earlier one passes it to the next."""
    contexts: list[_Context] = vars(unet)[CONTEXTS]
    index = contexts.index(context)
    if index + 1 < len(contexts):
        contexts[index + 1].before = context.before
    else:
        if patch_of(unet) is not None:
            detach(unet)
        if context.before is not None:
            attach(unet, context.before)
    del contexts[index]
    if not contexts:
        delattr(unet, CONTEXTS)


def _patched_modules(model: Any) -> list[Any]:
    """Returns the patched modules that a model is, wraps or holds."""
    unet, _ = _host(model).unwrap(model)
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
    """Returns which blocks of a model are merged, and how many tokens each keeps. `print` it.

    After a run it also contains how many calls ran on merged tokens; compiled blocks do not count.

    Args:
        model: a pipeline or its model, patched or not.
        latent: height and width of the latent (pixels / 8); by default the model's own sample size.

    Raises:
        ValueError: the latent has no area.
    """
    host = _host(model)
    unet, _ = host.unwrap(model)
    unet = next(iter(_patched_modules(unet)), unet)
    return _summary(host, unet, host.find_blocks(unet), latent or host.latent_size(unet))


def _summary(host: Any, unet: Any, blocks: list[BlockInfo], latent: tuple[int, int]) -> Summary:
    patch = patch_of(unet)
    rules = rules_of(patch) if patch else {}
    counts = {name: state.counts for name, state in states_of(patch).items()} if patch else {}
    config = patch.config if patch else None
    share = host.attention_share(unet, blocks, latent) if min(latent) > 0 else None
    return summarize(type(unet).__name__, blocks, config, rules, latent, counts, share)


def _host(model: Any) -> Any:
    """Returns the diffusers host of a model, imported when the first model comes."""
    check_torchvision()
    from .hosts import diffusers_transformers, diffusers_unet

    return diffusers_transformers.host_of(model) or diffusers_unet


def _by_name(more: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options with tomesd's positional arguments. TypeError for too many, or for one given twice."""
    if len(more) > len(TOMESD):
        raise TypeError(f"{len(more)} arguments after the ratio; tomesd has {len(TOMESD)}: {', '.join(TOMESD)}")
    by_position = dict(zip(TOMESD, more, strict=False))
    duplicate = next((name for name in by_position if name in options), None)
    if duplicate:
        raise TypeError(f"{duplicate} is given by position and by name: give it once")
    return {**by_position, **options}


def _config(blocks: list[BlockInfo], ratio: float | TokenFusionConfig, options: dict[str, Any]) -> TokenFusionConfig:
    """Returns TokenFusionConfig.of the options, with tomesd's two names translated."""
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
        seed = options.get("seed", ratio.seed if isinstance(ratio, TokenFusionConfig) else None)
        options["seed"] = (seed or 0) if options.pop("use_rand") else None
    return TokenFusionConfig.of(ratio, **options)


def _measured(model: Any, blocks: list[BlockInfo], config: TokenFusionConfig) -> TokenFusionConfig:
    """Returns the configuration with a number for depth_split "auto", measured on the pipeline."""
    if config.depth_split != "auto":
        return config
    return replace(config, depth_split=measure_split(model, blocks, config))
