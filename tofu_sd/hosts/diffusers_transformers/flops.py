"""Which share of a step self-attention takes, counted from the sizes of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...patching.host import BlockInfo
from .family import BlockKind

_FUSED = ("to_qkv", "to_kv", "to_added_qkv")  # copies of other layers
_TEXT = ("context", "add_", "_add", "added", "txt_")  # in the names of layers that run on the text alone


def attention_share(
    model: nn.Module, blocks: Sequence[tuple[BlockInfo, BlockKind]], latent: tuple[int, int], text_tokens: int
) -> float:
    """Returns FLOPs of self-attention / FLOPs of one forward of the transformer blocks, for one sample.

    A product of [m, k] and [k, n] counts 2 m k n. Projections belong to the rest. Norms and embeddings are left out.

    Args:
        model: the transformer.
        blocks: all its blocks.
        latent: height and width of the latent.
        text_tokens: of a prompt.
    """
    attention = rest = 0.0
    for info, kind in blocks:
        h, w = info.map_size(latent)
        image = h * w
        block = model.get_submodule(info.name)
        layers: dict[str, Any] = info.layers
        for name, layer in layers.items():
            if name in ("attn", "attn2"):
                joint = kind.joined or getattr(layer, "add_k_proj", None) is not None
                tokens = image + text_tokens * joint
                attention += 4 * tokens**2 * layer.inner_dim
            if name == "crossattn":
                rest += 4 * image * text_tokens * layer.inner_dim
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(_FUSED):
                rest += 2 * module.in_features * module.out_features * _tokens(name, kind, image, text_tokens)
    return attention / (attention + rest)


def _tokens(name: str, kind: BlockKind, image: int, text: int) -> int:
    """Returns on how many tokens a linear layer of a block runs."""
    if "norm" in name or "_mod" in name:
        return 1  # a sample's modulation
    if kind.joined:
        return image + text
    cross = kind.layers.get("crossattn", "-")
    of_text = any(part in name for part in _TEXT) or name in (f"{cross}.to_k", f"{cross}.to_v")
    return text if of_text else image
