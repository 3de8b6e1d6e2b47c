"""Class names and prompts of the textures model."""

from __future__ import annotations

from dataclasses import dataclass

THINGS = (
    "pebbles", "leaves", "rubble", "planks", "flowers", "rings",
    "buildings", "bubbles", "grass", "shards", "pages", "waves",
)  # fmt: skip
LOOKS = ("mossy", "rusty", "frosty", "golden", "charred", "painted")
PROMPT = "A high-quality photograph of {}"


@dataclass(frozen=True)
class TextureClass:
    """One of the 72 classes. Looks change fastest along `CLASSES`."""

    thing: str
    look: str

    @property
    def name(self) -> str:
        return f"{self.look} {self.thing}"

    @property
    def prompt(self) -> str:
        return PROMPT.format(self.name)

    @property
    def labels(self) -> tuple[int, int]:
        """(thing, look) as positions in THINGS, LOOKS."""
        return THINGS.index(self.thing), LOOKS.index(self.look)


CLASSES = tuple(TextureClass(thing, look) for thing in THINGS for look in LOOKS)
