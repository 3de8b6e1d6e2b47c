"""A call of ComfyUI's attention on text and image tokens, of which the image tokens are merged.

Nothing of ComfyUI is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.joint_attention import change_image, joint_classes, joint_log_size
from ...core.proportional import check_kernel, weighted_attention
from ...core.reductions import unmerge
from ...core.token_map import SoftMap, TokenMap
from ...patching.block_state import BlockState
from ...patching.host import ATTRIBUTE

_NAMES = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")

Attend = Callable[..., Tensor]


def named_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of ComfyUI's attention by name."""
    return {**dict(zip(_NAMES, args, strict=False)), **kwargs}


class JointCall:
    """Runs attention on a sequence whose image tokens are merged. Text and reference images stay unchanged.

    Args:
        state: of the block.
        map: of its N image tokens to K survivors.
        text: number of text tokens, which come before the image.
        images: number of tokens of the image and of its reference images.
    """

    def __init__(self, state: BlockState, map: TokenMap | SoftMap, text: int, images: int):
        self.state = state
        self.map = map
        self.text = text
        self.images = images
        self.calls = 0  # that ran on merged tokens

    def start_of(self, q: Tensor, k: Tensor, v: Tensor, skip_reshape: bool) -> int | None:
        """Returns the position of the first image token; None where these are not the tokens of the block.

        Args:
            q, k, v: as in `run`.
            skip_reshape: as in `run`.
        """
        length = q.shape[2 if skip_reshape else 1]
        if any(x.shape[2 if skip_reshape else 1] != length for x in (k, v)):
            return None
        return {self.images: 0, self.text + self.images: self.text}.get(length)

    def run(self, attend: Attend, start: int, call: dict[str, Any], *, own: bool) -> Tensor:
        """Runs attention on merged image tokens.

        Args:
            attend: the attention that the call would reach: ComfyUI's, or that of another node.
            start: position of the first image token.
            call: its arguments by name. q, k and v are [B, H, S, d] with `skip_reshape`, else [B, S, H d].
            own: whether `attend` is ComfyUI's own. Then proportional attention is run here, in the fastest way.
                Another node gets log(n) as a mask.

        Returns:
            [B, S, H d], or [B, H, S, d] with `skip_output_reshape`.
        """
        self.calls += 1
        split = bool(call.get("skip_reshape"))
        q, k, v = (call[name] if split else call[name].flatten(2).unsqueeze(1) for name in ("q", "k", "v"))
        k, v = (self._change(x, start, partial(self.state.reduce_kv, map=self.map)) for x in (k, v))
        if not self.state.kv_only:
            q = self._change(q, start, partial(self.state.reduce, map=self.map))
        out = self._attend(attend, start, {**call, "q": q, "k": k, "v": v}, own)
        if self.state.kv_only:
            return out
        separate = bool(call.get("skip_output_reshape"))
        whole = change_image(
            out if separate else out.unsqueeze(1), start, self.map.after[1], partial(unmerge, map=self.map)
        )
        return whole if separate else whole.squeeze(1)

    def _change(self, x: Tensor, start: int, change: Callable[[Tensor], Tensor]) -> Tensor:
        return change_image(x, start, self.map.before[1], change)

    def _attend(self, attend: Attend, start: int, call: dict[str, Any], own: bool) -> Tensor:
        """Runs attention on merged tokens [B, H, S', d] or [B, 1, S', H d], with log(n) where it is needed."""
        queries, keys = call["q"].shape[2], call["k"].shape[2]
        if not self.state.needs_bias(self.map, joint=keys > self.map.after[1]):
            return _attend_as_called(attend, call)
        log_size = joint_log_size(self.map.log_size, start, keys)  # [B, S']
        if own:
            return self._weighted(call, start, log_size)
        mask = log_size[:, None, None].to(call["q"].dtype).expand(-1, 1, queries, -1)
        return _attend_as_called(attend, {**call, "mask": mask})

    def _weighted(self, call: dict[str, Any], start: int, log_size: Tensor) -> Tensor:
        dtype, heads = call["v"].dtype, call["heads"]
        q, k, v = (call[name] for name in ("q", "k", "v"))
        if not call.get("skip_reshape"):
            q, k, v = (x.squeeze(1).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        if call.get("attn_precision") is torch.float32:
            q, k, v = q.float(), k.float(), v.float()
        check_kernel(q.device, q.dtype)
        classes = joint_classes(self.state.size_classes(self.map), start, k.shape[2])
        out = weighted_attention(q, k, v, log_size, classes).to(dtype)
        return out if call.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


def _attend_as_called(attend: Attend, call: dict[str, Any]) -> Tensor:
    """Calls attention with q, k and v in the layout of the original call, by position as ComfyUI does."""
    q, k, v = (call[name] if call.get("skip_reshape") else call[name].squeeze(1) for name in ("q", "k", "v"))
    more = {name: value for name, value in call.items() if name not in _NAMES[:4]}
    return attend(q, k, v, call["heads"], **more)


class JointProbe(nn.Module):
    """Attention of a block's image tokens and as many text tokens as a prompt has, to time it with and without merging.

    Args:
        heads: number of heads.
        text_tokens: of a prompt.
        plain: the program's own attention(q, k, v, heads, options) of [B, S, C].
    """

    def __init__(self, heads: int, text_tokens: int, plain: Attend):
        super().__init__()
        self.heads = heads
        self.text_tokens = text_tokens
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        """Runs attention of image tokens [B, N, C] with text: [B, T + N, C]."""
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        tokens = torch.cat([x.new_zeros(len(x), self.text_tokens, x.shape[2]), x], dim=1)
        map = None if state is None else state.pop_map("attn", x)
        if map is None or state is None:
            return self._attend(tokens, tokens, tokens, self.heads)
        call = {"q": tokens, "k": tokens, "v": tokens, "heads": self.heads}
        return JointCall(state, map, self.text_tokens, x.shape[1]).run(self._attend, self.text_tokens, call, own=True)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return self.plain(q, k, v, heads, {})
