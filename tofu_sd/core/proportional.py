"""Proportional attention: adds log(n_i) to the logit of a key that stands for n_i tokens, in the fastest way.

With a bias on the keys, CUDA's scaled-dot-product attention cannot use its flash kernel. Flash can add the same number
as one more channel: log(n_i) in the keys, a constant in the queries. On a CPU, and where cuDNN's kernel takes a bias,
the bias is faster. Where it is known how many keys stand for how many tokens, an attention for each size needs neither;
whether that is faster is timed at the first call. Compiled code cannot query kernels, and uses the channel.

Hosts pass the bias to `scaled_dot_product_attention` as a mask. A mask of type `KeyBias` intercepts that call, as
`torch.nn.attention.bias.CausalBias` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.operators import is_compiling
from .attention_by_size import attend_by_size, can_attend_by_size, is_faster, uses_cudnn
from .token_map import SizeClasses

SDPA = torch._C._nn.scaled_dot_product_attention  # torch's own, even if torch.nn.functional has a replacement
FLASH_DEVICE, FLASH_TYPES = "cuda", (torch.float16, torch.bfloat16)
FLASH_CHANNELS = 256  # of a head, at most
EXTRA = 8  # channels more: flash takes multiples of 8


class KeyBias(Tensor):
    """A mask [..., K] that is the same for every query; `attend` adds it in scaled_dot_product_attention.

    `classes` is how many keys stand for how many tokens each, where that is known.
    """

    classes: SizeClasses | None = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is SDPA:
                return attend(*args, **(kwargs or {}))
            if func is Tensor.repeat_interleave and not is_compiling() and _repeats_heads(args, kwargs or {}):
                return _with_classes(_for_heads(args[0], args[1]), args[0].classes)
            result = func(*args, **(kwargs or {}))
        if func not in _SHAPING:
            return result
        shaped = result.as_subclass(cls)
        same_keys = not is_compiling() and shaped.shape[-1] == args[0].shape[-1]
        return _with_classes(shaped, args[0].classes) if same_keys else shaped


def _repeats_heads(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether repeat_interleave was called as diffusers' processors do, on a bias [B, 1, K]."""
    return len(args) == 2 and isinstance(args[1], int) and args[0].ndim == 3 and kwargs.get("dim") == 0


def _for_heads(bias: KeyBias, heads: int) -> KeyBias:
    """Returns a bias [B, 1, K] for all heads, [B, H, 1, K], without copying it.

    diffusers' processors repeat a mask to [B * H, 1, K] and then view it as [B, H, 1, K].
    """
    return bias.unsqueeze(1).expand(-1, heads, -1, -1).as_subclass(KeyBias)


_SHAPING = (Tensor.view, Tensor.reshape, Tensor.unsqueeze, Tensor.expand, Tensor.repeat_interleave)


def _with_classes(bias: KeyBias, classes: SizeClasses | None) -> KeyBias:
    if classes is not None:  # compiled code has none, and could not set an attribute
        bias.classes = classes
    return bias


def key_bias(log_size: Tensor, dtype: torch.dtype, sdpa: bool, classes: SizeClasses | None = None) -> Tensor:
    """Returns log(n_i) as an additive attention mask [B, 1, K].

    Args:
        log_size: [B, K], log(n_i), at least float32.
        dtype: of the tokens.
        sdpa: whether scaled_dot_product_attention will use it. Then, if flash is available, it is a KeyBias in float32,
            for the precision of `by_channel`.
        classes: how many keys stand for how many tokens each, where that is known.
    """
    bias = log_size.unsqueeze(1)
    if sdpa and bias.device.type == FLASH_DEVICE and dtype in FLASH_TYPES:
        return _with_classes(bias.as_subclass(KeyBias), classes)
    return bias.to(dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **more: Any) -> Tensor:
    """Runs scaled_dot_product_attention with a mask [B, H, 1, K] that is the same for every query, the fastest way."""
    if not flash_takes(query, **more):
        return by_mask(query, key, value, attn_mask, **more)
    classes = None if is_compiling() else getattr(attn_mask, "classes", None)
    mask = attn_mask[:, :1].to(query.dtype).expand(attn_mask.shape)  # one head is converted, for all
    usual = partial(by_channel, query, key, value, attn_mask, **more)
    if uses_cudnn(query, key, value, mask, more.get("scale")):
        usual = partial(by_mask, query, key, value, mask, **more)
    if classes is not None and not more.get("enable_gqa") and can_attend_by_size(query, key, value):
        by_size = partial(attend_by_size, query, key, value, classes, more.get("scale"))
        if is_faster(by_size, usual, query, key, classes):
            return by_size()
    return usual()


def proportional_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, log_size: Tensor, classes: SizeClasses | None = None
) -> Tensor:
    """Runs proportional attention, for hosts whose own attention has no additive mask.

    Args:
        q: [B, N, C], projected queries.
        k, v: [B, K, C], projected keys and values.
        heads: number of heads.
        log_size: [B, K], log of how many tokens each key stands for.
        classes: how many keys stand for how many tokens each, where that is known.

    Returns:
        [B, N, C].
    """
    if not is_compiling():
        check_kernel(q.device, q.dtype)
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))  # [B, H, N, d]
    return weighted_attention(q, k, v, log_size, classes).transpose(1, 2).flatten(2)


def weighted_attention(
    query: Tensor, key: Tensor, value: Tensor, log_size: Tensor, classes: SizeClasses | None = None, **more: Any
) -> Tensor:
    """Runs scaled_dot_product_attention with log(n_i) added to the logits of each key: [B, H, N, d].

    Args:
        query: [B, H, N, d].
        key, value: [B, H, K, d].
        log_size: [B, K].
        classes: how many keys stand for how many tokens each, where that is known.
        more: further arguments of scaled_dot_product_attention.
    """
    bias = key_bias(log_size, query.dtype, sdpa=True, classes=classes).unsqueeze(1)
    return attend(query, key, value, bias.expand(-1, query.shape[1], -1, -1), **more)


_uses_masks: list[Any] = [SDPA]  # implementations that are known to use a mask


def check_kernel(device: torch.device, dtype: torch.dtype) -> None:
    """Raises RuntimeError if scaled_dot_product_attention has been replaced by a function that ignores masks.

    Kernels without masks (SageAttention) are installed that way; log(n_i) would be lost silently.
    """
    kernel = F.scaled_dot_product_attention
    if kernel in _uses_masks:
        return
    q, k, v = torch.linspace(-2, 2, 3 * 16 * 64, device=device, dtype=dtype).sin().view(3, 1, 1, 16, 64)
    bias = torch.zeros(1, 1, 1, 16, device=device, dtype=dtype)
    bias[..., 8:] = 5
    try:
        plain, weighted = kernel(q, k, v), kernel(q, k, v, attn_mask=bias)
    except TypeError:
        plain = weighted = v
    if torch.equal(plain, weighted):
        raise RuntimeError(
            f"proportional adds log(n) to the logits as an attention mask, and {kernel.__module__}."
            f"{kernel.__qualname__}, which replaces scaled_dot_product_attention, ignores masks: leave "
            "proportional off, or restore torch's own"
        )
    _uses_masks.append(kernel)


def flash_takes(query: Tensor, dropout_p: float = 0.0, is_causal: bool = False, **more: Any) -> bool:
    """Whether CUDA's flash kernel supports attention of these queries [B, H, N, d] with added channels."""
    if query.device.type != FLASH_DEVICE or query.dtype not in FLASH_TYPES:
        return False
    if query.shape[-1] + EXTRA > FLASH_CHANNELS or dropout_p or is_causal:
        return False
    if is_compiling():  # kernels cannot be queried; correct in any case, and slower without flash
        return True
    enabled = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    return bool(enabled) and torch.cuda.get_device_capability(query.device) >= (8, 0)


def by_mask(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, **more: Any) -> Tensor:
    """Computes softmax(q kᵀ · scale + bias) v: the definition."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), **more)


def by_channel(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None = None, **more: Any
) -> Tensor:
    """Computes the same by two more channels: q' = [q, c, c], k' = [k, b, rest of b]; c · b · scale is the bias.

    c is a power of two, so that only b is rounded. The second channel holds the rounding error, so that in half
    precision this is closer to the definition than a mask. Flash needs as many channels in the values; they are padded
    and cut again.
    """
    channels = query.shape[-1]
    scale = channels**-0.5 if scale is None else scale
    c = 2.0 ** round(-math.log2(scale))
    exact = bias.float().transpose(-1, -2) / (c * scale)  # [B, H, K, 1]
    first = exact.to(key.dtype)
    rest = (exact - first.float()).to(key.dtype)
    weights = F.pad(torch.cat((first, rest), dim=-1).expand(*key.shape[:-1], 2), (0, EXTRA - 2))
    constant = F.pad(query.new_full((2,), c), (0, EXTRA - 2)).expand(*query.shape[:-1], EXTRA)
    out = F.scaled_dot_product_attention(
        torch.cat((query, constant), dim=-1), torch.cat((key, weights), dim=-1), F.pad(value, (0, EXTRA)),
        scale=scale, **more,
    )  # fmt: skip
    return out[..., :channels]
