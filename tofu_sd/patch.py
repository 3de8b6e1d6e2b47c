"""Site + policy + clock -> fused attention. Knows no host: a host says where the sites are and what to swap in.

A site's modules keep their weights, names and processors; only their class is swapped for a subclass of it that finds
its `SiteFusion` under the attribute `_tofu`. `detach` swaps it back and removes the attribute and the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .clock import Clock
from .match import Partition, bipartite_soft_matching
from .policy import TokenFusion
from .reduce import Reduction, unmerge
from .tokens import TokenMap

ATTRIBUTE = "_tofu"


@dataclass(frozen=True)
class Site:
    """One transformer block of a host model.

    name: the block's name in the model. depth: its place among all transformer blocks in execution order. path: 'down',
    'mid' or 'up'. level: 0 at the highest resolution with attention, 1 at the next. downsample: the latent's side over
    the map's. canvas: the module that sees the map as [B, C, h, w] before the block runs. parts: the block's layers
    by role ('norm', 'attn', 'crossattn', 'mlp'). block: the block's class.
    """

    name: str
    depth: int
    path: str
    level: int
    downsample: int
    canvas: nn.Module
    parts: dict[str, nn.Module]
    block: type[nn.Module]


class SiteFusion:
    """What the swapped-in layers of one site share during a forward: tensors and fixed choices, so that it compiles."""

    def __init__(self, fusion: TokenFusion, reduction: Reduction):
        self.reduction = reduction
        self.proportional = fusion.proportional
        self.keys_only = fusion.keys_only
        self.normed = fusion.match_on == "normed"
        self.roles = tuple(
            role
            for role, on in (
                ("attn", fusion.merge_attn),
                ("crossattn", fusion.merge_crossattn),
                ("mlp", fusion.merge_mlp),
            )
            if on
        )
        self.parts: Partition | None = None
        self.r = 0
        self.map: TokenMap | None = None

    def observe(self, x: Tensor) -> None:
        """Matches the tokens x [B, N, C] of the block, where the layout fits them."""
        self.map = None
        if self.parts is not None and self.r > 0 and x.shape[1] == len(self.parts.src) + len(self.parts.dst):
            self.map = bipartite_soft_matching(x, self.parts, self.r)

    def take(self, role: str, x: Tensor) -> TokenMap | None:
        """The map to fuse x with in the layer `role`, if any. The last layer to take it lets go of it."""
        map = self.map
        if role == self.roles[-1]:
            self.map = None
        if role not in self.roles or map is None or map.home.shape[1] != x.shape[1]:
            return None
        return map

    def key_bias(self, x: Tensor, map: TokenMap) -> Tensor | None:
        """log(n_i) for each key as the processors' additive mask [B, 1, K], or None where attention is not weighted."""
        return map.size.log().to(x.dtype).unsqueeze(1) if self.proportional else None

    def around(self, role: str, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A token-wise layer run on fused tokens: unmerge(layer(reduce(x)))."""
        map = self.take(role, x)
        return layer(x) if map is None else unmerge(layer(self.reduction(x, map)), map)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "parts": None, "map": None}


class _Tick:
    """Forward pre-hook of the model: tells the clock the timestep."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.clock.tick(kwargs["timestep"] if "timestep" in kwargs else args[1])


class _LayOut:
    """Forward pre-hook of what sees the 4-D map: hands its sites this step's sources and destinations."""

    def __init__(self, clock: Clock, sites: list[SiteFusion]):
        self.clock = clock
        self.sites = sites

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        h, w = x.shape[-2:]
        parts, r = self.clock.layout(h, w, x.device), self.clock.fusion.leaving(h, w)
        for site in self.sites:
            site.parts, site.r = parts, r


@dataclass(frozen=True)
class Patch:
    """What `attach` did to a model: enough to undo it and to tell of it."""

    fusion: TokenFusion
    sites: tuple[Site, ...]  # the fused ones
    down_path: int  # transformer blocks on the down path
    train_steps: int
    handles: tuple[RemovableHandle, ...]
    original: tuple[tuple[nn.Module, type[nn.Module]], ...]


def attach(
    model: nn.Module,
    sites: Sequence[Site],
    fusion: TokenFusion,
    swap: Callable[[Site, str], type[nn.Module]],
    train_steps: int,
) -> Patch:
    """Fuses the tokens of `sites` under `fusion`.

    swap(site, role) gives the class to swap in or raises; it is asked for every layer before any is touched, so
    that a refusal leaves the model as it was.
    """
    chosen = tuple(site for site in sites if site.level < fusion.levels)
    down_path = sum(site.path == "down" for site in sites)
    roles = {"attn"}
    roles |= {"norm"} if fusion.match_on == "hidden" else set()
    roles |= {role for role, on in (("crossattn", fusion.merge_crossattn), ("mlp", fusion.merge_mlp)) if on}
    plan = [(site, [(part, swap(site, role)) for role, part in site.parts.items() if role in roles]) for site in chosen]
    clock = Clock(fusion, train_steps)
    handles = [model.register_forward_pre_hook(_Tick(clock), with_kwargs=True)]
    original, canvases = [], dict[nn.Module, list[SiteFusion]]()
    for site, swaps in plan:
        state = SiteFusion(fusion, fusion.reduction(site.depth, down_path))
        canvases.setdefault(site.canvas, []).append(state)
        for part, cls in swaps:
            original.append((part, type(part)))
            part.__class__ = cls
            setattr(part, ATTRIBUTE, state)
    for canvas, states in canvases.items():
        handles.append(canvas.register_forward_pre_hook(_LayOut(clock, states), with_kwargs=True))
    patch = Patch(fusion, chosen, down_path, train_steps, tuple(handles), tuple(original))
    setattr(model, ATTRIBUTE, patch)
    return patch


def detach(model: nn.Module) -> None:
    """Undoes `attach`: detach(attach(model)) leaves every class, attribute and hook as it was."""
    patch: Patch = getattr(model, ATTRIBUTE)
    for handle in patch.handles:
        handle.remove()
    for part, cls in patch.original:
        delattr(part, ATTRIBUTE)
        part.__class__ = cls
    delattr(model, ATTRIBUTE)


@dataclass(frozen=True)
class Row:
    """One fused block in a Summary."""

    name: str
    depth: int
    size: tuple[int, int]
    before: int
    after: int
    reduction: str


@dataclass(frozen=True)
class Summary:
    """What a patch does to a model whose latent is `latent` tokens high and wide. `print` it."""

    model: str
    latent: tuple[int, int]
    blocks: int
    fusion: TokenFusion | None
    rows: tuple[Row, ...]

    @property
    def headline(self) -> str:
        if self.fusion is None:
            return f"{self.model}: not patched, {self.blocks} transformer blocks"
        counts = sorted({(row.before, row.after) for row in self.rows}, reverse=True)
        tokens = ", ".join(f"{before} -> {after}" for before, after in counts)
        what = "keys and values" if self.fusion.keys_only else "tokens"
        h, w = self.latent
        return (
            f"{self.model}: {self.fusion.key} on {len(self.rows)} of {self.blocks} transformer blocks, "
            f"{what} {tokens} at a {h} x {w} latent"
        )

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [
            f"  {row.depth:>3}  {row.name:<{width}}  {row.size[0]:>4} x {row.size[1]:<4} "
            f"{row.before:>6} -> {row.after:<6} {row.reduction}"
            for row in self.rows
        ]
        return "\n".join([self.headline, *lines])


def summarize(model: str, sites: Sequence[Site], patch: Patch | None, latent: tuple[int, int]) -> Summary:
    """The Summary of a model with these sites under `patch` at a latent of this height and width."""
    rows = []
    if patch is not None:
        for site in patch.sites:
            h, w = (-(-side // site.downsample) for side in latent)  # stride-2 convolutions round up
            rows.append(Row(site.name, site.depth, (h, w), h * w, h * w - patch.fusion.leaving(h, w),
                            patch.fusion.reduction(site.depth, patch.down_path).__name__))  # fmt: skip
    return Summary(model, latent, len(sites), patch.fusion if patch else None, tuple(rows))
