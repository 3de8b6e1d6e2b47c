"""Patches models of ComfyUI, Forge and reForge, in which a model is a patcher that is cloned before it is changed.

`patch_model` adds AttentionPatches to a clone of a UNet, `patch_transformer` adds TransformerPatches to one of a
diffusion transformer. Nothing of these programs is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...config import TokenFusionConfig
from ...core.token_map import TokenMap
from ..ldm import PatchSummary, Place, find_places, summarize
from .attention_patches import AttentionPatches, attention_at
from .base_patches import KEY, ModelPatches, forget_graphs
from .transformer_families import Family, find_blocks
from .transformer_patches import TransformerPatches

_ONLY_SELF = "these programs let patches change only self-attention"
UNSUPPORTED = {
    "merge_crossattn": _ONLY_SELF,
    "merge_mlp": _ONLY_SELF,
    "share_across_cfg": "these programs decide which prompts go into a batch",
    "threshold": "it counts in one call for the next, and these programs may call a model several times a step",
}


def patch_model(
    patcher: Any,
    config: TokenFusionConfig,
    plain: Callable[..., Tensor],
    percent_to_sigma: Callable[[float], float] | None = None,
) -> tuple[Any, PatchSummary]:
    """Patches a clone of a program's model. A patch that it already has is replaced.

    Args:
        patcher: the program's model patcher; it stays unchanged.
        config: how tokens are merged.
        plain: the program's own attention(q, k, v, heads, options), for blocks that are not merged under
            `proportional`.
        percent_to_sigma: the noise level at a share of the sampling, for start and end.

    Returns:
        (the clone, which blocks are merged).

    Raises:
        ValueError: the model has no such blocks, an option is unavailable here, or another patch is in the way.
    """
    model = patcher.model.diffusion_model
    _check_options(config, percent_to_sigma)
    blocks = find_places(model)
    clone = patcher.clone()
    _attach(clone, AttentionPatches(config, blocks, percent_to_sigma, plain))
    return clone, summarize(model, blocks.values(), config)


def patch_transformer(
    patcher: Any,
    family: Family,
    config: TokenFusionConfig,
    plain: Callable[..., Tensor],
    percent_to_sigma: Callable[[float], float] | None = None,
) -> tuple[Any, PatchSummary]:
    """Patches a clone of a diffusion transformer of ComfyUI. A patch that it already has is replaced.

    Args:
        patcher, config, plain, percent_to_sigma: as in `patch_model`.
        family: of the diffusion model.

    Returns:
        (the clone, which blocks are merged).

    Raises:
        ValueError: an option does not work with the model, or the model or the program is not as expected.
    """
    model = patcher.model.diffusion_model
    _check_options(config, percent_to_sigma)
    if config.levels > 1:
        raise ValueError(f"levels is {config.levels}, and {type(model).__name__} has one resolution: set it to 1")
    if not hasattr(patcher, "add_wrapper_with_key"):
        raise ValueError(f"this program cannot wrap calls of a model, which merging in {type(model).__name__} needs")
    blocks = find_blocks(model, family)
    clone = patcher.clone()
    _wrap(clone, TransformerPatches(config, blocks, percent_to_sigma, plain))
    return clone, summarize(model, blocks.values(), config)


def _check_options(config: TokenFusionConfig, percent_to_sigma: Callable[[float], float] | None) -> None:
    """Raises ValueError for an option that is unavailable in these programs."""
    for name, reason in UNSUPPORTED.items():
        if getattr(config, name) is not None and getattr(config, name) is not False:
            raise ValueError(f"{name} is unavailable here: {reason}")
    if (config.start, config.end) != (0, 1) and percent_to_sigma is None:
        raise ValueError(f"start is {config.start:g} and end is {config.end:g}: this model has no noise levels")


def record_model_maps(patcher: Any, on_map: Callable[[Place, TokenMap, int, int], None]) -> tuple[Any, ModelPatches]:
    """Clones a patched model so that `on_map` is called with every map: (place, map, h, w).

    Returns:
        (the clone, its patches). The model itself stays unchanged.

    Raises:
        ValueError: the model is not patched.
    """
    before = patches_of(patcher)
    if before is None:
        raise ValueError("this model merges no tokens: put Token Fusion (ToFu) before Token Fusion Map")
    clone = patcher.clone()
    patches = before.recording(on_map)
    if isinstance(patches, AttentionPatches):
        _attach(clone, patches)
    else:
        _wrap(clone, patches)
    return clone, patches


def patches_of(model: Any) -> ModelPatches | None:
    """Returns the patches of a model, or None."""
    options = model.model_options.get("transformer_options", {})
    wrappers = options.get("wrappers", {}).get("apply_model", {}).get(KEY, ())
    functions = (*wrappers, *options.get("patches", {}).get("attn1_patch", ()))
    owners = (getattr(function, "__self__", None) for function in functions)
    return next((owner for owner in owners if isinstance(owner, ModelPatches)), None)


def _wrap(clone: Any, patches: Any) -> None:
    """Puts the wrapper of patches into the options of a clone, in place of an older one.

    The options are copied, as they may still be those of the original model.
    """
    options = clone.model_options["transformer_options"] = dict(clone.model_options.get("transformer_options", {}))
    wrappers = options["wrappers"] = dict(options.get("wrappers", {}))
    wrappers["apply_model"] = {**wrappers.get("apply_model", {}), KEY: [patches.around_model]}


def _attach(clone: Any, patches: AttentionPatches) -> None:
    """Adds patches to a clone, in place of older ones.

    Raises:
        ValueError: `proportional` is set and another node has replaced self-attention, in a program that does not show
            at run time which node has.
    """
    _detach(clone.model_options)
    wraps, modifies = hasattr(clone, "add_wrapper_with_key"), hasattr(clone, "add_block_inner_modifier")
    if patches.config.proportional:
        replaced = clone.model_options["transformer_options"]["patches_replace"].get("attn1", {})
        if not (wraps or modifies) and any(attention_at(replaced, place) for place in patches.places):
            raise ValueError(
                "another patch has replaced self-attention in this model, so its keys cannot be weighted: turn "
                "proportional off"
            )
        for side, number in dict.fromkeys(place[:2] for place in patches.places):
            if (side, number) not in replaced:  # the program looks there last, so another's function is never hidden
                clone.set_model_attn1_replace(patches.attention, side, number)
    clone.set_model_attn1_patch(patches.before)
    clone.set_model_attn1_output_patch(patches.after)
    if modifies:
        clone.add_block_inner_modifier(patches.store_size)
    if wraps:  # in the options, with which the other functions are copied
        _wrap(clone, patches)
    else:
        forget_graphs(patches)


def _detach(model_options: dict[str, Any]) -> None:
    """Removes older patches of ours from a clone. Its lists may still be those of the original model."""

    def is_ours(patch: Any) -> bool:
        return isinstance(getattr(patch, "__self__", None), AttentionPatches)

    options = model_options["transformer_options"] = dict(model_options.get("transformer_options", {}))
    lists = options["patches"] = dict(options.get("patches", {}))
    replaced = options["patches_replace"] = dict(options.get("patches_replace", {}))
    for name, patches in lists.items():
        lists[name] = [patch for patch in patches if not is_ours(patch)]
    if "block_inner_modifiers" in options:  # Forge's
        options["block_inner_modifiers"] = [patch for patch in options["block_inner_modifiers"] if not is_ours(patch)]
    if "attn1" in replaced:
        replaced["attn1"] = {place: patch for place, patch in replaced["attn1"].items() if not is_ours(patch)}
