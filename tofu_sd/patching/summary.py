"""Which blocks of a model are patched, and how many tokens each keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..config import TokenFusionConfig
from .block_info import BlockInfo
from .block_state import Counts, fusions


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
    fusion: TokenFusionConfig | None
    rows: tuple[Row, ...]

    @property
    def headline(self) -> str:
        if self.fusion is None:
            return f"{self.model}: not patched, {self.blocks} transformer blocks"
        fused = [row for row in self.rows if not row.alone]
        counts = sorted({(row.before, row.after) for row in fused}, reverse=True)
        tokens = ", ".join(f"{before} -> {after}" for before, after in counts)
        tokens += " at the least" * (self.fusion.threshold is not None)
        what = f", {'keys and values' if self.fusion.kv_only else 'tokens'} {tokens}" if fused else ""
        alone = sorted({(row.before, row.least) for row in self.rows if row.alone}, reverse=True)
        left = "".join(f", {before} left alone (fewer than {least})" for before, least in alone)
        h, w = self.latent
        return (
            f"{self.model}: {self.fusion.slug} on {len(fused)} of {self.blocks} transformer blocks"
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


def summarize(
    model: str,
    blocks: Sequence[BlockInfo],
    fusion: TokenFusionConfig | None,
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
        return Summary(model, latent, len(blocks), None, ())
    rows = []
    for block, state in fusions(blocks, fusion):
        h, w = block.map_size(latent)
        fewest = least.get(block.level, 0)
        leaving = fusion.num_merged(h, w) if h * w >= fewest else 0
        how = state.reduction.__name__, fewest, state.threshold
        done = (counts or {}).get(block.name, Counts())
        rows.append(Row(block.name, block.depth, (h, w), h * w, h * w - leaving, *how, done))
    return Summary(model, latent, len(blocks), fusion, tuple(rows))
