"""How similar tokens are in each block: the cosine of each source to its nearest destination."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tofu_sd.core.matching import most_similar
from tofu_sd.core.partition import partition
from tofu_sd.hosts import diffusers_unet

from ..images.requests import Request

CALLS = 5  # of the model that are measured, evenly over the sampling


def nearest_cosines(tokens: Tensor, h: int, w: int) -> Tensor:
    """Returns the cosine of each source of an h x w map [B, N, C] to its nearest destination: [B, S].

    Destinations are the top-left tokens of 2 x 2 cells, as in ToMe's and ToFu's matching.
    """
    return most_similar(tokens, partition(h, w, 2, 2, tokens.device)).best


@torch.no_grad()
def measure(pipe: Any, requests: Sequence[Request], **sampling: Any) -> dict[str, float]:
    """Generates images and returns the median nearest cosine of each block of the highest resolution.

    Args:
        pipe: a diffusers pipeline without a patch.
        requests: prompts and seeds.
        sampling: num_inference_steps, guidance_scale, height and width.
    """
    blocks = [block for block in diffusers_unet.find_blocks(pipe.unet) if block.level == 0]
    found: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
    steps = sampling["num_inference_steps"]
    wanted = {round(i * (steps - 1) / (CALLS - 1)) for i in range(CALLS)}
    calls = -1

    def start_call(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handles = [pipe.unet.register_forward_pre_hook(start_call)]
    for block in blocks:
        size = block.map_size((sampling["height"] // pipe.vae_scale_factor, sampling["width"] // pipe.vae_scale_factor))

        def record(_: Any, args: tuple[Any, ...], name: str = block.name, size: tuple[int, int] = size) -> None:
            if calls in wanted:
                found[name].append(nearest_cosines(args[0], *size).flatten())

        handles.append(block.layers["norm"].register_forward_pre_hook(record))
    try:
        for request in requests:
            calls = -1
            pipe(
                request.prompt, generator=torch.Generator().manual_seed(request.seed), output_type="latent", **sampling
            )
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(torch.cat(values).median()) for name, values in found.items()}
