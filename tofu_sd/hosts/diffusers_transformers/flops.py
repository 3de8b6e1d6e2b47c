"""FLOPs of a forward of the transformer blocks, counted from the sizes of their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...patching.host import BlockInfo
from .family import BlockKind

_FUSED = ("to_qkv", "to_kv", "to_added_qkv")  # copies of other layers
_TEXT = ("context", "add_", "_add", "added", "txt_")  # in the names of layers that run on the text alone
_SELF = ("attn", "attn2")
FORMS = {
    "all": frozenset({"queries", "keys"}),
    "all, projections too": frozenset({"queries", "keys", "query projections", "key projections"}),
    "keys and values": frozenset({"keys"}),
    "keys and values, projections too": frozenset({"keys", "key projections"}),
    "whole blocks": frozenset({"queries", "keys", "query projections", "key projections", "rest"}),
}
"""What runs on merged image tokens, in each form of merging."""


@dataclass(frozen=True)
class Tokens:
    """How many tokens there are.

    Args:
        image, text: of a sample.
        kept: image tokens after merging.
        merged: what runs on those, of the values of `FORMS`.
    """

    image: int
    text: int
    kept: int
    merged: frozenset[str] = frozenset()

    def of(self, part: str) -> int:
        """Returns on how many image tokens a part runs."""
        return self.kept if part in self.merged else self.image


def forward_flops(
    model: nn.Module,
    blocks: Sequence[tuple[BlockInfo, BlockKind]],
    latent: tuple[int, int],
    text_tokens: int,
    merged: frozenset[str] = frozenset(),
    ratio: float = 0.0,
) -> tuple[float, float]:
    """Returns (FLOPs of self-attention, FLOPs of all else) of one forward of the transformer blocks, for one sample.

    A product of [m, k] and [k, n] counts 2 m k n. Projections belong to the rest. Norms and embeddings are left out.

    Args:
        model: the transformer.
        blocks: all its blocks.
        latent: height and width of the latent.
        text_tokens: of a prompt.
        merged: what runs on merged tokens.
        ratio: share of the image tokens that are merged.
    """
    attention = rest = 0.0
    for info, kind in blocks:
        h, w = info.map_size(latent)
        tokens = Tokens(h * w, text_tokens, h * w - int(h * w * ratio), merged)
        block = model.get_submodule(info.name)
        attention += _attention(info.layers, kind, tokens)
        if "crossattn" in info.layers:
            layer: Any = info.layers["crossattn"]
            rest += 4 * tokens.of("rest") * text_tokens * layer.inner_dim
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(_FUSED):
                rest += 2 * module.in_features * _columns(name, module, kind, info.layers, tokens)
    return attention, rest


def attention_share(
    model: nn.Module, blocks: Sequence[tuple[BlockInfo, BlockKind]], latent: tuple[int, int], text_tokens: int
) -> float:
    """Returns FLOPs of self-attention / FLOPs of one forward. See `forward_flops`."""
    attention, rest = forward_flops(model, blocks, latent, text_tokens)
    return attention / (attention + rest)


def ceilings(
    model: nn.Module,
    blocks: Sequence[tuple[BlockInfo, BlockKind]],
    latent: tuple[int, int],
    text_tokens: int,
    ratio: float,
) -> dict[str, float]:
    """Returns the most that merging can speed up a forward, by FLOPs, for each form. See `forward_flops`."""
    baseline = sum(forward_flops(model, blocks, latent, text_tokens))
    found = {
        form: baseline / sum(forward_flops(model, blocks, latent, text_tokens, merged, ratio))
        for form, merged in FORMS.items()
    }
    attention, rest = forward_flops(model, blocks, latent, text_tokens)
    return {**found, "without attention": (attention + rest) / rest}


def _attention(layers: Mapping[str, Any], kind: BlockKind, tokens: Tokens) -> float:
    """Returns the FLOPs of a block's products of queries and keys, and of weights and values."""
    total = 0.0
    for name in _SELF:
        if name in layers:
            joint = kind.joined or getattr(layers[name], "add_k_proj", None) is not None
            text = tokens.text * joint
            total += 4 * (tokens.of("queries") + text) * (tokens.of("keys") + text) * layers[name].inner_dim
    return total


def _columns(name: str, module: nn.Linear, kind: BlockKind, layers: Mapping[str, Any], tokens: Tokens) -> float:
    """Returns tokens times outputs of a linear layer of a block."""
    if "norm" in name or "_mod" in name:
        return module.out_features  # a sample's modulation
    cross = kind.layers.get("crossattn", "-")
    of_text = any(part in name for part in _TEXT) or name in (f"{cross}.to_k", f"{cross}.to_v")
    if of_text and not kind.joined:
        return tokens.text * module.out_features
    text = tokens.text if kind.joined else 0
    if not any(name.startswith(f"{kind.layers[key]}.") for key in _SELF if key in layers):
        return (tokens.of("rest") + text) * module.out_features
    if name.endswith(("to_k", "to_v")):
        return (tokens.of("key projections") + text) * module.out_features
    keys = 2 * layers["attn"].inner_dim if name.endswith("to_qkv_mlp_proj") else 0
    of_keys = (tokens.of("key projections") + text) * keys
    return of_keys + (tokens.of("query projections") + text) * (module.out_features - keys)
