"""Proportional attention: adds log(n_i) to the logit of a key that stands for n_i tokens, in the fastest way.

With a bias on the keys, CUDA's scaled-dot-product attention cannot use its flash kernel. Flash can add the same number
as one more channel: log(n_i) in the keys, a constant in the queries. On a CPU, and where cuDNN's kernel takes a bias,
the bias is faster. Compiled code cannot query kernels, and uses the channel.

Hosts pass the bias to `scaled_dot_product_attention` as a mask. A mask of type `KeyBias` intercepts that call, as
`torch.nn.attention.bias.CausalBias` does.
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
SDPA = torch._C._nn.scaled_dot_product_attention  # torch's own, even if torch.nn.functional has a replacement
FLASH_DEVICE, FLASH_TYPES = "cuda", (torch.float16, torch.bfloat16)
FLASH_CHANNELS = 256  # of a head, at most
EXTRA = 8  # channels more: flash takes multiples of 8


class KeyBias(Tensor):
    """A mask [..., K] that is the same for every query; `attend` adds it in scaled_dot_product_attention."""

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
    """Returns log(n_i) as an additive attention mask [B, 1, K].

    Args:
        size: [B, K], merging sizes n_i.
        dtype: of the tokens.
        sdpa: whether scaled_dot_product_attention will use it. Then, if flash is available, it is a KeyBias in float32,
            for the precision of `by_channel`.
    """
    bias = size.log().unsqueeze(1)
    if sdpa and bias.device.type == FLASH_DEVICE and dtype in FLASH_TYPES:
        return bias.as_subclass(KeyBias)
    return bias.to(dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **more: Any) -> Tensor:
    """Runs scaled_dot_product_attention with a mask [B, H, 1, K] that is the same for every query, the faster way."""
    if flash_takes(query, **more):
        mask = attn_mask.to(query.dtype)
        if not cudnn_takes(query, key, value, mask, **more):
            return by_channel(query, key, value, attn_mask, **more)
        attn_mask = mask
    return by_mask(query, key, value, attn_mask, **more)


def proportional_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, size: Tensor) -> Tensor:
    """Runs proportional attention, for hosts whose own attention has no additive mask.

    Args:
        q: [B, N, C], projected queries.
        k, v: [B, K, C], projected keys and values.
        heads: number of heads.
        size: [B, K], how many tokens each key stands for.

    Returns:
        [B, N, C].
    """
    if not is_compiling():
        check_kernel(q.device, q.dtype)
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))  # [B, H, N, d]
    bias = size.log()[:, None, None].expand(-1, heads, -1, -1)  # [B, H, 1, K], float32
    return attend(q, k, v, bias).transpose(1, 2).flatten(2)


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


def cudnn_takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None, **_: Any) -> bool:
    """Whether scaled_dot_product_attention would choose cuDNN's kernel for this call with its mask."""
    cudnn = getattr(SDPBackend, "CUDNN_ATTENTION", None)
    if cudnn is None or is_compiling():  # not in this torch; cannot be queried
        return False
    return bool(torch._fused_sdp_choice(query, key, value, mask, scale=scale) == int(cudnn))


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
