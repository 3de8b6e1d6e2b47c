"""Site + policy + clock -> fused attention. Knows no host: a host says where the sites are and what to swap in.

A site's modules keep their weights, names and processors; only their class is swapped for a subclass of it that finds
its `SiteFusion` under the attribute `_tofu`. `detach` swaps it back and removes the attribute and the hooks.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .clock import Clock, Forward, Layout
from .kernels.operators import is_compiling, refuse_export
from .match import alike, condense, most_similar
from .per_thread import PerThread
from .policy import TokenFusion
from .proportional import key_bias
from .reduce import Reduction, fuse, number_of, unmerge
from .step_tracker import ImagePart
from .tokens import SoftMap, TokenMap

ATTRIBUTE = "_tofu"


@dataclass(frozen=True)
class Site:
    """One transformer block of a host model.

    name: the block's name in the model. depth: its place among all transformer blocks in execution order. path: 'down',
    'mid' or 'up'. level: 0 at the highest resolution with attention, 1 at the next. downsample: the latent's side over
    the map's. width: channels of its tokens. canvas: the module that sees the map as [B, C, h, w] before the block
    runs. parts: the block's layers by role ('norm', 'attn', 'crossattn', 'mlp'). block: the block's class.
    """

    name: str
    depth: int
    path: str
    level: int
    downsample: int
    width: int
    canvas: nn.Module
    parts: dict[str, nn.Module]
    block: type[nn.Module]

    def map_size(self, latent: tuple[int, int]) -> tuple[int, int]:
        """Height and width of its map under a latent's: stride-2 convolutions round up."""
        h, w = latent
        return -(-h // self.downsample), -(-w // self.downsample)


@dataclass
class Slot:
    """A map that blocks share. made: whether a block has made it in this forward."""

    map: TokenMap | SoftMap | None = None
    made: bool = False


class Relay:
    """Hands the map of the first site that matches to all sites after it, and to later steps of an image part.

    key: by which an image part keeps it.
    """

    def __init__(self, key: Hashable = None) -> None:
        self.key = key
        self.slots = PerThread(Slot)

    def begin(self, now: Forward) -> None:
        """Takes the map of the image part's last call, if it still holds."""
        known = None if now.anew or now.part is None else now.part.maps.get(self.key)
        for slot in self.slots.both():
            slot.map, slot.made = known, False

    def end(self, part: ImagePart) -> None:
        """Leaves a map that was made in this forward to the image part."""
        for slot in self.slots.both():
            if slot.made:
                part.maps[self.key] = slot.map
            slot.map, slot.made = None, False


@dataclass
class Passing:
    """What one forward leaves in a block for its layers.

    as_length: [number of the reduction], from which compiled code reads it. best: [B, S], cosines of the call. alike:
    how many exceeded the threshold in the step before.
    """

    layout: Layout | None = None
    map: TokenMap | SoftMap | None = None
    as_length: Tensor | None = None
    best: Tensor | None = None
    alike: float = 0.0


@dataclass
class Counts:
    """What a block has done since it was patched, outside of compiled code. merged: calls that ran on fewer tokens."""

    calls: int = 0
    maps: int = 0
    merged: int = 0


class SiteFusion:
    """What the swapped-in modules of one site share: fixed choices, and what each forward leaves for its layers."""

    def __init__(
        self, fusion: TokenFusion, reduction: Reduction, relay: Relay | None = None, threshold: float | None = None
    ):
        self.reduction = reduction
        self.number = number_of(reduction)
        self.relay = relay
        self.proportional = fusion.proportional
        self.keys_only = fusion.keys_only
        self.normed = fusion.match_on == "normed"
        self.share_guidance = fusion.share_guidance
        self.roles = fusion.layers
        self.temperature = fusion.temperature
        self.threshold = threshold
        self.adaptive = threshold is not None  # what a block asks: it shall not depend on the number
        self.counts = Counts()
        self.watchers: list[Callable[[TokenMap], None]] = []  # are shown every map, but by compiled code
        self._passing = PerThread(Passing)

    @property
    def passing(self) -> Passing:
        """What this thread's forward has left here."""
        return self._passing.get()

    def begin(self, layout: Layout | None, as_length: Tensor | None) -> None:
        """Takes the layout of a forward that comes to this block."""
        for passing in self._passing.both():
            passing.layout, passing.map, passing.as_length = layout, None, as_length
        if not is_compiling():
            self.counts.calls += 1

    def observe(self, x: Tensor) -> None:
        """Finds the map of the tokens x [B, N, C] of the block, where the layout fits them."""
        passing = self.passing
        passing.map = None
        layout = passing.layout
        if layout is None or x.shape[1] != len(layout.parts.src) + len(layout.parts.dst):
            return
        slot = None if self.relay is None else self.relay.slots.get()
        if slot is not None and slot.map is not None and slot.map.before == x.shape[:2]:
            passing.map = slot.map
        else:
            passing.map = self._match(x, layout)
            if not is_compiling():
                self.counts.maps += passing.map is not None
            if slot is not None:
                slot.map, slot.made = passing.map, True
        if self.watchers and passing.map is not None and not is_compiling():
            for watcher in list(self.watchers):
                watcher(passing.map.hard())

    def _match(self, x: Tensor, layout: Layout) -> TokenMap | SoftMap | None:
        if not self.share_guidance:
            return self._map(x, layout)
        half = self._map(x[x.shape[0] // 2 :], layout)
        return None if half is None else half.twice()

    def _map(self, x: Tensor, layout: Layout) -> TokenMap | SoftMap | None:
        """The map of the tokens x [B, N, C]; None where a threshold lets none leave."""
        parts, leaving, windows = layout
        if self.temperature is not None:
            assert windows is not None  # TokenFusion sees to it
            return condense(x, windows, self.temperature)
        pairs = most_similar(x, parts, windows)
        if self.adaptive:
            self.passing.best = pairs.best
        return pairs.fused(len(leaving)) if len(leaving) else None

    def take(self, role: str, x: Tensor) -> TokenMap | SoftMap | None:
        """The map to fuse x with in the layer `role`, if any. The last layer to take it lets go of it."""
        passing = self.passing
        map = passing.map
        if role == self.roles[-1]:
            passing.map = None
        if role not in self.roles or map is None or map.before != x.shape[:2]:
            return None
        if not is_compiling():
            self.counts.merged += role == self.roles[0]
        return map

    def reduce(self, x: Tensor, map: TokenMap | SoftMap) -> Tensor:
        """The site's reduction of x [B, N, C]: [B, K, C]."""
        gradient = x.requires_grad and torch.is_grad_enabled()
        if isinstance(map, TokenMap) and is_compiling() and not gradient:
            as_length = self.passing.as_length
            if as_length is not None:
                return fuse(x, map.kept, map.home, len(as_length))
        return self.reduction(x, map)

    def key_bias(self, x: Tensor, map: TokenMap | SoftMap, sdpa: bool) -> Tensor | None:
        """log(n_i) for each key as an additive mask [B, 1, K], or None where attention is not weighted."""
        return key_bias(map.size, x.dtype, sdpa) if self.proportional else None

    def around(self, role: str, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A token-wise layer run on fused tokens: unmerge(layer(reduce(x)))."""
        map = self.take(role, x)
        return layer(x) if map is None else unmerge(layer(self.reduce(x, map)), map)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "counts": Counts(), "watchers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.number = number_of(self.reduction)  # in this process


def recall_counts(sites: Sequence[SiteFusion], part: ImagePart | None, first: bool) -> None:
    """Hands each site the count of tokens above its threshold in the step before; none is known at a `first` step.

    A block that did not run in that step (a cache passed it over) keeps its count. All counts are read at once, so that
    a device is waited for once a step.
    """
    counts: dict[int, float] = {}
    if part is not None and not first:
        waiting = [(i, part.best[i], sites[i].threshold or 0) for i in sorted(part.best)]
        if waiting:
            device = waiting[0][1].device
            found = torch.stack([alike(best, threshold).to(device) for _, best, threshold in waiting]).tolist()
            part.counts.update(zip((i for i, *_ in waiting), found, strict=True))
            part.best.clear()
        counts = part.counts
    for i, site in enumerate(sites):
        for passing in site._passing.both():
            passing.best, passing.alike = None, counts.get(i, 0.0)


def keep_best(sites: Sequence[SiteFusion], part: ImagePart) -> None:
    """Leaves the cosines of this forward to the image part, for the count of its next step."""
    for i, site in enumerate(sites):
        for passing in site._passing.both():
            if passing.best is not None:
                part.best[i] = passing.best
            passing.best = None


def get_argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, *names: str) -> Any:
    """An argument of a host's module, by any of the names that hosts have for it, or by its place; None if neither."""
    named = next((kwargs[name] for name in names if name in kwargs), None)
    return args[place] if named is None and len(args) > place else named


class _Tick:
    """Forward pre-hook of the model: notes the step, and recalls what earlier steps of the image part left."""

    def __init__(self, clock: Clock, relays: Sequence[Relay], adaptive: Sequence[SiteFusion]):
        self.clock = clock
        self.relays = relays
        self.adaptive = adaptive  # the sites that have a threshold

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = self.clock.now
        timestep = get_argument(args, kwargs, 1, "timestep", "timesteps")
        if timestep is not None:  # else the model itself says what it lacks
            content = get_argument(args, kwargs, 0, "sample", "x")
            self.clock.tick(timestep, content, get_argument(args, kwargs, 2, "encoder_hidden_states", "context"))
        for relay in self.relays:
            relay.begin(now)
        if self.adaptive:
            recall_counts(self.adaptive, now.part, now.first)


class _Tock:
    """Forward hook of the model: leaves what this step found to the later steps of the image part."""

    def __init__(self, tick: _Tick):
        self.tick = tick

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        part = self.tick.clock.now.part
        if part is None:
            return
        for relay in self.tick.relays:
            relay.end(part)
        keep_best(self.tick.adaptive, part)


class _CheckGuidance:
    """Forward pre-hook of the model under `share_guidance`: the two halves of the batch must be the same latents.

    Pipelines with guidance repeat the latents for the negative and the positive prompt; without guidance the halves are
    different images. A batch is looked at once for each conditioning tensor, as it makes the device wait.
    """

    def __init__(self) -> None:
        self._checked = PerThread(list[Any])  # [weak reference to the conditioning, shape] of the last batch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = get_argument(args, kwargs, 0, "sample", "x")
        shown = get_argument(args, kwargs, 2, "encoder_hidden_states", "context")
        if not isinstance(x, Tensor):
            return  # the model itself says what it lacks
        if len(x) % 2:
            raise ValueError(
                f"share_guidance needs two equal halves of the batch, which has {len(x)} samples: {_GUIDANCE}"
            )
        first, second = x.chunk(2)
        if is_compiling():
            torch._assert_async((first == second).all(), f"share_guidance: {_GUIDANCE}")
            return
        checked = self._checked.get()
        if checked and checked[0]() is shown and checked[1] == x.shape:
            return
        if not torch.equal(first, second):
            raise ValueError(
                f"share_guidance needs two equal halves of the batch, and these {len(x)} differ: {_GUIDANCE}"
            )
        if shown is not None:
            checked[:] = [weakref.ref(shown), x.shape]


_GUIDANCE = "the pipeline must run the negative and the positive prompt in one batch (guidance above 1); leave it off"


class OneAtATime:
    """Lets one thread at a time run a module whose blocks are compiled, as these cannot ask for their thread.

    Held from the module's pre-hook until its forward ends. A thread that comes again after its forward was interrupted
    still holds it.
    """

    WAIT = 600.0  # seconds for another thread's forward of one module

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._end: RemovableHandle | None = None

    def hold(self, module: nn.Module) -> None:
        """Waits for another thread's forward of the module, and releases itself after this thread's."""
        if self._owner != threading.get_ident():
            if not self._lock.acquire(timeout=self.WAIT):
                raise RuntimeError("compiled blocks run one call at a time, and another thread's call has not ended")
            self._owner = threading.get_ident()
        if self._end is None:
            self._end = module.register_forward_hook(self._release, always_call=True)

    def _release(self, *_: Any) -> None:
        if self._owner == threading.get_ident() and self._end is not None:
            self._end.remove()
            self._owner = self._end = None
            self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def has_compiled(module: nn.Module) -> bool:
    """Whether a module in this one is compiled by itself."""
    return any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in module.modules())


class _LayOut:
    """Forward pre-hook of what sees the 4-D map: hands its sites this step's sources and destinations."""

    def __init__(self, clock: Clock, sites: list[SiteFusion], level: int, least: int):
        self.clock = clock
        self.sites = sites
        self.level = level
        self.least = least  # tokens, under which the map is left alone
        self.one_at_a_time = OneAtATime()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_compiling() and threading.active_count() > 1 and has_compiled(module):
            self.one_at_a_time.hold(module)
        x = get_argument(args, kwargs, 0, "hidden_states", "x")
        h, w = x.shape[-2:]
        layout = self.clock.layout(h, w, x.device) if h * w >= self.least else None
        if layout is not None:
            refuse_export()
        for site in self.sites:
            mine = layout
            if layout is not None and site.adaptive:
                mine = self.clock.thinned(layout, site.passing.alike)
            site.begin(mine, self.clock.length(site.number, x.device))


Hook = _Tick | _LayOut | _CheckGuidance


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


def fusions(sites: Sequence[Site], fusion: TokenFusion) -> list[tuple[Site, SiteFusion]]:
    """Those of a model's sites that are fused under `fusion`, each with what it does."""
    down_path = sum(site.path == "down" for site in sites)
    relays = dict[Any, Relay]()

    def relay(site: Site) -> Relay | None:
        if not fusion.share_level and fusion.match_every == 1:
            return None
        key = site.level if fusion.share_level else site.name
        return relays.setdefault(key, Relay(key))

    def state(site: Site) -> SiteFusion:
        reduction = fusion.reduction(site.depth, down_path)
        return SiteFusion(fusion, reduction, relay(site), fusion.threshold_at(site.depth))

    return [(site, state(site)) for site in sites if site.level < fusion.levels]


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


@dataclass(frozen=True)
class Sighting:
    """A map as a block made it. call: of the model, from 0. h, w: of the tokens; the map's tensors are on the CPU."""

    block: str
    call: int
    h: int
    w: int
    map: TokenMap


@contextmanager
def watching(model: nn.Module, patch: Patch) -> Iterator[list[Sighting]]:
    """Inside, every map that the patch of a model makes is added to what this gives."""
    seen: list[Sighting] = []
    numbers = itertools.count()
    here = threading.local()  # of a thread: the number of its call, and the sizes of the maps in it

    def begin(*_: Any) -> None:
        here.call, here.sizes = next(numbers), {}

    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here.sizes[module] = tuple(get_argument(args, kwargs, 0, "hidden_states", "x").shape[-2:])

    def watch(site: Site, map: TokenMap) -> None:
        h, w = here.sizes[site.canvas]
        seen.append(Sighting(site.name, here.call, h, w, TokenMap(map.kept.cpu(), map.home.cpu())))

    states = states_of(patch)
    handles = [model.register_forward_pre_hook(begin)]
    handles += [c.register_forward_pre_hook(measure, with_kwargs=True) for c in {site.canvas for site in patch.sites}]
    watchers = {site.name: partial(watch, site) for site in patch.sites}
    for name, watcher in watchers.items():
        states[name].watchers.append(watcher)
    try:
        yield seen
    finally:  # its own and no other's: contexts may end in any order
        for name, watcher in watchers.items():
            states[name].watchers.remove(watcher)
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Row:
    """One patched block in a Summary. least: fewer tokens than that are left alone.

    after: what is left of `before` tokens, under a threshold at the least. counts: what the block has done so far.
    """

    name: str
    depth: int
    size: tuple[int, int]
    before: int
    after: int
    reduction: str
    least: int = 0
    threshold: float | None = None
    counts: Counts = field(default_factory=Counts)

    @property
    def alone(self) -> bool:
        return self.before < self.least

    @property
    def how(self) -> str:
        return self.reduction if self.threshold is None else f"{self.reduction}, what is above {self.threshold:g}"


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
        fused = [row for row in self.rows if not row.alone]
        counts = sorted({(row.before, row.after) for row in fused}, reverse=True)
        tokens = ", ".join(f"{before} -> {after}" for before, after in counts)
        tokens += " at the least" * (self.fusion.threshold is not None)
        what = f", {'keys and values' if self.fusion.keys_only else 'tokens'} {tokens}" if fused else ""
        alone = sorted({(row.before, row.least) for row in self.rows if row.alone}, reverse=True)
        left = "".join(f", {before} left alone (fewer than {least})" for before, least in alone)
        h, w = self.latent
        return (
            f"{self.model}: {self.fusion.key} on {len(fused)} of {self.blocks} transformer blocks"
            f"{what}{left} at a {h} x {w} latent"
        )

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [
            f"  {row.depth:>3}  {row.name:<{width}}  {row.size[0]:>4} x {row.size[1]:<4} "
            f"{row.before:>6} -> {row.after:<6} {'left alone' if row.alone else row.how}"
            for row in self.rows
        ]
        return "\n".join([self.headline, *lines, *self.observed])

    @property
    def observed(self) -> list[str]:
        """What has happened since the model was patched, in a line; nothing before the first call."""
        calls = max((row.counts.calls for row in self.rows), default=0)
        if not calls:
            return []
        merged, maps = (max(getattr(row.counts, name) for row in self.rows) for name in ("merged", "maps"))
        line = f"  so far: {calls} calls of a block, {merged} of them on merged tokens, {maps} maps made"
        return [line if merged else f"{line}: these options have merged nothing"]


def least_tokens(patch: Patch) -> dict[int, int]:
    """Of how many tokens a map is fused from on under a patch, for each level."""
    return {hook.level: hook.least for _, hook in patch.hooks if isinstance(hook, _LayOut)}


def summarize(
    model: str,
    sites: Sequence[Site],
    fusion: TokenFusion | None,
    least: dict[int, int],
    latent: tuple[int, int],
    counts: Mapping[str, Counts] | None = None,
) -> Summary:
    """The Summary of a model with these sites under `fusion` at a latent of this height and width.

    least: for each level, fewer tokens than that are left alone. counts: what each block has done, by its name.
    ValueError for a latent without area.
    """
    if len(latent) != 2 or min(latent) < 1:
        raise ValueError(f"latent is {latent}; it must be a height and a width of at least 1 (pixels / 8)")
    if fusion is None:
        return Summary(model, latent, len(sites), None, ())
    rows = []
    for site, state in fusions(sites, fusion):
        h, w = site.map_size(latent)
        fewest = least.get(site.level, 0)
        leaving = fusion.leaving(h, w) if h * w >= fewest else 0
        how = state.reduction.__name__, fewest, state.threshold
        done = (counts or {}).get(site.name, Counts())
        rows.append(Row(site.name, site.depth, (h, w), h * w, h * w - leaving, *how, done))
    return Summary(model, latent, len(sites), fusion, tuple(rows))
