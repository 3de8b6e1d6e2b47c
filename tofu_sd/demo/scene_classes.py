"""Class names and prompts of the scenes model."""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = ("sphere", "cube", "torus", "cylinder", "cone", "arch")
MATERIALS = ("marble", "wooden", "golden", "brick")
SETTINGS = ("in a meadow", "in the desert", "in the snow", "on a beach at sunset")
PROMPT = "A high-quality photograph of a {}"


@dataclass(frozen=True)
class SceneClass:
    """One of the 96 classes. `index` counts settings fastest, shapes slowest."""

    shape: str
    material: str
    setting: str

    @property
    def name(self) -> str:
        return f"{self.material} {self.shape} {self.setting}"

    @property
    def prompt(self) -> str:
        return PROMPT.format(self.name)

    @property
    def labels(self) -> tuple[int, int, int]:
        """(shape, material, setting) as positions in SHAPES, MATERIALS, SETTINGS."""
        return SHAPES.index(self.shape), MATERIALS.index(self.material), SETTINGS.index(self.setting)


CLASSES = tuple(SceneClass(s, m, w) for s in SHAPES for m in MATERIALS for w in SETTINGS)
