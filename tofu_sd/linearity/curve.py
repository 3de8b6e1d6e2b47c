"""The linearity of every block of a model, as a table, a file or a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from ..patching.linearity import LAYERS, Linearity, best_split, by_depth
from ..utils import markdown_table

TITLES = {"attn": "attention", "mlp": "feed-forward"}
_RENAMED = {"role": "layer", "fused": "merged", "pictures": "images"}  # keys of older files


@dataclass(frozen=True)
class Curve:
    """A model's functional linearity, and how it was measured.

    Args:
        model: its name.
        versions: of the libraries.
        merged: depths of the blocks that are merged by default.
        measured: one measurement for each block, layer and call.
        prompts, steps, ratio, seed: of the images that a text-to-image model generated.
        images: number of images shown to a classifier; 0 for a text-to-image model.
    """

    model: str
    versions: str
    merged: list[int]
    measured: list[Linearity]
    prompts: list[str] = field(default_factory=list)
    steps: int = 0
    ratio: float = 0.0
    seed: int = 0
    images: int = 0

    @property
    def layers(self) -> list[str]:
        return [layer for layer in LAYERS if any(one.layer == layer for one in self.measured)]

    @property
    def deciding(self) -> str:
        """The layer that runs on merged tokens: attention; in a classifier the MLP after it."""
        return "mlp" if self.images else "attn"

    @property
    def depth_split(self) -> int:
        own = by_depth(self.measured, [self.deciding])
        return best_split({depth: own[depth] for depth in self.merged})

    @classmethod
    def read(cls, file: str) -> Curve:
        """Reads a file of `--out`. ValueError for any other file."""
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            content = {_RENAMED.get(name, name): value for name, value in content.items()}
            measured = [
                Linearity(**{_RENAMED.get(name, name): value for name, value in one.items()})
                for one in content["measured"]
            ]
            curve = cls(**{**content, "measured": measured})
            if curve.merged and set(curve.merged).issubset(by_depth(curve.measured, [curve.deciding])):
                return curve
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise ValueError(f"{Path(file).name} holds no measurements of this program")

    def __str__(self) -> str:
        """A table: for each block and layer the mean linearity, and the smallest and largest of all calls."""
        titles = ["block", "depth", *(TITLES[layer] for layer in self.layers)]
        return "\n".join([*markdown_table(titles, self._rows()), "", *self._notes()])

    def _rows(self) -> Iterator[list[str]]:
        marks = self._marks_merged
        for depth, name in sorted({(one.depth, one.block) for one in self.measured}):
            mark = " \\*" if marks and depth in self.merged else ""
            cells = [self._cell(depth, layer) for layer in self.layers]
            yield [name.replace(".transformer_blocks", ""), f"{depth}{mark}", *cells]

    @property
    def _marks_merged(self) -> bool:
        """Whether only some of the blocks are merged."""
        return len(self.merged) < len({one.depth for one in self.measured})

    def _cell(self, depth: int, layer: str) -> str:
        values = [one.value for one in self.measured if (one.depth, one.layer) == (depth, layer)]
        return f"{mean(values):.4f} ({min(values):.4f}–{max(values):.4f})" if values else "–"

    def _notes(self) -> list[str]:
        if self.images:
            source = f"{self.images} images, pairs of patch tokens that are merged first; means over the images"
            blocks = "layers"
        else:
            source = (
                f"{len(self.prompts)} images, {self.steps} steps, seed {self.seed}, pairs at ratio {self.ratio:g}; "
                "means over the steps"
            )
            blocks = "merged blocks"
        marked = " \\* merged by default." if self._marks_merged else ""
        average = "" if self.depth_split else ": average everywhere."
        return [
            f"{self.model}: {source}, smallest and largest in brackets; {self.versions}.{marked}",
            f"depth_split={self.depth_split}, by the {TITLES[self.deciding]} of the {blocks}{average}",
        ]


def plot(curve: Curve, file: str) -> None:
    """Plots the linearity over the depth (ToFu Fig. 3): a line for each layer, with the range over the calls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    for layer in curve.layers:
        line = by_depth(curve.measured, [layer])
        values = [[one.value for one in curve.measured if (one.depth, one.layer) == (d, layer)] for d in line]
        ax.plot(list(line), list(line.values()), marker="o", label=TITLES[layer])
        ax.fill_between(list(line), [min(v) for v in values], [max(v) for v in values], alpha=0.15)
    ax.set_xlabel("depth of the block")
    ax.set_ylabel("functional linearity")
    ax.legend(frameon=False)
    figure.savefig(file)
