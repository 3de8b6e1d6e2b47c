"""Site + policy + clock -> fused attention. Knows no host: a host says where the sites are and what to swap in.

A site's modules keep their weights, names and processors; only their class is swapped for a subclass of it that finds
its `BlockState` under the attribute `_tofu`. `detach` swaps it back and removes the attribute and the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import TokenFusionConfig
from .block_info import ATTRIBUTE, BlockInfo
from .block_state import BlockState, fusions
from .hooks import Hook, _GuidanceHook, _PartitionHook, _StepEndHook, _StepHook
from .step_tracker import StepTracker


@dataclass(frozen=True)
class Patch:
    """Everything `attach` does to a model, said before it is done."""

    fusion: TokenFusionConfig
    blocks: tuple[BlockInfo, ...]  # the fused ones
    swaps: tuple[tuple[nn.Module, type[nn.Module], type[nn.Module], BlockState], ...]  # layer, its class, the new one
    hooks: tuple[tuple[nn.Module, Hook], ...]  # run before a module
    after: tuple[tuple[nn.Module, _StepEndHook], ...] = ()  # run after it
    handles: tuple[RemovableHandle, ...] = ()  # of the hooks, once attached


def plan(
    model: nn.Module,
    blocks: Sequence[BlockInfo],
    fusion: TokenFusionConfig,
    swap: Callable[[BlockInfo, str], type[nn.Module]],
    train_steps: int | None,
    latent: tuple[int, int] | None = None,
    one_sampling: bool = False,
) -> Patch:
    """The patch that fuses the tokens of `blocks` under `fusion`; touches nothing.

    swap(site, role) gives the class to swap in or raises. train_steps: where the timesteps count down from; None where
    they do not, which a step window refuses with ValueError. latent: height and width of the latent to expect, where
    the model may be compiled. one_sampling: the patch is put on for the sampling of one batch alone.
    """
    if train_steps is None and (fusion.start, fusion.end) != (0, 1):
        raise ValueError(
            f"start is {fusion.start:g} and end is {fusion.end:g}: they measure progress by timestep, which this "
            "pipeline's scheduler does not count down to 0; leave them off or take another scheduler"
        )
    roles = {"attn", *fusion.layers} | ({"norm"} if fusion.match_on == "hidden" else set())
    steps = StepTracker(fusion, train_steps or 1, one_sampling)
    fused = fusions(blocks, fusion)
    swaps, canvases = [], dict[nn.Module, list[BlockState]]()
    for block, state in fused:
        canvases.setdefault(block.spatial_module, []).append(state)
        swaps += [
            (part, type(part), swap(block, layer), state) for layer, part in block.layers.items() if layer in roles
        ]
    shared_maps = tuple(dict.fromkeys(state.shared_map for _, state in fused if state.shared_map is not None))
    hooks: list[tuple[nn.Module, Hook]] = []
    if fusion.share_across_cfg and fusion.ratio:
        hooks.append((model, _GuidanceHook()))
    after: list[tuple[nn.Module, _StepEndHook]] = []
    if fusion.needs_timestep or shared_maps:
        tick = _StepHook(steps, shared_maps, [state for _, state in fused if state.adaptive])
        hooks.append((model, tick))
        if steps.follows_steps:
            after.append((model, _StepEndHook(tick)))
    least = 0 if fusion.min_tokens == "auto" else int(fusion.min_tokens)
    levels = {block.spatial_module: block.level for block, _ in fused}
    hooks += [
        (spatial_module, _PartitionHook(steps, states, levels[spatial_module], least))
        for spatial_module, states in canvases.items()
    ]
    if latent is not None:
        device = next(model.parameters()).device
        for size in sorted({block.map_size(latent) for block, _ in fused}):
            steps.expect(*size, device)
    return Patch(fusion, tuple(block for block, _ in fused), tuple(swaps), tuple(hooks), tuple(after))


def patch_of(model: nn.Module) -> Patch | None:
    """The patch a model carries, if any."""
    patch = vars(model).get(ATTRIBUTE)
    return patch if isinstance(patch, Patch) else None


def attach(model: nn.Module, patch: Patch) -> None:
    """Puts a planned patch on the model, which has none: all of it, or whatever interrupts, nothing."""
    handles: list[RemovableHandle] = []
    try:
        for part, _, fused, state in patch.swaps:
            part.__class__ = fused
            setattr(part, ATTRIBUTE, state)
        handles += (module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in patch.hooks)
        handles += (module.register_forward_hook(hook) for module, hook in patch.after)
        setattr(model, ATTRIBUTE, replace(patch, handles=tuple(handles)))
    except BaseException:
        _undo(patch, handles)
        raise


def detach(model: nn.Module) -> None:
    """Undoes `attach`: every class, attribute and hook is what it was before."""
    patch: Patch = getattr(model, ATTRIBUTE)
    _undo(patch, patch.handles)
    delattr(model, ATTRIBUTE)


def _undo(patch: Patch, handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    for part, original, _, _ in patch.swaps:
        vars(part).pop(ATTRIBUTE, None)
        part.__class__ = original


def states_of(patch: Patch) -> dict[str, BlockState]:
    """The state of each patched block, by its name."""
    owners = {part: block.name for block in patch.blocks for part in block.layers.values()}
    return {owners[part]: state for part, _, _, state in patch.swaps}


def set_min_tokens(model: nn.Module, least: dict[int, int]) -> None:
    """From now on the patch of a model fuses maps of at least so many tokens, given for each level."""
    patch = patch_of(model)
    for _, hook in patch.hooks if patch else ():
        if isinstance(hook, _PartitionHook):
            hook.least = least[hook.level]


def min_tokens_by_level(patch: Patch) -> dict[int, int]:
    """Of how many tokens a map is fused from on under a patch, for each level."""
    return {hook.level: hook.least for _, hook in patch.hooks if isinstance(hook, _PartitionHook)}
