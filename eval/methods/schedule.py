"""Timesteps for models that run without a scheduler."""

from __future__ import annotations

import torch
from torch import Tensor


def timesteps(n: int) -> Tensor:
    """Timesteps of n steps one after the other."""
    return torch.arange(500, 500 - n, -1)
