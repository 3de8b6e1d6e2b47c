"""Keeps the arguments of each scaled_dot_product_attention that runs."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from tofu_sd.core.proportional import SDPA


class SDPACalls(TorchFunctionMode):
    """Inside, the arguments of each scaled_dot_product_attention are appended to `seen`, as a kernel gets them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is SDPA and hasattr(named.get("attn_mask"), "call"):  # a mask that runs another call instead
            with self:
                return named.pop("attn_mask").call(*args, **named)
        if func is SDPA:
            names = ("query", "key", "value", "attn_mask")
            self.seen.append({**dict(zip(names, args, strict=False)), **named})
        return func(*args, **named)
