"""A map that several blocks or several steps use."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from ..core.token_map import SoftMap, TokenMap
from .image_parts import ImagePart
from .per_thread import PerThread
from .step_tracker import StepState


@dataclass
class MapSlot:
    """A map that blocks share. made: whether a block has made it in this forward."""

    map: TokenMap | SoftMap | None = None
    made: bool = False


class SharedMap:
    """Hands the map of the first site that matches to all sites after it, and to later steps of an image part.

    key: by which an image part keeps it.
    """

    def __init__(self, key: Hashable = None) -> None:
        self.key = key
        self.slots = PerThread(MapSlot)

    def begin(self, now: StepState) -> None:
        """Takes the map of the image part's last call, if it still holds."""
        known = None if now.should_match or now.part is None else now.part.maps.get(self.key)
        for slot in self.slots.both():
            slot.map, slot.made = known, False

    def end(self, part: ImagePart) -> None:
        """Leaves a map that was made in this forward to the image part."""
        for slot in self.slots.both():
            if slot.made:
                part.maps[self.key] = slot.map
            slot.map, slot.made = None, False
