"""Z-Image. See `rotary`. Its layers get one sequence: the image, padding, then the text.

A pipeline gives lists with one latent and one text for each sample. Texts may differ in length: a mask then hides the
end of the shorter sequences, and no image token. The refiners before the layers, which see the image or the text alone,
run on all tokens: they are 2 + 2 blocks beside 30, and a ControlNet shares them, at sizes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor, nn

from ....patching.host import ATTRIBUTE, Argument, ArgumentNames, MapCall
from ..family import BlockKind
from ..rotary import rotary_family, run_rotary
from ..sequence import ImageInput

PROCESSORS = ("ZSingleStreamAttnProcessor",)
TEXT_TOKENS = 128


class MergedZImageAttention(Attention):  # type: ignore[misc]
    """Attention whose processor's call of scaled_dot_product_attention runs on merged image tokens."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # compilers trace Attention.forward only by `super`, which fails for a hook that outlives the patch
        run = super().forward if ATTRIBUTE in vars(self) else partial(Attention.forward, self)

        def attend(mask: Tensor | None) -> Any:
            return run(hidden_states, encoder_hidden_states, mask, **kwargs)

        mask = attention_mask  # [B, S]
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None]
        return run_rotary(
            self, hidden_states, None, mask, attend, processors=PROCESSORS, takes_mask=True, joined="after"
        )


class ZImageNorm(ImageInput, RMSNorm):  # type: ignore[misc]
    """The first norm of a layer."""

    text = "after"


class _Stacked(Argument):
    """A list with one latent [C, 1, h, w] for each sample, as [B, C, h, w]; None where they are no such latents."""

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        latents = super().get(args, kwargs)
        if latents is None or not all(isinstance(x, Tensor) and x.shape == latents[0].shape for x in latents):
            return None
        return torch.cat(list(latents), dim=1).transpose(0, 1)


class _First(Argument):
    """A list with one text for each sample, of which pipelines keep the tensors: the first."""

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        texts = super().get(args, kwargs)
        return texts[0] if texts and isinstance(texts[0], Tensor) else None


class _Reversed(Argument):
    """The timestep, which the model gets as 1 minus the scheduler's."""

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        timestep = super().get(args, kwargs)
        return None if timestep is None else 1 - timestep


_LATENTS = Argument(0, ("x",))
_PATCH = Argument(7, ("patch_size",))
_FRAMES = Argument(8, ("f_patch_size",))


def _read_map(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MapCall:
    latents = list(_LATENTS.get(args, kwargs))
    if not isinstance(latents[0], Tensor):
        raise ValueError(
            "x has several images for each sample (Z-Image-Omni), whose tokens have a modulation each, and lie behind "
            "the text: tokens are merged where each sample is one image; call tofu_sd.remove_patch"
        )
    sizes = [tuple(latent.shape[1:]) for latent in latents]
    frames, height, width = sizes[0]
    if frames != (_FRAMES.get(args, kwargs) or 1) or any(size != sizes[0] for size in sizes):
        raise ValueError(
            f"x has latents of (frames, height, width) {sizes}: tokens are merged where all samples have one frame of "
            "one size; call tofu_sd.remove_patch"
        )
    side = _PATCH.get(args, kwargs) or 2
    return MapCall(len(latents), height // side, width // side, latents[0].device, latents[0].dtype)


def _probe(attention: nn.Module, x: Tensor) -> Any:
    """Runs attention with as many text tokens as a prompt usually has."""
    return attention(torch.cat([x, x.new_zeros(len(x), TEXT_TOKENS, x.shape[-1])], dim=1))


FAMILY = rotary_family(
    kinds=(
        BlockKind(
            blocks="layers",
            block_class=ZImageTransformerBlock,
            layers={"norm": "attention_norm1", "attn": "attention"},
            swaps={"norm": (RMSNorm, ZImageNorm), "attn": (Attention, MergedZImageAttention)},
            probe=_probe,
            joined=True,
        ),
    ),
    arguments=ArgumentNames(
        latent=_Stacked(*_LATENTS),
        timestep=_Reversed(1, ("t",)),
        conditioning=_First(2, ("cap_feats",)),
        tokens=_LATENTS,
        keys="",
        read_map=_read_map,
    ),
    processors=PROCESSORS,
    text_tokens=TEXT_TOKENS,
    refused={
        "merge_crossattn": "its blocks have no cross-attention",
        "merge_mlp": "its feed-forward also runs on the text",
    },
)
