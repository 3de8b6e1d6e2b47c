"""What a model is made of, so that nothing a patch leaves behind goes unseen."""

from __future__ import annotations

from typing import Any

from torch import nn


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Class, attributes and hooks of every module: keys and identities, so that nothing left behind goes unseen."""

    def look(module: nn.Module) -> Any:
        inside = {
            k: {n: id(x) for n, x in v.items()} if isinstance(v, dict) else id(v) for k, v in vars(module).items()
        }
        return type(module), inside

    return {name: look(module) for name, module in model.named_modules()}
