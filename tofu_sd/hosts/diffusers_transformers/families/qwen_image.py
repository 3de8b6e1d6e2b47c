"""Qwen-Image and its edit variants. See `rotary`. Height and width come as numbers, in `img_shapes`.

Its processor makes the mask of a joint sequence from a mask of the text. So the mask that runs the merged call is given
as the mask of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from ....patching.host import ATTRIBUTE, Argument, MapCall
from ..family import LATENT, BlockKind, arguments_of
from ..interception import CallMask
from ..rotary import probe_double, rotary_family, run_rotary
from ..sequence import ImageNorm

PROCESSORS = ("QwenDoubleStreamAttnProcessor2_0",)
TEXT_MASK = "encoder_hidden_states_mask"


class MergedQwenAttention(Attention):  # type: ignore[misc]
    """Attention whose processor's call of scaled_dot_product_attention runs on merged image tokens."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        # compilers trace Attention.forward only by `super`, which fails for a hook that outlives the patch
        run = super().forward if ATTRIBUTE in vars(self) else partial(Attention.forward, self)
        of_text: Tensor | None = kwargs.pop(TEXT_MASK, None)  # [B, T]

        def attend(mask: Tensor | None) -> Any:
            if isinstance(mask, CallMask):
                kwargs[TEXT_MASK] = mask.resized(hidden_states.shape[0], encoder_hidden_states.shape[1])
            elif of_text is not None:
                kwargs[TEXT_MASK] = of_text
            return run(hidden_states, encoder_hidden_states, attention_mask, **kwargs)

        joint = None
        if of_text is not None:
            image = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=of_text.device)
            joint = torch.cat([of_text.bool(), image], dim=1)[:, None, None]  # [B, 1, 1, S]
        return run_rotary(
            self, hidden_states, encoder_hidden_states, joint, attend, processors=PROCESSORS, takes_mask=True
        )


_SHAPES = Argument(4, ("img_shapes",))


def _read_map(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MapCall:
    if module.config.use_layer3d_rope:
        raise ValueError(
            "Qwen-Image-Layered generates several layers of an image at once, and tokens are merged in one image: call "
            "tofu_sd.remove_patch"
        )
    latent: Tensor = LATENT.get(args, kwargs)
    shapes = [[each] if isinstance(each[0], int) else list(each) for each in _SHAPES.get(args, kwargs)]
    (frames, h, w), *others = shapes[0]
    after = sum(f * y * x for f, y, x in others)
    if frames != 1 or any(own != shapes[0] for own in shapes) or latent.shape[1] != h * w + after:
        raise ValueError(
            f"img_shapes is {shapes}, and there are {latent.shape[1]} image tokens: tokens are merged where all "
            "samples have one image of one height and width and the same reference images; call tofu_sd.remove_patch"
        )
    return MapCall(len(latent), h, w, latent.device, latent.dtype, after)


FAMILY = rotary_family(
    kinds=(
        BlockKind(
            blocks="transformer_blocks",
            block_class=QwenImageTransformerBlock,
            layers={"norm": "img_norm1", "attn": "attn"},
            swaps={"norm": (nn.LayerNorm, ImageNorm), "attn": (Attention, MergedQwenAttention)},
            probe=probe_double,
        ),
    ),
    arguments=arguments_of(3, _read_map),
    processors=PROCESSORS,
    text_tokens=128,
    refused={
        "merge_crossattn": "its blocks have no cross-attention",
        "merge_mlp": "its feed-forward also runs on reference images",
    },
)
