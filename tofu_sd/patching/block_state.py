"""What one patched block does with its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import TokenFusion
from ..core.matching import alike, condense, most_similar
from ..core.proportional import key_bias
from ..core.reductions import Reduction, fuse, number_of, unmerge
from ..core.token_map import SoftMap, TokenMap
from ..kernels.operators import is_compiling
from .block_info import Site
from .image_parts import ImagePart
from .per_thread import PerThread
from .shared_map import Relay
from .step_tracker import Layout


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
