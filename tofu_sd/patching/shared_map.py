"""A map that several blocks or several steps use."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from ..core.token_map import SoftMap, TokenMap
from .image_parts import ImagePart
from .step_tracker import StepState
from .threads import PerThread


@dataclass
class MapSlot:
    """A shared map, and whether a block has made it in this forward."""

    map: TokenMap | SoftMap | None = None
    made: bool = False


class SharedMap:
    """Gives the map of the first block that matches to all later blocks, and to later steps of the same image part.

    Args:
        key: the key under which an image part stores the map.
    """

    def __init__(self, key: Hashable = None) -> None:
        self.key = key
        self.slots = PerThread(MapSlot)

    def load(self, now: StepState) -> None:
        """Starts a forward with the map of the image part's last call, if it is still valid."""
        stored = None if now.should_match or now.part is None else now.part.maps.get(self.key)
        for slot in self.slots.both():
            slot.map, slot.made = stored, False

    def store(self, part: ImagePart) -> None:
        """Ends a forward: a map that was made in it is stored in the image part."""
        for slot in self.slots.both():
            if slot.made:
                part.maps[self.key] = slot.map
            slot.map, slot.made = None, False
