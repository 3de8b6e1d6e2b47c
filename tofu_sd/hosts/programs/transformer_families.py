"""The diffusion transformers of ComfyUI that token fusion supports: where their blocks and their image tokens are.

They are known by the name of their class. Nothing of ComfyUI is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from ...patching.host import BlockInfo
from ..ldm import MIDDLE, STAGES, Place

DOUBLE, SINGLE = "double_block", "single_block"  # the names in patches_replace["dit"]
UNETS = "UNets of SD 1.x, 2.x, SDXL and their relatives"


@dataclass(frozen=True)
class Blocks:
    """The blocks in one list of a model.

    Args:
        kind: their name in the options of patches.
        listed: the attribute of the model that lists them.
        attention: where the attention of the image is in a block; "" is the block itself.
        heads: where the number of heads is in a block.
    """

    kind: str
    listed: str
    attention: str
    heads: str


@dataclass(frozen=True)
class Family:
    """A family of diffusion transformers. In attention the text comes first, then the image, then reference images.

    Args:
        blocks: its blocks, in execution order.
        width: the attribute of the model with the channels of its tokens.
        text_tokens: how many text tokens a prompt usually has, to time attention.
        padding: the attribute of the model with a number of which its image tokens are padded to a multiple.
        shown_after: whether the program shows the tokens of a block only after it. They are those of the next block,
            and the first is never merged.
    """

    blocks: tuple[Blocks, ...]
    width: str
    text_tokens: int
    padding: str = ""
    shown_after: bool = False


_FLUX = Family(
    (Blocks(DOUBLE, "double_blocks", "img_attn", "num_heads"), Blocks(SINGLE, "single_blocks", "", "num_heads")),
    "hidden_size",
    512,
)
FAMILIES = {
    "OpenAISignatureMMDITWrapper": Family(
        (Blocks(DOUBLE, "joint_blocks", "x_block.attn", "x_block.attn.num_heads"),), "hidden_size", 333
    ),
    "Flux": _FLUX,
    "Chroma": _FLUX,
    "QwenImageTransformer2DModel": Family(
        (Blocks(DOUBLE, "transformer_blocks", "attn", "attn.heads"),), "inner_dim", 256
    ),
    "NextDiT": Family(
        (Blocks(DOUBLE, "layers", "attention", "attention.n_local_heads"),),
        "dim",
        256,
        padding="pad_tokens_multiple",
        shown_after=True,
    ),
}
"""Class of ComfyUI's model, and its description."""

SUPPORTED = (
    "SD3 and 3.5 (OpenAISignatureMMDITWrapper), Flux.1 and Flux.2 (Flux), Chroma, Qwen-Image "
    "(QwenImageTransformer2DModel), Lumina 2 and Z-Image (NextDiT)"
)
_NO_OPTIONS = "its attention does not call optimized_attention_override"
_NO_PATCHES = "it shows the tokens of its blocks to no patch"
_FRAMES = "its tokens lie in several frames"
REASONS = {
    "PixArtMS": _NO_OPTIONS,
    "HunYuanDiT": _NO_OPTIONS,
    "MMDiT": f"{_NO_PATCHES} (AuraFlow)",
    "ChromaRadiance": "it generates pixels, and its layout has not been tested",
    "WanModel": _FRAMES,
    "HunyuanVideo": _FRAMES,
    "LTXVModel": _FRAMES,
}


def family_of(model: nn.Module) -> Family | None:
    """Returns the family of a diffusion model of ComfyUI; None for a UNet.

    Raises:
        ValueError: another model. Names its class, the reason and what is supported.
    """
    name = type(model).__name__
    if name in FAMILIES:
        return FAMILIES[name]
    if any(isinstance(getattr(model, stage, None), nn.Module) for stage in STAGES):
        return None
    reason = REASONS.get(name, "where its image tokens lie is not known")
    raise ValueError(f"token fusion does not support {name}: {reason}; supported: {UNETS}, {SUPPORTED}")


def find_blocks(model: Any, family: Family) -> dict[Place, BlockInfo]:
    """Returns all blocks of a transformer by their places, in execution order.

    A place is ("double_block", 3, 0): the kind and the number, as in the options of patches, and 0.

    Raises:
        ValueError: there is none, or its blocks are not those of the family.
    """
    try:
        found = [
            (blocks, i, block) for blocks in family.blocks for i, block in enumerate(getattr(model, blocks.listed))
        ]
        patch, width = int(model.patch_size), int(getattr(model, family.width))
        padded_tokens(0, model, family)
        attentions = [attrgetter(blocks.attention)(block) if blocks.attention else block for blocks, _, block in found]
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{type(model).__name__} is not as in ComfyUI 0.8.0, which was tested: {error}") from error
    if not found:
        raise ValueError(f"{type(model).__name__} has no transformer block")
    infos = {}
    for depth, ((blocks, i, block), attention) in enumerate(zip(found, attentions, strict=True)):
        path = "first half" if depth < len(found) // 2 else "second half"
        level = MIDDLE if family.shown_after and depth == 0 else 0  # which no `levels` reaches
        infos[blocks.kind, i, 0] = BlockInfo(
            f"{blocks.listed}.{i}", depth, path, level, patch, width, model, {"attn": attention}, type(block)
        )
    return infos


def heads_of(model: Any, family: Family) -> int:
    """Returns the number of heads of a transformer's attention."""
    blocks = family.blocks[0]
    return int(attrgetter(blocks.heads)(getattr(model, blocks.listed)[0]))


def map_size(shape: tuple[int, ...], patch: int) -> tuple[int, int] | None:
    """Returns height and width in tokens of a latent [B, C, h, w] or [B, C, 1, h, w]; None for several frames."""
    if len(shape) == 5 and shape[2] != 1:
        return None
    return -(-shape[-2] // patch), -(-shape[-1] // patch)


def padded_tokens(tokens: int, model: Any, family: Family) -> int:
    """Returns how many tokens a model adds after its image tokens."""
    multiple = getattr(model, family.padding) if family.padding else None
    return -tokens % multiple if multiple else 0


def reference_tokens(call: Mapping[str, Any], patch: int) -> int:
    """Returns how many tokens the reference images of a call have."""
    count = 0
    for latent in call.get("ref_latents") or ():
        frames = latent.shape[2] if latent.ndim == 5 else 1
        count += frames * -(-latent.shape[-2] // patch) * -(-latent.shape[-1] // patch)
    return count
