"""PixArt-alpha and PixArt-Sigma. The image attends to itself alone, and to the text in cross-attention, as in UNets.

So its layers are merged as those of UNets are; only the map comes from the model's own latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention import BasicTransformerBlock

from ....patching.host import Argument, MapCall, run_alone
from ...diffusers_unet import SWAPS
from ..family import LATENT, TEXT, BlockKind, Family, arguments_of, map_of_latent

_MASK = Argument(5, ("attention_mask",))


def _read_map(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MapCall:
    if _MASK.get(args, kwargs) is not None:
        raise ValueError(
            "attention_mask hides image tokens of PixArt's self-attention by their position, which merging changes: "
            "leave it off, or call tofu_sd.remove_patch"
        )
    return map_of_latent(module, LATENT.get(args, kwargs))


FAMILY = Family(
    kinds=(
        BlockKind(
            blocks="transformer_blocks",
            block_class=BasicTransformerBlock,
            layers={"norm": "norm1", "attn": "attn1", "crossattn": "attn2", "mlp": "ff"},
            swaps=SWAPS,
            probe=run_alone,
        ),
    ),
    arguments=arguments_of(2, _read_map, keys=TEXT.names[0]),
    text_tokens=300,
    merges_states=True,
)
