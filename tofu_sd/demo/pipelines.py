"""How the pipelines of the embedded models are called."""

from __future__ import annotations

from typing import Any

GUIDANCE = 3.0  # of all published figures; the pipelines' own defaults are those of the published models
# Tokens of T5, by class of pipeline. At 256 px text is then about the same share of the tokens as in the published
# models at 1024 px: 8 % for Stable Diffusion 3, with 77 tokens of CLIP, and 11 % for Flux.1.
TEXT_LENGTHS = {"StableDiffusion3Pipeline": 16, "FluxPipeline": 32}


def call_options(pipe: Any, prompts: int = 1, guidance: float = GUIDANCE) -> dict[str, Any]:
    """Returns the arguments of a call that differ between the embedded models.

    Args:
        pipe: the pipeline of an embedded model.
        prompts: number of prompts of the call.
        guidance: scale of classifier-free guidance.

    Returns:
        Keyword arguments: guidance under the name that the pipeline uses, and the text length of the training.
    """
    name = type(pipe).__name__
    options = {"max_sequence_length": TEXT_LENGTHS[name]} if name in TEXT_LENGTHS else {}
    if name == "FluxPipeline":  # its guidance_scale is an input of distilled models
        return options | {"true_cfg_scale": guidance, "negative_prompt": [""] * prompts}
    return options | {"guidance_scale": guidance}
