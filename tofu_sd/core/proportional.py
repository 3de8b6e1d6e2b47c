"""Proportional attention by the fastest way a device has: log(n_i) on the logit of a key that stands for n_i tokens.

A bias on the keys costs CUDA's scaled-dot-product attention its flash kernel. The same number adds to the logits as one
more channel, log(n_i) in the keys and constant in the queries, which flash takes. On a CPU, and where there is cuDNN's
kernel, which takes a bias, the bias is faster. Compiled code cannot ask for kernels, and takes the channel.

Hosts pass a bias to `scaled_dot_product_attention` as a mask, and know of nothing else. So a mask that is a `KeyBias`
takes that call over, as `torch.nn.attention.bias.CausalBias` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.operators import is_compiling

SDPBackend = getattr(torch._C, "_SDPBackend", None)  # torch.nn.attention, which has it too, came with torch 2.3
SDPA = torch._C._nn.scaled_dot_product_attention  # torch's own, whatever has taken its place in torch.nn.functional
FLASH_DEVICE, FLASH_TYPES = "cuda", (torch.float16, torch.bfloat16)
FLASH_CHANNELS = 256  # of a head, at most
EXTRA = 8  # channels more: flash takes multiples of 8


class KeyBias(Tensor):
    """A mask [..., K] that is the same for every query, and that `attend` adds in scaled_dot_product_attention."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is SDPA:
                return attend(*args, **(kwargs or {}))
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if func in _SHAPING else result


_SHAPING = (Tensor.view, Tensor.reshape, Tensor.unsqueeze, Tensor.expand, Tensor.repeat_interleave)


def key_bias(size: Tensor, dtype: torch.dtype, sdpa: bool) -> Tensor:
    """log(n_i) of merging sizes [B, K] as an additive mask [B, 1, K] for attention of tokens of type `dtype`.

    sdpa: whether it will be scaled_dot_product_attention that takes it. Then, where there is flash, it is a KeyBias in
    float32, of which `by_channel` loses little.
    """
    bias = size.log().unsqueeze(1)
    if sdpa and bias.device.type == FLASH_DEVICE and dtype in FLASH_TYPES:
        return bias.as_subclass(KeyBias)
    return bias.to(dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **more: Any) -> Tensor:
    """scaled_dot_product_attention with a mask [B, H, 1, K] that is the same for every query, by the faster way."""
    if flash_takes(query, **more):
        mask = attn_mask.to(query.dtype)
        if not cudnn_takes(query, key, value, mask, **more):
            return by_channel(query, key, value, attn_mask, **more)
        attn_mask = mask
    return by_mask(query, key, value, attn_mask, **more)


def proportional_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, size: Tensor) -> Tensor:
    """Attention of projected q [B, N, C] to k, v [B, K, C], whose keys stand for `size` [B, K] tokens each: [B, N, C].

    For hosts whose own attention has no place for weights.
    """
    if not is_compiling():
        check_kernel(q.device, q.dtype)
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))  # [B, H, N, d]
    bias = size.log()[:, None, None].expand(-1, heads, -1, -1)  # [B, H, 1, K], float32
    return attend(q, k, v, bias).transpose(1, 2).flatten(2)


_heeding: list[Any] = [SDPA]  # functions in torch's place that are known to heed a mask


def check_kernel(device: torch.device, dtype: torch.dtype) -> None:
    """RuntimeError where another function has taken scaled_dot_product_attention's place that ignores masks.

    Kernels without masks (SageAttention) are put there so; log(n_i) would be lost without a word.
    """
    kernel = F.scaled_dot_product_attention
    if kernel in _heeding:
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
            f"{kernel.__qualname__}, which has taken scaled_dot_product_attention's place, ignores masks: leave "
            "proportional off, or put torch's own back"
        )
    _heeding.append(kernel)


def flash_takes(query: Tensor, dropout_p: float = 0.0, is_causal: bool = False, **more: Any) -> bool:
    """Whether CUDA's flash kernel takes attention of these queries [B, H, N, d], with channels added to them."""
    if query.device.type != FLASH_DEVICE or query.dtype not in FLASH_TYPES:
        return False
    if query.shape[-1] + EXTRA > FLASH_CHANNELS or dropout_p or is_causal:
        return False
    if is_compiling():  # cannot ask; right in any case, and slower where there is no flash
        return True
    enabled = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    return bool(enabled) and torch.cuda.get_device_capability(query.device) >= (8, 0)


def cudnn_takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None, **_: Any) -> bool:
    """Whether scaled_dot_product_attention gives this, mask and all, to cuDNN, of all kernels that torch has here."""
    cudnn = getattr(SDPBackend, "CUDNN_ATTENTION", None)
    if cudnn is None or is_compiling():  # has none; cannot ask
        return False
    return bool(torch._fused_sdp_choice(query, key, value, mask, scale=scale) == int(cudnn))


def by_mask(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, **more: Any) -> Tensor:
    """softmax(q kᵀ · scale + bias) v: the definition."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), **more)


def by_channel(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None = None, **more: Any
) -> Tensor:
    """The same as two more channels: q' = [q, c, c], k' = [k, b, rest of b], where c · b · scale is the bias.

    c is a power of two, so that b is rounded and nothing else; the second channel holds what the rounding left, so that
    in half precision this is nearer to the definition than a mask. Values are filled up to as many channels, as flash
    wants it, and cut again.
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
