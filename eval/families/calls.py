"""Calls of a model: sizes, texts, masks, reference images, residuals of ControlNets."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .cells import Absent
from .random_weights import noise
from .tiny import LONG_TEXT, TEXT, Tiny, grid_ids

WITH_IDS = ("flux.1", "chroma", "flux.2")  # families whose tokens have position ids
N = 64  # image tokens of the usual call


def size(h: int, w: int) -> Any:
    """Returns the function that gives the arguments of an image of h x w tokens."""
    return lambda family, tiny: tiny.inputs(h, w)


def same_latents(family: str, tiny: Tiny) -> dict[str, Any]:
    """Both halves of the batch are one image, as in guidance."""
    call = tiny.inputs()
    name = "x" if family == "z-image" else "hidden_states"
    value = call[name]
    return {name: [value[0]] * 2 if isinstance(value, list) else value[:1].repeat(2, *[1] * (value.ndim - 1))}


def two_lengths(family: str, tiny: Tiny) -> dict[str, Any]:
    """The prompts of a batch have different lengths."""
    names = {
        "pixart": "encoder_attention_mask",
        "chroma": "attention_mask",
        "qwen-image": "encoder_hidden_states_mask",
    }
    if family == "z-image":
        return {"cap_feats": [noise(n, 32, seed=n) for n in (TEXT, LONG_TEXT)]}
    if family not in names:
        raise Absent("texts are padded, without a mask")
    mask = tiny.inputs()[names[family]].clone()
    mask[0, 2:TEXT] = 0
    return {names[family]: mask}


def mask_of_image(family: str, tiny: Tiny) -> dict[str, Any]:
    """A mask of the caller hides an image token."""
    if family == "chroma":
        mask: Tensor = tiny.inputs()["attention_mask"].clone()
        mask[:, TEXT + 3] = False
        return {"attention_mask": mask}
    if family == "pixart":
        return {"attention_mask": (torch.arange(N) != 3).float().repeat(2, 1)}
    if family in WITH_IDS:
        visible = (torch.arange(TEXT + N) != TEXT + 3)[None, None, None]
        return {"joint_attention_kwargs": {"attention_mask": visible}}
    raise Absent("the model takes no such mask")


def reference(family: str, tiny: Tiny) -> dict[str, Any]:
    """A reference image of 4 x 6 tokens follows the image, as in Flux.1 Kontext and Qwen-Image-Edit."""
    call = tiny.inputs()
    if family == "z-image":
        return _omni(call)
    if family not in ("flux.1", "flux.2", "qwen-image"):
        raise Absent("no pipeline gives reference images")
    tokens = {"hidden_states": torch.cat([call["hidden_states"], noise(2, 24, 16, seed=5)], dim=1)}
    if family == "qwen-image":
        return {**tokens, "img_shapes": [[(1, 8, 8), (1, 4, 6)]] * 2}
    ids = call["img_ids"]
    more = torch.nn.functional.pad(grid_ids(4, 6, image=10), (0, ids.shape[-1] - 3))
    return {**tokens, "img_ids": torch.cat([ids, more.expand(*ids.shape[:-2], -1, -1)], dim=-2)}


def _omni(call: dict[str, Any]) -> dict[str, Any]:
    """Z-Image-Omni: two images a sample, of which the first is a reference."""
    return {
        "x": [[x, x] for x in call["x"]],
        "cap_feats": [[text] * 2 for text in call["cap_feats"]],
        "siglip_feats": [None] * 2,
        "image_noise_mask": [[0, 1]] * 2,
    }


def two_sizes(family: str, tiny: Tiny) -> dict[str, Any]:
    """The images of a batch have different sizes."""
    if family == "qwen-image":
        return {"img_shapes": [[(1, 8, 8)], [(1, 4, 16)]]}
    if family == "z-image":
        return {"x": [noise(4, 1, 16, 16), noise(4, 1, 8, 32)]}
    raise Absent("the latents of a batch have one size")


def no_grid(family: str, tiny: Tiny) -> dict[str, Any]:
    """The tokens are no grid of height x width, or are several frames."""
    if family in WITH_IDS:
        return {"img_ids": tiny.inputs()["img_ids"].roll(1, -2)}
    if family == "qwen-image":
        return {"img_shapes": [[(2, 8, 4)]] * 2}
    if family == "z-image":
        return {"x": list(noise(2, 4, 2, 16, 8))}
    raise Absent("height and width come with the latent")


def control(family: str, tiny: Tiny) -> dict[str, Any]:
    """Residuals of a ControlNet for all image tokens."""
    if family.startswith("sd3"):
        return {"block_controlnet_hidden_states": [noise(2, N, 16, seed=i) for i in range(2)]}
    if family in ("flux.1", "chroma"):
        names = ("controlnet_block_samples", "controlnet_single_block_samples")
        return {name: [noise(2, N, 32, seed=i)] for i, name in enumerate(names)}
    if family == "qwen-image":
        return {"controlnet_block_samples": [noise(2, N, 32)]}
    if family == "z-image":
        return {"controlnet_block_samples": {0: noise(2, N + 64, 32)}}
    raise Absent("the model takes no residuals")


def image_prompt(family: str, tiny: Tiny) -> dict[str, Any]:
    """Features of an IP-Adapter's image."""
    if family.startswith("sd3"):
        return {"joint_attention_kwargs": {"ip_hidden_states": noise(2, 5, 16), "temb": noise(2, 8)}}
    if family in ("flux.1", "chroma"):
        return {"joint_attention_kwargs": {"ip_hidden_states": [noise(2, 5, 16)]}}
    raise Absent("diffusers has no IP-Adapter for it")


def embedded_guidance(family: str, tiny: Tiny) -> dict[str, Any]:
    """Guidance is a number that the model gets."""
    if family in ("flux.1", "flux.2"):
        return {"guidance": torch.full((2,), 3.5)}
    raise Absent("guidance is a second prompt")


def half(family: str, tiny: Tiny) -> dict[str, Any]:
    """The arguments in bfloat16."""
    to_half = partial(tree_map_only, Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x)
    return {name: to_half(value) for name, value in tiny.inputs().items()}
