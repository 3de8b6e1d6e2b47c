"""Measures the functional linearity of diffusers pipelines and of timm's classifiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import TokenFusionConfig
from ..patching.block_state import block_states
from ..patching.host import BlockInfo
from ..patching.linearity import LAYERS, PAIRS, Linearity, best_split, by_depth, probing
from .curve import Curve

PROMPTS = ("a photograph of a red fox in the snow", "a city street at night, oil painting", "a bowl of fruit", "")
STEPS = 4
MAX_IMAGES = 64  # shown to a classifier
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@contextmanager
def measuring(model: Any, config: TokenFusionConfig | None = None, pairs: int = PAIRS) -> Iterator[list[Linearity]]:
    """Measures each block's attention and feed-forward at every step: `with measuring(pipe) as results: pipe(...)`.

    Args:
        model: a pipeline or UNet of diffusers without a patch.
        config: how tokens are matched.
        pairs: of each sample at most, evenly spread over those that would be merged.

    Yields:
        A list to which each measurement is appended.

    Raises:
        ValueError: the model has a patch.
    """
    from ..hosts import diffusers_unet as host

    unet, _ = host.unwrap(model)
    with probing(unet, host.find_blocks(unet), host.ARGUMENTS, config, pairs) as results:
        yield results


def measure_split(pipe: Any, blocks: Sequence[BlockInfo], config: TokenFusionConfig) -> int:
    """Returns the depth split of a pipeline, from the linearity of the merged layers in a few steps of small images.

    Args:
        pipe: a text-to-image pipeline.
        blocks: the blocks of its UNet.
        config: how tokens are merged.

    Raises:
        ValueError: the pipeline cannot generate images from prompts.
    """
    what = "depth_split is 'auto', which runs a few steps from prompts and so needs a text-to-image pipeline"
    if not hasattr(pipe, "unet"):
        raise ValueError(f"{what}; this is a {type(pipe).__name__}: give a number, which `measuring` helps to choose")
    from diffusers import AutoPipelineForText2Image

    try:
        text2image = AutoPipelineForText2Image.from_pipe(pipe)
    except ValueError as error:
        raise ValueError(f"{what}; {type(pipe).__name__} cannot be made one: give a number") from error
    text2image.set_progress_bar_config(disable=True)
    fixed = replace(config, depth_split=0)
    merged = {block.depth for block, _ in block_states(blocks, fixed)}
    with measuring(text2image, fixed) as results:
        generator = torch.Generator().manual_seed(0)
        text2image(list(PROMPTS), num_inference_steps=STEPS, generator=generator, output_type="latent")
    layers = [layer for layer in config.layers if layer in LAYERS]
    return best_split({depth: value for depth, value in by_depth(results, layers).items() if depth in merged})


def measure(model: str, prompts: Sequence[str], steps: int, ratio: float, seed: int) -> Curve:
    """Returns the curve of a text-to-image model over a sampling of one image for each prompt.

    Args:
        model: "demo", "demo-textures", or what from_pretrained takes.
        prompts: one for each image.
        steps: of the sampling.
        ratio: share of tokens that would be merged.
        seed: of the images.

    Raises:
        ValueError: a value is out of range.
    """
    import diffusers

    from ..hosts.diffusers_unet import find_blocks, unwrap

    config = TokenFusionConfig(ratio, depth_split=0)
    if not ratio:
        raise ValueError("ratio is 0; pairs are measured that would be merged, so it must be above 0")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be an integer >= 1")
    pipe = load(model)
    merged = [block.depth for block, _ in block_states(find_blocks(unwrap(pipe)[0]), config)]
    with measuring(pipe, config) as results:
        generator = torch.Generator().manual_seed(seed)
        pipe(list(prompts), num_inference_steps=steps, generator=generator, output_type="latent")
    if not results:
        raise ValueError(f"ratio is {ratio:g}; at this size it would merge no token")
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return Curve(model, versions, merged, results, list(prompts), steps, ratio, seed)


def measure_classifier(name: str, folder: str) -> Curve:
    """Returns the curve of a classifier of timm's, with pretrained weights, over images spread evenly over a folder.

    Raises:
        ValueError: the folder holds no images.
    """
    import timm
    from PIL import Image

    from ..hosts.timm import find_blocks
    from ..hosts.timm_linearity import PAIRS, linearity

    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"there are no images in {folder!r}; looked for {', '.join(SUFFIXES)}")
    files = [files[i] for i in sorted({round(i) for i in torch.linspace(0, len(files) - 1, MAX_IMAGES).tolist()})]
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    results: list[Linearity] = []
    for call, file in enumerate(files):
        with Image.open(file) as image:
            pixels = transform(image.convert("RGB")).unsqueeze(0)
        results += [
            Linearity(f"blocks.{depth}", depth, layer, call, None, value, PAIRS)
            for layer in LAYERS
            for depth, value in enumerate(linearity(model, pixels, layer=layer)[:, 0].tolist())
        ]
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    return Curve(name, versions, list(range(len(find_blocks(model)))), results, images=len(files))


def load(model: str) -> Any:
    """Loads a text-to-image pipeline: an embedded model, or what from_pretrained takes."""
    from .. import demo
    from ..demo.models import EMBEDDED

    if model in EMBEDDED:
        return demo.load(EMBEDDED[model].name)
    from diffusers import AutoPipelineForText2Image

    return AutoPipelineForText2Image.from_pretrained(model)
