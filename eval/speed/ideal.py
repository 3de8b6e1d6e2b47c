"""The most that merging could save: attention on as many tokens as merging leaves, which costs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tofu_sd
from tofu_sd.core.proportional import SDPA
from tofu_sd.hosts.diffusers_transformers import TransformerHost, host_of

from ..common.cli import quiet_patches
from ..methods.attention import top_attentions
from .transformer_shapes import Denoiser


@contextmanager
def ideal(model: Any, ratio: float, latent: int) -> Iterator[None]:
    """Inside, the attention that would be merged runs on the first tokens, as many as merging leaves.

    In transformers whose positions are applied in attention, queries, keys and values come from all tokens, and fewer
    of them go on, as merging does it there.
    """
    if not isinstance(model, Denoiser):
        for attention, tokens in top_attentions(model, ratio, (latent, latent)):
            attention.__class__, attention.tokens = IdealAttention, tokens
        yield
        return
    host = host_of(model.transformer)
    assert host is not None
    for attention, tokens, num_merged in _attentions(host, model.transformer, ratio, latent):
        kind = type(attention)
        if host.family.merges_states:
            attention.__class__, attention.tokens = IdealAttention, tokens
        else:
            attention.__class__ = type(f"Ideal{kind.__name__}", (IdealCall, kind), {})
            attention.num_merged, attention.result = num_merged, None
    yield


def _attentions(host: TransformerHost, transformer: Any, ratio: float, latent: int) -> list[tuple[Any, int, int]]:
    """Returns (self-attention, image tokens after merging, image tokens that are merged) of each block."""
    with quiet_patches(), tofu_sd.patched(transformer, ratio, min_tokens=0):
        rows = tofu_sd.summary(transformer, (latent, latent)).rows
    blocks = host.find_blocks(transformer)
    return [
        (block.layers[name], row.after, row.before - row.after)
        for row, block in zip(rows, blocks, strict=True)
        for name in ("attn", "attn2")
        if name in block.layers
    ]


class IdealAttention(Attention):  # type: ignore[misc]
    """Self-attention on the first tokens only. A constant of full size replaces its result.

    So the residual after it costs as much as in the baseline. A compiler would remove attention whose result is unused;
    when compiled, its first token stands for all of them. The result of a text that it attends with stays.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(hidden_states[:, : self.tokens], *args, **kwargs)
        short, *of_text = found if isinstance(found, tuple) else (found,)
        if torch.compiler.is_compiling():
            return _with(short[:, :1].expand_as(hidden_states), of_text)
        if getattr(self, "result", None) is None:
            self.result = torch.zeros(hidden_states.shape, dtype=short.dtype, device=short.device)
        return _with(self.result, of_text)


def _with(image: Tensor, of_text: list[Any]) -> Any:
    return (image, *of_text) if of_text else image


class IdealCall:
    """Mixed into an attention: its call of scaled_dot_product_attention runs on the first tokens of the sequence."""

    num_merged: int
    result: Tensor | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Shortened(self):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Shortened(TorchFunctionMode):
    def __init__(self, attention: IdealCall):
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is not SDPA:
            return func(*args, **named)
        query, key, value = args or (named.pop(name) for name in ("query", "key", "value"))  # [B, H, S, d]
        tokens = query.shape[2] - self.attention.num_merged
        short = func(*(x[:, :, :tokens] for x in (query, key, value)), **named)
        if torch.compiler.is_compiling():
            return short[:, :, :1].expand_as(query)
        if self.attention.result is None:
            # in the layout of an output, [B, S, H, d], which processors view
            B, H, S, d = query.shape
            self.attention.result = short.new_zeros(B, S, H, d).transpose(1, 2)
        return self.attention.result
