"""Which blocks of a model are patched, and how many tokens each keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..config import TokenFusionConfig
from .autotune import MergeRule
from .block_state import Counts, block_states
from .host import BlockInfo


@dataclass(frozen=True)
class Row:
    """One patched block in a Summary.

    Args:
        name, depth: of the block.
        size: height and width of its map.
        before, after: tokens before and after merging; under a threshold `after` is the fewest.
        reduction: name of the reduction.
        min_tokens: maps of fewer tokens are skipped.
        pays: whether merging was measured to be faster; None where that is not known.
        threshold: cosine above which tokens merge; None merges a fixed number.
        counts: calls of the block so far.
    """

    name: str
    depth: int
    size: tuple[int, int]
    before: int
    after: int
    reduction: str
    min_tokens: int = 0
    pays: bool | None = None
    threshold: float | None = None
    counts: Counts = field(default_factory=Counts)

    @property
    def skipped(self) -> bool:
        return self.before < self.min_tokens or self.pays is False

    @property
    def why_skipped(self) -> str:
        return "slower with merging" if self.pays is False else f"fewer than {self.min_tokens}"

    @property
    def method(self) -> str:
        return self.reduction if self.threshold is None else f"{self.reduction}, above {self.threshold:g}"


@dataclass(frozen=True)
class Summary:
    """What a patch does to a model whose latent is `latent` (height, width). `print` it.

    `attention_modules` counts the self-attentions that run on merged tokens; `attention_share` is the share of a step's
    FLOPs that self-attention takes without a patch, None where it is not counted.
    """

    model: str
    latent: tuple[int, int]
    blocks: int
    config: TokenFusionConfig | None
    rows: tuple[Row, ...]
    attention_modules: int = 0
    attention_share: float | None = None

    @property
    def headline(self) -> str:
        """One line: model, method, number of blocks, tokens before and after."""
        if self.config is None:
            return f"{self.model}: not patched, {self.blocks} transformer blocks{self._attention}"
        merged = [row for row in self.rows if not row.skipped]
        arrow = " -> " if self.config.threshold is None else " -> at least "
        pairs = sorted({(row.before, row.after) for row in merged}, reverse=True)
        tokens = ", ".join(f"{before}{arrow}{after}" for before, after in pairs)
        what = f", {'keys and values' if self.config.kv_only else 'tokens'} {tokens}" if merged else ""
        small = sorted({(row.before, row.why_skipped) for row in self.rows if row.skipped}, reverse=True)
        skipped = "".join(f", {before} skipped ({why})" for before, why in small)
        h, w = self.latent
        return (
            f"{self.model}: {self.config.slug} on {len(merged)} of {self.blocks} transformer blocks"
            f"{what}{skipped} at a {h} x {w} latent{self._attention}"
        )

    @property
    def _attention(self) -> str:
        """The number of patched self-attentions and the share of a step that all take, where that is counted."""
        if self.attention_share is None:
            return ""
        merged = "" if self.config is None else f"{self.attention_modules} attention modules merged, "
        h, w = self.latent
        share = f"attention takes {100 * self.attention_share:.0f} % of the FLOPs of a step"
        return f"; {merged}{share}" + (f" at a {h} x {w} latent" if self.config is None else "")

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [
            f"  {row.depth:>3}  {row.name:<{width}}  {row.size[0]:>4} x {row.size[1]:<4} "
            f"{row.before:>6} -> {row.after:<6} {'skipped' if row.skipped else row.method}"
            for row in self.rows
        ]
        return "\n".join([self.headline, *lines, *self.observed])

    @property
    def observed(self) -> list[str]:
        """One line on the calls since the model was patched; none before the first call."""
        calls = max((row.counts.calls for row in self.rows), default=0)
        if not calls:
            return []
        merged, maps = (max(getattr(row.counts, name) for row in self.rows) for name in ("merged", "maps"))
        line = f"  so far: {calls} calls of a block, {merged} of them on merged tokens, {maps} maps made"
        return [line if merged else f"{line}: these options have merged nothing"]


def summarize(
    model: str,
    blocks: Sequence[BlockInfo],
    config: TokenFusionConfig | None,
    rules: Mapping[str, MergeRule],
    latent: tuple[int, int],
    counts: Mapping[str, Counts] | None = None,
    attention_share: float | None = None,
) -> Summary:
    """Returns the Summary of a model.

    Args:
        model: name of the model's class.
        blocks: all its transformer blocks.
        config: how tokens are merged; None for a model without a patch.
        rules: on which maps each patched block merges tokens, by its name.
        latent: height and width of the latent.
        counts: calls of each block so far, by its name.
        attention_share: share of a step's FLOPs that self-attention takes.

    Raises:
        ValueError: the latent has no area.
    """
    if len(latent) != 2 or min(latent) < 1:
        raise ValueError(f"latent is {latent}; it must be a height and a width of at least 1 (pixels / 8)")
    if config is None:
        return Summary(model, latent, len(blocks), None, (), 0, attention_share)
    rows, modules = [], 0
    for block, state in block_states(blocks, config):
        modules += config.merge_attn * sum(name in ("attn", "attn2") for name in block.layers)
        h, w = block.map_size(latent)
        rule = rules.get(block.name)
        fewest, pays = (rule.fewest, rule.pays(h, w)) if rule else (0, None)
        num_merged = config.num_merged(h, w) if h * w >= fewest and pays is not False else 0
        settings = state.reductions.label, fewest, pays, state.threshold
        done = (counts or {}).get(block.name, Counts())
        rows.append(Row(block.name, block.depth, (h, w), h * w, h * w - num_merged, *settings, done))
    return Summary(model, latent, len(blocks), config, tuple(rows), modules, attention_share)
