"""A checkpoint file as Stable Diffusion 1.5 is published: its names, its sizes, random weights.

For programs that load files: what they take a file for is decided by these names and shapes, so that no smaller model
will do. `python tests/helpers/programs/sd15_file.py PATH` writes 2 GiB.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import prod

import torch

Shape = tuple[int, ...]
CHANNELS, WORDS, STEP = (320, 640, 1280, 1280), 768, 1280


def layer(name: str, *shape: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    """A linear layer or a convolution, or a norm where there is one number alone."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def residual(name: str, entering: int, leaving: int) -> Iterator[tuple[str, Shape]]:
    yield from layer(f"{name}.in_layers.0", entering)
    yield from layer(f"{name}.in_layers.2", leaving, entering, 3, 3)
    yield from layer(f"{name}.emb_layers.1", leaving, STEP)
    yield from layer(f"{name}.out_layers.0", leaving)
    yield from layer(f"{name}.out_layers.3", leaving, leaving, 3, 3)
    if entering != leaving:
        yield from layer(f"{name}.skip_connection", leaving, entering, 1, 1)


def transformer(name: str, c: int) -> Iterator[tuple[str, Shape]]:
    yield from layer(f"{name}.norm", c)
    yield from layer(f"{name}.proj_in", c, c, 1, 1)
    block = f"{name}.transformer_blocks.0"
    for attention, context in (("attn1", c), ("attn2", WORDS)):
        yield from layer(f"{block}.{attention}.to_q", c, c, bias=False)
        yield from layer(f"{block}.{attention}.to_k", c, context, bias=False)
        yield from layer(f"{block}.{attention}.to_v", c, context, bias=False)
        yield from layer(f"{block}.{attention}.to_out.0", c, c)
    yield from layer(f"{block}.ff.net.0.proj", 8 * c, c)
    yield from layer(f"{block}.ff.net.2", c, 4 * c)
    for norm in ("norm1", "norm2", "norm3"):
        yield from layer(f"{block}.{norm}", c)
    yield from layer(f"{name}.proj_out", c, c, 1, 1)


def unet(top: str = "model.diffusion_model") -> Iterator[tuple[str, Shape]]:
    yield from layer(f"{top}.time_embed.0", STEP, CHANNELS[0])
    yield from layer(f"{top}.time_embed.2", STEP, STEP)
    yield from layer(f"{top}.input_blocks.0.0", CHANNELS[0], 4, 3, 3)
    skips, c, number = [CHANNELS[0]], CHANNELS[0], 1
    for level, leaving in enumerate(CHANNELS):
        for _ in range(2):
            yield from residual(f"{top}.input_blocks.{number}.0", c, leaving)
            if level < 3:
                yield from transformer(f"{top}.input_blocks.{number}.1", leaving)
            c, number = leaving, number + 1
            skips.append(c)
        if level < 3:
            yield from layer(f"{top}.input_blocks.{number}.0.op", c, c, 3, 3)
            skips.append(c)
            number += 1
    yield from residual(f"{top}.middle_block.0", c, c)
    yield from transformer(f"{top}.middle_block.1", c)
    yield from residual(f"{top}.middle_block.2", c, c)
    for number in range(12):
        level = 3 - number // 3
        yield from residual(f"{top}.output_blocks.{number}.0", c + skips.pop(), CHANNELS[level])
        c = CHANNELS[level]
        if level < 3:
            yield from transformer(f"{top}.output_blocks.{number}.1", c)
        if level and number % 3 == 2:
            yield from layer(f"{top}.output_blocks.{number}.{1 + (level < 3)}.conv", c, c, 3, 3)
    yield from layer(f"{top}.out.0", c)
    yield from layer(f"{top}.out.2", 4, c, 3, 3)


def autoencoder(top: str = "first_stage_model") -> Iterator[tuple[str, Shape]]:
    def block(name: str, entering: int, leaving: int) -> Iterator[tuple[str, Shape]]:
        yield from layer(f"{name}.norm1", entering)
        yield from layer(f"{name}.conv1", leaving, entering, 3, 3)
        yield from layer(f"{name}.norm2", leaving)
        yield from layer(f"{name}.conv2", leaving, leaving, 3, 3)
        if entering != leaving:
            yield from layer(f"{name}.nin_shortcut", leaving, entering, 1, 1)

    def middle(name: str) -> Iterator[tuple[str, Shape]]:
        yield from block(f"{name}.block_1", 512, 512)
        yield from layer(f"{name}.attn_1.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            yield from layer(f"{name}.attn_1.{part}", 512, 512, 1, 1)
        yield from block(f"{name}.block_2", 512, 512)

    channels = (128, 256, 512, 512)
    yield from layer(f"{top}.encoder.conv_in", 128, 3, 3, 3)
    c = 128
    for level, leaving in enumerate(channels):
        for i in range(2):
            yield from block(f"{top}.encoder.down.{level}.block.{i}", c, leaving)
            c = leaving
        if level < 3:
            yield from layer(f"{top}.encoder.down.{level}.downsample.conv", c, c, 3, 3)
    yield from middle(f"{top}.encoder.mid")
    yield from layer(f"{top}.encoder.norm_out", c)
    yield from layer(f"{top}.encoder.conv_out", 8, c, 3, 3)
    yield from layer(f"{top}.decoder.conv_in", c, 4, 3, 3)
    yield from middle(f"{top}.decoder.mid")
    for level, leaving in reversed(list(enumerate(channels))):
        for i in range(3):
            yield from block(f"{top}.decoder.up.{level}.block.{i}", c, leaving)
            c = leaving
        if level:
            yield from layer(f"{top}.decoder.up.{level}.upsample.conv", c, c, 3, 3)
    yield from layer(f"{top}.decoder.norm_out", c)
    yield from layer(f"{top}.decoder.conv_out", 3, c, 3, 3)
    yield from layer(f"{top}.quant_conv", 8, 8, 1, 1)
    yield from layer(f"{top}.post_quant_conv", 4, 4, 1, 1)


def text_encoder(top: str = "cond_stage_model.transformer.text_model") -> Iterator[tuple[str, Shape]]:
    yield f"{top}.embeddings.token_embedding.weight", (49408, WORDS)
    yield f"{top}.embeddings.position_embedding.weight", (77, WORDS)
    for number in range(12):
        block = f"{top}.encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from layer(f"{block}.self_attn.{part}", WORDS, WORDS)
        yield from layer(f"{block}.layer_norm1", WORDS)
        yield from layer(f"{block}.mlp.fc1", 4 * WORDS, WORDS)
        yield from layer(f"{block}.mlp.fc2", WORDS, 4 * WORDS)
        yield from layer(f"{block}.layer_norm2", WORDS)
    yield from layer(f"{top}.final_layer_norm", WORDS)


def counts() -> list[int]:
    """Weights of the UNet, the autoencoder and the text encoder."""
    return [sum(prod(shape) for _, shape in part()) for part in (unet, autoencoder, text_encoder)]


def write(path: str) -> None:
    from safetensors.torch import save_file

    g, weights = torch.Generator().manual_seed(0), {}
    for part in (unet, autoencoder, text_encoder):
        for name, shape in part():
            if len(shape) > 1:  # 0.7: a deep model of random weights stays finite in half precision
                weight = torch.randn(shape, generator=g) * 0.7 / prod(shape[1:]) ** 0.5
            else:
                weight = torch.full(shape, float(name.endswith("weight")))
            weights[name] = weight.half()
    save_file(weights, path)


if __name__ == "__main__":
    write(sys.argv[1])
