"""Proportional attention without a bias: an attention for each size of group, joined by their log-sum-exp.

log(n) is one number for all groups of n tokens. An attention over these alone needs no bias, so that it can use any
kernel; how much each of the attentions counts follows from the log-sum-exp of its logits. Exact up to rounding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import timing_cache
from ..kernels.operators import is_compiling
from ..timing import device_name, seconds, versions
from ..timing_cache import Timing
from .token_map import SizeClasses

logger = logging.getLogger("tofu_sd")
SDPBackend = getattr(torch._C, "_SDPBackend", None)  # torch.nn.attention, which has it too, came with torch 2.3
ROUNDS = 3


def attend_by_size(
    query: Tensor, key: Tensor, value: Tensor, classes: SizeClasses, scale: float | None = None
) -> Tensor:
    """Computes softmax(q kᵀ · scale + log n) v for keys that are sorted by n.

    Args:
        query: [B, H, N, d].
        key, value: [B, H, K, d].
        classes: how many keys stand for how many tokens each; the counts sum to K.
        scale: of the logits, d ** -0.5 by default.

    Returns:
        [B, H, N, d].
    """
    if len(classes) == 1:  # softmax cancels it
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    counts = [count for count, _ in classes]
    parts = zip(torch.split(key, counts, dim=2), torch.split(value, counts, dim=2), strict=True)
    outputs, weights = zip(*(_with_logsumexp(query, k, v, scale) for k, v in parts), strict=True)
    joined = [weight + math.log(size) for weight, (_, size) in zip(weights, classes, strict=True)]
    return _join(outputs, joined)


def can_attend_by_size(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is an operator for it here. None has a gradient of the log-sum-exp."""
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return query.device.type in ("cpu", "cuda") and not gradient


def is_faster(by_size: Way, other: Way, query: Tensor, key: Tensor, classes: SizeClasses) -> bool:
    """Whether attention by size agrees with another way and is faster. Tried at the first call of a kind.

    Args:
        by_size, other: run attention in each way.
        query: [B, H, N, d].
        key: [B, H, K, d].
        classes: of the keys.
    """
    kind = (query.device, query.dtype, query.shape, key.shape, classes, other.func.__name__)
    if kind not in _faster:
        if query.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # a capture cannot be timed; the calls before it were
        expected = other()
        if not expected.isfinite().all():
            return False  # nothing to compare with; a later call decides
        _faster[kind] = _tried(by_size, other, expected, kind)
    return _faster[kind]


_faster: dict[Any, bool] = {}
Way = partial[Tensor]


def _tried(by_size: Way, other: Way, expected: Tensor, kind: tuple[Any, ...]) -> bool:
    """Whether attention by size gives the same as expected, up to half precision, in less time. Reports it."""
    try:
        difference = (by_size().float() - expected.float()).abs().max()
        if not difference <= 0.02 * expected.float().abs().max():
            logger.warning("attention by size differs from the bias here, and is not used")
            return False
        timing = _timing(by_size, other, kind)
    except Exception as error:  # an operator that is missing: any message of torch or of a driver is the reason
        logger.info(f"attention by size does not run here, and is not used: {error}")
        return False
    logger.info(f"attention by size takes {timing.ratio:.2f} times as long as {other.func.__name__}")
    return timing.pays


def _timing(by_size: Way, other: Way, kind: tuple[Any, ...]) -> Timing:
    device, dtype, query, key, classes, name = kind
    sizes = " and ".join(f"{count} of {size}" for count, size in classes)
    what = f"attention {tuple(query)} to {tuple(key)}, {sizes}, by size or {name}"
    text = f"{device_name(device)}, {versions()}, {dtype}, {what}"
    timing = timing_cache.cache.get(text)
    if timing is None:
        rounds = [(seconds(other, device), seconds(by_size, device)) for _ in range(ROUNDS)]
        timing = Timing(*(min(times) for times in zip(*rounds, strict=True)))
        timing_cache.cache.put(text, timing)
    return timing


def _with_logsumexp(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Returns (attention [B, H, N, d], the log-sum-exp of its logits [B, H, N], float32), by torch's own operators."""
    operators = torch.ops.aten
    if query.device.type == "cpu":
        results = operators._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    elif uses_cudnn(query, key, value, scale=scale):
        results = operators._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)
    else:
        results = operators._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    return results[0], results[1].reshape(query.shape[:3])


def uses_cudnn(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> bool:
    """Whether scaled_dot_product_attention would choose cuDNN's kernel for this call."""
    cudnn = getattr(SDPBackend, "CUDNN_ATTENTION", None)
    if cudnn is None or is_compiling():  # not in this torch; cannot be queried
        return False
    return bool(torch._fused_sdp_choice(query, key, value, mask, scale=scale) == int(cudnn))


def _join(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Returns the mean of outputs [B, H, N, d] by the softmax of their weights [B, H, N]."""
    shares = torch.stack(list(weights)).softmax(dim=0).unsqueeze(-1)
    total = shares[0] * outputs[0]
    for share, output in zip(shares[1:], outputs[1:], strict=True):
        total = torch.addcmul(total, share, output)
    return total.to(outputs[0].dtype)
