"""Models inside the wrappers of torch and PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """Returns the model inside the wrappers of torch.compile, DistributedDataParallel, DataParallel and PEFT."""
    while isinstance(model, nn.Module):
        inner: Any = getattr(model, "_orig_mod", None)
        base = getattr(model, "get_base_model", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif hasattr(model, "peft_config") and callable(base):
            inner = base()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner
    return model
