"""Diffusion transformers at their real sizes with random weights, whole or one block of each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tofu_sd.hosts.diffusers_transformers import host_of

from .model_shapes import Call, filled, randn

SD3 = {
    "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "sample_size": 128,
    "pos_embed_max_size": 192,
}  # fmt: skip
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd3-medium": ("Stable Diffusion 3 medium", "SD3Transformer2DModel", SD3),
    "sd3.5-medium": (
        "Stable Diffusion 3.5 medium",
        "SD3Transformer2DModel",
        {**SD3, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384},
    ),
    "sd3.5-large": (
        "Stable Diffusion 3.5 large",
        "SD3Transformer2DModel",
        {**SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
    ),
    "flux1": ("Flux.1", "FluxTransformer2DModel", {"guidance_embeds": True}),
    "pixart-sigma": ("PixArt-Sigma", "PixArtTransformer2DModel", {"caption_channels": 4096, "sample_size": 128}),
    "qwen-image": ("Qwen-Image", "QwenImageTransformer2DModel", {}),
    "z-image": ("Z-Image", "ZImageTransformer2DModel", {}),
}
PIXELS = (1024, 2048)
RATIO_OF_CEILINGS = 0.5
PATCH = 2  # side of a token in cells of the latent, in all of these


@dataclass(frozen=True)
class TransformerCase:
    """A diffusion transformer at an image size.

    Args:
        name: of the case.
        label: of the model, for people.
        kind: the model's class in diffusers.
        shape: its arguments.
        pixels: a side of the image.
    """

    name: str
    label: str
    kind: str
    shape: dict[str, Any]
    pixels: int

    @property
    def title(self) -> str:
        """The name of the model and the size, for people."""
        return f"{self.label} at {self.pixels} px"

    @property
    def latent(self) -> int:
        """A side of the latent."""
        return self.pixels // 8

    def on_meta(self) -> Any:
        """Returns the whole model without weights."""
        with torch.device("meta"):
            return getattr(diffusers, self.kind)(**self.shape)

    def ceilings(self, ratio: float) -> dict[str, float]:
        """Returns the most that merging can speed up a step of the whole model, by FLOPs, for each form."""
        model = self.on_meta()
        host = host_of(model)
        assert host is not None
        return host.ceilings(model, (self.latent, self.latent), ratio)


CASES = {
    f"{name}-{pixels}": TransformerCase(f"{name}-{pixels}", label, kind, shape, pixels)
    for name, (label, kind, shape) in SHAPES.items()
    for pixels in PIXELS
}


class Denoiser(nn.Module):
    """A transformer that is called as UNets are: the sample and a timestep by position, the others by name.

    Args:
        transformer: the model.
        names: of its latents and its timestep.
        scale: what the scheduler's timesteps are multiplied by.
        as_list: whether it takes a list with one latent for each sample.
    """

    def __init__(self, transformer: nn.Module, names: tuple[str, str], scale: float, as_list: bool):
        super().__init__()
        self.transformer = transformer
        self.names = names
        self.scale = scale
        self.as_list = as_list

    def forward(self, sample: Tensor, timestep: Tensor, **more: Any) -> Any:
        latents = list(sample) if self.as_list else sample
        steps = (timestep * self.scale).to(sample.dtype).expand(len(sample))
        return self.transformer(**dict(zip(self.names, (latents, steps), strict=True)), **more, return_dict=False)[0]


def build(
    case: TransformerCase, batch: int, device: torch.device, dtype: torch.dtype, whole: bool
) -> tuple[Denoiser, Call]:
    """Returns the model and the arguments of a step.

    Args:
        case: the model and the size.
        batch: number of samples.
        device: where it runs.
        dtype: of weights and samples.
        whole: whether it has all its blocks, or one of each kind.
    """
    model = case.on_meta()
    host = host_of(model)
    assert host is not None
    names = tuple(argument.names[0] for argument in (host.ARGUMENTS.latent, host.ARGUMENTS.timestep))
    for kind in () if whole else host.family.kinds:
        setattr(model, kind.blocks, getattr(model, kind.blocks)[:1])
    model = filled(model, device, dtype)
    if case.kind == "QwenImageTransformer2DModel":  # its rotations are no buffers, and would stay on the meta device
        axes = list(model.config.axes_dims_rope)
        model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=axes, scale_rope=True)
    noise = _Noise(model.config, batch, case.latent, host.family.text_tokens, device, dtype)
    sample, more = ARGUMENTS[case.kind](noise)
    as_list = case.kind == "ZImageTransformer2DModel"
    return Denoiser(model, (names[0], names[1]), host.family.timestep_scale, as_list), Call(sample, more)


@dataclass(frozen=True)
class _Noise:
    """Sizes of the arguments of a call, and where they are."""

    config: Any
    batch: int
    latent: int
    text: int
    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return randn(self.device, self.dtype, self.batch, *shape)

    @property
    def side(self) -> int:
        return self.latent // PATCH


def _sd3(noise: _Noise) -> tuple[Tensor, dict[str, Any]]:
    config = noise.config
    return noise(config.in_channels, noise.latent, noise.latent), {
        "encoder_hidden_states": noise(noise.text, config.joint_attention_dim),
        "pooled_projections": noise(config.pooled_projection_dim),
    }


def _pixart(noise: _Noise) -> tuple[Tensor, dict[str, Any]]:
    config = noise.config
    return noise(config.in_channels, noise.latent, noise.latent), {
        "encoder_hidden_states": noise(noise.text, config.caption_channels),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _flux(noise: _Noise) -> tuple[Tensor, dict[str, Any]]:
    config, places = noise.config, torch.arange(noise.side, device=noise.device, dtype=torch.float32)
    return noise(noise.side**2, config.in_channels), {
        "encoder_hidden_states": noise(noise.text, config.joint_attention_dim),
        "pooled_projections": noise(config.pooled_projection_dim),
        "guidance": torch.full((noise.batch,), 3.5, device=noise.device, dtype=noise.dtype),
        "img_ids": torch.cartesian_prod(places[:1], places, places),
        "txt_ids": torch.zeros(noise.text, 3, device=noise.device),
    }


def _qwen(noise: _Noise) -> tuple[Tensor, dict[str, Any]]:
    return noise(noise.side**2, noise.config.in_channels), {
        "encoder_hidden_states": noise(noise.text, noise.config.joint_attention_dim),
        "img_shapes": [[(1, noise.side, noise.side)]] * noise.batch,
    }


def _z_image(noise: _Noise) -> tuple[Tensor, dict[str, Any]]:
    text = noise(noise.text, noise.config.cap_feat_dim)
    return noise(noise.config.in_channels, 1, noise.latent, noise.latent), {"cap_feats": list(text)}


ARGUMENTS: dict[str, Callable[[_Noise], tuple[Tensor, dict[str, Any]]]] = {
    "SD3Transformer2DModel": _sd3,
    "PixArtTransformer2DModel": _pixart,
    "FluxTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen,
    "ZImageTransformer2DModel": _z_image,
}
"""By class: gives the sample and the other arguments of a call, except the timestep."""
