"""Site + policy + clock -> fused attention. Knows no host: a host says where the sites are and what to swap in.

A site's modules keep their weights, names and processors; only their class is swapped for a subclass of it that finds
its `SiteFusion` under the attribute `_tofu`. `detach` swaps it back and removes the attribute and the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import TokenFusion
from .block_info import ATTRIBUTE, Site
from .block_state import SiteFusion, fusions
from .hooks import Hook, _CheckGuidance, _LayOut, _Tick, _Tock
from .step_tracker import Clock


@dataclass(frozen=True)
class Patch:
    """Everything `attach` does to a model, said before it is done."""

    fusion: TokenFusion
    sites: tuple[Site, ...]  # the fused ones
    swaps: tuple[tuple[nn.Module, type[nn.Module], type[nn.Module], SiteFusion], ...]  # layer, its class, the new one
    hooks: tuple[tuple[nn.Module, Hook], ...]  # run before a module
    after: tuple[tuple[nn.Module, _Tock], ...] = ()  # run after it
    handles: tuple[RemovableHandle, ...] = ()  # of the hooks, once attached


def plan(
    model: nn.Module,
    sites: Sequence[Site],
    fusion: TokenFusion,
    swap: Callable[[Site, str], type[nn.Module]],
    train_steps: int | None,
    latent: tuple[int, int] | None = None,
    one_sampling: bool = False,
) -> Patch:
    """The patch that fuses the tokens of `sites` under `fusion`; touches nothing.

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
    clock = Clock(fusion, train_steps or 1, one_sampling)
    fused = fusions(sites, fusion)
    swaps, canvases = [], dict[nn.Module, list[SiteFusion]]()
    for site, state in fused:
        canvases.setdefault(site.canvas, []).append(state)
        swaps += [(part, type(part), swap(site, role), state) for role, part in site.parts.items() if role in roles]
    relays = tuple(dict.fromkeys(state.relay for _, state in fused if state.relay is not None))
    hooks: list[tuple[nn.Module, Hook]] = []
    if fusion.share_guidance and fusion.ratio:
        hooks.append((model, _CheckGuidance()))
    after: list[tuple[nn.Module, _Tock]] = []
    if fusion.timed or relays:
        tick = _Tick(clock, relays, [state for _, state in fused if state.adaptive])
        hooks.append((model, tick))
        if clock.follows_steps:
            after.append((model, _Tock(tick)))
    least = 0 if fusion.min_tokens == "auto" else int(fusion.min_tokens)
    levels = {site.canvas: site.level for site, _ in fused}
    hooks += [(canvas, _LayOut(clock, states, levels[canvas], least)) for canvas, states in canvases.items()]
    if latent is not None:
        device = next(model.parameters()).device
        for size in sorted({site.map_size(latent) for site, _ in fused}):
            clock.expect(*size, device)
    return Patch(fusion, tuple(site for site, _ in fused), tuple(swaps), tuple(hooks), tuple(after))


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


def states_of(patch: Patch) -> dict[str, SiteFusion]:
    """The state of each patched block, by its name."""
    owners = {part: site.name for site in patch.sites for part in site.parts.values()}
    return {owners[part]: state for part, _, _, state in patch.swaps}


def leave_alone(model: nn.Module, least: dict[int, int]) -> None:
    """From now on the patch of a model fuses maps of at least so many tokens, given for each level."""
    patch = patch_of(model)
    for _, hook in patch.hooks if patch else ():
        if isinstance(hook, _LayOut):
            hook.least = least[hook.level]


def least_tokens(patch: Patch) -> dict[int, int]:
    """Of how many tokens a map is fused from on under a patch, for each level."""
    return {hook.level: hook.least for _, hook in patch.hooks if isinstance(hook, _LayOut)}
