"""Seeded random weights and inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def lively(model: nn.Module, seed: int) -> Any:
    """Returns the model with random weights of `seed`, large enough that each layer shows in its output, in eval mode.

    Fresh layers mix tokens so weakly that a broken attention would hide below a tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            wide = parameter.ndim > 1
            parameter.copy_(values * (1.2 / parameter[0].numel() ** 0.5) if wide else parameter.round() + 0.1 * values)
    return model.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Returns normal noise of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
