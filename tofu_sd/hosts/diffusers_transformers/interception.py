"""Merges image tokens inside the call of scaled_dot_product_attention that a processor of diffusers makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...core.joint_attention import change_image, joint_classes, joint_log_size
from ...core.proportional import SDPA, weighted_attention
from ...core.reductions import unmerge
from ...core.token_map import SoftMap, TokenMap
from ...kernels.operators import is_compiling
from ...patching.block_state import BlockState


class MergedCall:
    """Runs scaled_dot_product_attention on a sequence whose image tokens are merged.

    Args:
        state: of the block.
        map: of its N image tokens to K survivors.
        start: position of the first image token in the sequence.
        projected: whether queries, keys and values come from all N tokens and are merged here. Otherwise they come from
            the K survivors, and only log(n) is added.
        mask: [B, 1, S, S] or [B, 1, 1, S], the host's own; it hides no image token. True or 0 where a key is seen.
    """

    def __init__(
        self, state: BlockState, map: TokenMap | SoftMap, start: int, projected: bool, mask: Tensor | None = None
    ):
        self.state = state
        self.map = map
        self.start = start
        self.projected = projected
        self.mask = mask
        self.calls = 0

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any
    ) -> Tensor:
        """Takes the arguments of scaled_dot_product_attention: query, key, value [B, H, S, d] -> [B, H, S, d]."""
        if not is_compiling():
            self.calls += 1
        if attn_mask is not None:
            raise RuntimeError("a mask of the caller hides keys by their position, which merging changes: leave it off")
        if not self.projected:
            return self._attend(query, key, value, **more)
        state, map = self.state, self.map
        key, value = (self._change(x, self._reduce_kv) for x in (key, value))
        if state.kv_only:
            return self._attend(query, key, value, **more)
        out = self._attend(self._change(query, partial(state.reduce, map=map)), key, value, **more)
        return change_image(out, self.start, map.after[1], partial(unmerge, map=map))

    def _change(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        return change_image(x, self.start, self.map.before[1], change)

    def _reduce_kv(self, x: Tensor) -> Tensor:
        return self.state.reduce_kv(x, self.map)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        keys, survivors = key.shape[2], self.map.after[1]
        if is_compiling():  # inductor fails to compare strides that are multiples of a merged sequence's length
            query, key, value = (_token_major(x) for x in (query, key, value))
        if self.mask is not None:
            bias = self._merged_mask(self.mask, query, keys)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, **more)
        if not self.state.needs_bias(self.map, joint=keys > survivors):
            return F.scaled_dot_product_attention(query, key, value, **more)
        log_size = joint_log_size(self.map.log_size, self.start, keys)
        classes = joint_classes(self.state.size_classes(self.map), self.start, keys)
        out = weighted_attention(query, key, value, log_size, classes, **more)
        return _token_major(out)  # as without a bias; processors may take views of it

    def _merged_mask(self, mask: Tensor, query: Tensor, keys: int) -> Tensor:
        """Returns the host's mask for merged tokens as a bias, with log(n) added: [B, 1, S', keys]."""
        mask = self._shortened(mask, -1)
        if mask.shape[-2] not in (1, query.shape[2]):
            mask = self._shortened(mask, -2)
        bias = mask.to(query.dtype)
        if mask.dtype == torch.bool:
            bias = torch.zeros_like(bias).masked_fill(~mask, -torch.inf)
        if not self.state.proportional:
            return bias
        return bias + joint_log_size(self.map.log_size, self.start, keys)[:, None, None].to(query.dtype)

    def _shortened(self, mask: Tensor, dim: int) -> Tensor:
        """Returns a mask with one entry for each survivor in place of each image token, all of which are equal."""
        n, survivors = self.map.before[1], self.map.after[1]
        length = mask.shape[dim]
        before = mask.narrow(dim, 0, self.start + survivors)
        return torch.cat([before, mask.narrow(dim, self.start + n, length - self.start - n)], dim=dim)


def _token_major(x: Tensor) -> Tensor:
    """Returns x [B, H, S, d] in the memory layout of [B, S, H, d], copied only where it is another."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class CallMask(Tensor):
    """An attention mask that takes scaled_dot_product_attention over, as `KeyBias` does.

    For processors that pass their mask on. Unlike a TorchFunctionMode, torch.compile supports it in processors that
    call methods of tensors written in Python (`unflatten`).
    """

    call: MergedCall

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func is SDPA and isinstance(named.get("attn_mask"), CallMask):
                return named.pop("attn_mask").call(*args, **named)
            result = func(*args, **named)
        if func not in _SHAPING:
            return result
        shaped = result.as_subclass(cls)
        shaped.call = next(x for x in (*args, *args[0]) if isinstance(x, CallMask)).call
        return shaped

    def resized(self, *shape: int) -> CallMask:
        """Returns a mask of another shape that runs the same call, for processors that append to it."""
        mask = torch.zeros(shape, dtype=torch.bool, device=self.device).as_subclass(CallMask)
        mask.call = self.call
        return mask


_SHAPING = (torch.cat, Tensor.__getitem__)  # the result of a mask is a mask


def call_mask(call: MergedCall, x: Tensor, keys: int) -> CallMask:
    """Returns a mask that runs a merged call.

    Args:
        call: what it runs.
        x: has its type and device.
        keys: its last size, which diffusers may compare with the number of keys.

    Raises:
        RuntimeError: something has replaced torch's scaled_dot_product_attention.
    """
    if not is_compiling() and F.scaled_dot_product_attention is not SDPA:
        raise RuntimeError(_no_call("its processor"))
    mask = x.new_zeros(1, 1, 1, keys).as_subclass(CallMask)
    mask.call = call
    return mask


class Intercepted(TorchFunctionMode):
    """Inside, each call of scaled_dot_product_attention is a merged call. For processors that drop their mask."""

    def __init__(self, call: MergedCall):
        super().__init__()
        self.call = call

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is SDPA:
            return self.call(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def check_called(call: MergedCall, processor: Any) -> None:
    """Raises RuntimeError if a processor made no call of torch's scaled_dot_product_attention."""
    if call.calls or is_compiling():
        return
    raise RuntimeError(_no_call(type(processor).__name__))


def _no_call(who: str) -> str:
    kernel = F.scaled_dot_product_attention
    reason = "" if kernel is SDPA else f", which {getattr(kernel, '__qualname__', kernel)} has replaced"
    return (
        f"{who} does not call torch's scaled_dot_product_attention{reason}: no token can be merged in it; restore it, "
        "or call tofu_sd.remove_patch"
    )
