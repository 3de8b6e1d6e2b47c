"""The structure of a model, to detect anything that a patch leaves behind."""

from __future__ import annotations

from typing import Any

from torch import nn


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Returns class, attributes and hooks of each module, by name and identity."""

    def describe(module: nn.Module) -> Any:
        inside = {
            k: {n: id(x) for n, x in v.items()} if isinstance(v, dict) else id(v) for k, v in vars(module).items()
        }
        return type(module), inside

    return {name: describe(module) for name, module in model.named_modules()}
