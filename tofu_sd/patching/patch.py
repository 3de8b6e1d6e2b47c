"""Plans, attaches and detaches a patch. A host says where the blocks are and which class replaces each layer's class.

A block's layers keep their weights, names and processors. Only their class is swapped for a subclass, which finds its
state in the attribute `_tofu`. `detach` swaps it back and removes the attribute and the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import TokenFusionConfig
from .autotune import MergeRule
from .block_state import BlockState, block_states
from .hooks import Hook, _GuidanceHook, _PartitionHook, _StepEndHook, _StepHook
from .host import ATTRIBUTE, ArgumentNames, BlockInfo, Host, has_forward_of
from .shared_map import SharedMap
from .step_tracker import StepTracker


@dataclass(frozen=True)
class ModulePatch:
    """What `attach` does to a model, of any host.

    Args:
        swaps: (layer, its class, the new class, its state) for each layer.
        hooks: (module, forward pre-hook with keywords).
        after: (module, forward hook).
        handles: the handles of the hooks, once attached.
    """

    swaps: tuple[tuple[nn.Module, type[nn.Module], type[nn.Module], Any], ...]
    hooks: tuple[tuple[nn.Module, Callable[..., None]], ...] = ()
    after: tuple[tuple[nn.Module, Callable[..., None]], ...] = ()
    handles: tuple[RemovableHandle, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Patch(ModulePatch):
    """The patch of a UNet: its configuration, the patched blocks and the names of the host's arguments."""

    config: TokenFusionConfig
    blocks: tuple[BlockInfo, ...]
    arguments: ArgumentNames


def plan(
    model: nn.Module,
    blocks: Sequence[BlockInfo],
    config: TokenFusionConfig,
    host: Host,
    *,
    train_steps: float | None,
    swapped: Collection[nn.Module] = (),
    one_sampling: bool = False,
) -> Patch:
    """Plans the patch that merges tokens in the blocks of a model. Changes nothing.

    Args:
        model: the UNet.
        blocks: all its transformer blocks, from `host.find_blocks`.
        config: how tokens are merged.
        host: gives the classes, the names of arguments and the size of the latent.
        train_steps: the timestep at which the schedule starts; None where timesteps do not count down to 0.
        swapped: layers that an earlier patch has swapped.
        one_sampling: whether the patch lives for the sampling of one batch only.

    Raises:
        ValueError: a step window where timesteps do not count down; or raised by the host.
        RuntimeError: raised by the host, for a layer that something else has wrapped.
    """
    if train_steps is None and (config.start, config.end) != (0, 1):
        raise ValueError(
            f"start is {config.start:g} and end is {config.end:g}: they measure progress by timestep, which this "
            "pipeline's scheduler does not count down to 0; leave them off or use another scheduler"
        )
    steps = StepTracker(config, train_steps or 1, one_sampling)
    states = block_states(blocks, config)
    matched = {"attn"} | ({"norm"} if config.match_on == "hidden" else set())
    swaps = tuple(
        (layer, type(layer), host.swap_class(block, name, swapped), state)
        for block, state in states
        for name, layer in block.layers.items()
        if name in matched or name in state.layers
    )
    latent = host.latent_size(model)
    hooks, after = _hooks(model, states, steps, host.ARGUMENTS, latent)
    _prepare_grids(model, states, steps, latent)
    return Patch(
        swaps, hooks, after, config=config, blocks=tuple(block for block, _ in states), arguments=host.ARGUMENTS
    )


Pair = tuple[BlockInfo, BlockState]


def _hooks(
    model: nn.Module,
    states: Sequence[Pair],
    steps: StepTracker,
    arguments: ArgumentNames,
    latent: tuple[int, int] | None,
) -> tuple[tuple[tuple[nn.Module, Hook], ...], tuple[tuple[nn.Module, _StepEndHook], ...]]:
    """Returns the hooks before and after modules, in the order in which they run."""
    config = steps.config
    shared_maps: tuple[SharedMap, ...] = tuple(
        dict.fromkeys(state.shared_map for _, state in states if state.shared_map is not None)
    )
    hooks: list[tuple[nn.Module, Hook]] = []
    after: list[tuple[nn.Module, _StepEndHook]] = []
    if config.share_across_cfg and config.ratio:
        hooks.append((model, _GuidanceHook(arguments)))
    if config.needs_timestep or shared_maps:
        step_hook = _StepHook(steps, shared_maps, [state for _, state in states if state.adaptive], arguments)
        hooks.append((model, step_hook))
        if steps.follows_steps:
            after.append((model, _StepEndHook(step_hook)))
    rules: dict[Any, MergeRule] = {}
    by_module = dict[nn.Module, dict[Any, list[BlockState]]]()
    for block, state in states:
        kind = (block.level, block.width, block.block_class, state.reductions)
        if kind not in rules:
            rules[kind] = _rule(block, state, states, latent)
        by_module.setdefault(block.spatial_module, {}).setdefault(kind, []).append(state)
    for module, kinds in by_module.items():
        groups = [(rules[kind], members) for kind, members in kinds.items()]
        hooks.append((module, _PartitionHook(steps, groups, arguments)))
    return tuple(hooks), tuple(after)


def _rule(block: BlockInfo, state: BlockState, states: Sequence[Pair], latent: tuple[int, int] | None) -> MergeRule:
    """Returns the rule of a block's level: on which maps tokens are merged."""
    users = state.config.match_interval
    if state.config.share_across_blocks:
        users *= sum(other.level == block.level for other, _ in states)
    native = None if latent is None else block.map_size(latent)
    return MergeRule(
        block.layers["attn"], block.width, state.config, state.reductions,
        users=users, native=native, probe=block.probe,
    )  # fmt: skip


def _prepare_grids(
    model: nn.Module, states: Sequence[Pair], steps: StepTracker, latent: tuple[int, int] | None
) -> None:
    """Makes the grids of the latent size that a compiled model is expected to run at."""
    if latent is not None:
        device = next(model.parameters()).device
        for size in sorted({block.map_size(latent) for block, _ in states}):
            steps.prepare_grid(*size, device)


def patch_of(model: nn.Module) -> Patch | None:
    """Returns the patch of a UNet, or None."""
    patch = vars(model).get(ATTRIBUTE)
    return patch if isinstance(patch, Patch) else None


def attach(model: nn.Module, patch: ModulePatch) -> None:
    """Attaches a planned patch to a model that has none. An error or interrupt leaves nothing of it."""
    handles: list[RemovableHandle] = []
    try:
        for layer, original, new_class, state in patch.swaps:
            if has_forward_of(layer, original):
                del layer.forward  # it would hide the new class's
            layer.__class__ = new_class
            setattr(layer, ATTRIBUTE, state)
        handles += (module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in patch.hooks)
        handles += (module.register_forward_hook(hook) for module, hook in patch.after)
        setattr(model, ATTRIBUTE, replace(patch, handles=tuple(handles)))
    except BaseException:
        _undo(patch, handles)
        raise


def detach(model: nn.Module) -> None:
    """Undoes `attach`: restores every class, attribute and hook."""
    patch: ModulePatch = getattr(model, ATTRIBUTE)
    _undo(patch, patch.handles)
    delattr(model, ATTRIBUTE)


def _undo(patch: ModulePatch, handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    for layer, original, _, _ in patch.swaps:
        vars(layer).pop(ATTRIBUTE, None)
        layer.__class__ = original


def states_of(patch: Patch) -> dict[str, BlockState]:
    """Returns the state of each patched block, by the block's name."""
    owners = {layer: block.name for block in patch.blocks for layer in block.layers.values()}
    return {owners[layer]: state for layer, _, _, state in patch.swaps}


def rules_of(patch: Patch) -> dict[str, MergeRule]:
    """Returns on which maps each patched block merges tokens, by the block's name."""
    names = {id(state): name for name, state in states_of(patch).items()}
    hooks = (hook for _, hook in patch.hooks if isinstance(hook, _PartitionHook))
    return {names[id(state)]: rule for hook in hooks for rule, blocks in hook.groups for state in blocks}
