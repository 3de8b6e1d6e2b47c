"""Stable Diffusion's UNets at their real sizes with random weights, which is all that time and memory depend on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ModelMixin, Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

SD15 = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD21 = {**SD15, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL = {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Case:
    """A model at an image size. shape: arguments of UNet2DConditionModel. pixels: a side of the image."""

    name: str
    shape: dict[str, Any]
    pixels: int

    @property
    def title(self) -> str:
        """The name of the model and the size, for people."""
        family = self.name.partition("-")[0]
        return f"{FAMILIES.get(family, family)} at {self.pixels} px"

    @property
    def latent(self) -> int:
        """A side of the latent."""
        return self.pixels // 8


FAMILIES = {"sd15": "Stable Diffusion 1.5", "sd21": "Stable Diffusion 2.1", "sdxl": "SDXL"}
CASES = {
    f"{name}-{pixels}": Case(f"{name}-{pixels}", shape, pixels)
    for name, shape, sizes in (
        ("sd15", SD15, (512, 768, 1024, 1536, 2048)),
        ("sd21", SD21, (768,)),
        ("sdxl", SDXL, (1024, 1536, 2048)),
    )
    for pixels in sizes
}


@dataclass(frozen=True)
class Call:
    """Arguments of a denoiser as in pipelines: the sample and a timestep by position, the others by name."""

    sample: Tensor
    more: dict[str, Any]


TOKENS = 77  # of a prompt


def unet(case: Case, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Call]:
    """The whole denoiser and the arguments of one step."""
    with torch.device("meta"):
        model = UNet2DConditionModel(sample_size=case.latent, **case.shape)
    call = _call(case, batch, 4, case.latent, device, dtype)
    if "addition_embed_type" in case.shape:
        extra = {"text_embeds": randn(device, dtype, batch, 1280), "time_ids": torch.ones(batch, 6, device=device)}
        call.more["added_cond_kwargs"] = extra
    return filled(model, device, dtype), call


def top_level(
    case: Case, batch: int, device: torch.device, dtype: torch.dtype, only_attention: bool
) -> tuple[nn.Module, Call]:
    """A TopLevel and the arguments of one pass through it."""
    with torch.device("meta"):
        model = TopLevel(case, only_attention)
    return filled(model, device, dtype), _call(
        case, batch, model.channels, case.latent // model.downsample, device, dtype
    )


class TopLevel(ModelMixin):  # type: ignore[misc]
    """The transformers of a UNet's highest resolution with attention, without the layers between them.

    only_attention: only self-attention, its norm and its residual. The structure is that of the UNet, so that every
    patch finds the same blocks.
    """

    def __init__(self, case: Case, only_attention: bool):
        super().__init__()
        shape = case.shape
        level = next(i for i, kind in enumerate(shape["down_block_types"]) if "CrossAttn" in kind)
        self.channels = shape["block_out_channels"][level]
        self.downsample = 2**level
        self.config = SimpleNamespace(sample_size=case.latent // self.downsample)  # of the map it is given
        heads, layers = (
            value[level] if isinstance(value, tuple) else value
            for value in (shape["attention_head_dim"], shape.get("transformer_layers_per_block", 1))
        )

        def transformers(n: int) -> nn.ModuleList:
            return nn.ModuleList(
                Transformer2DModel(
                    heads,
                    self.channels // heads,
                    in_channels=self.channels,
                    num_layers=layers,
                    cross_attention_dim=shape["cross_attention_dim"],
                    use_linear_projection=shape.get("use_linear_projection", False),
                )
                for _ in range(n)
            )

        self.down_blocks = nn.ModuleList([transformers(2)])
        self.up_blocks = nn.ModuleList([transformers(3)])
        for module in self.modules() if only_attention else ():
            if isinstance(module, Transformer2DModel):
                module.norm = module.proj_in = module.proj_out = nn.Identity()
            elif isinstance(module, BasicTransformerBlock):
                module.attn2, module.ff, module.norm3 = None, nn.Identity(), nn.Identity()

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        for stage in (*self.down_blocks, *self.up_blocks):
            for transformer in stage:
                sample = transformer(sample, encoder_hidden_states, return_dict=False)[0]
        return sample


def shared_weights_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the weights, to be patched or compiled independently."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def filled(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model from the meta device with weights that neither vanish nor blow up."""
    model = nn.Module.to(model, dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.fill_(name.endswith("weight"))
    for buffer in model.buffers():  # embeddings of positions
        buffer.zero_()
    return model


def _call(case: Case, batch: int, channels: int, side: int, device: torch.device, dtype: torch.dtype) -> Call:
    # guidance repeats the latents for the negative and the positive prompt, on which `share_across_cfg` relies
    repeats = 2 if batch % 2 == 0 else 1
    return Call(
        randn(device, dtype, batch // repeats, channels, side, side).repeat(repeats, 1, 1, 1),
        {"encoder_hidden_states": randn(device, dtype, batch, TOKENS, case.shape["cross_attention_dim"])},
    )


def randn(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(1))
