"""The noun everything turns on: which tokens stay, and which of them stands for each of the others.

Glossary, paper letter -> meaning here
    B, N, C   batch, tokens, channels of the hidden states x [B, N, C]
    h, w      the map the tokens are laid out on in raster order: token n = y * w + x, N = h * w
    S, D      number of source and destination tokens, S + D = N
    r         how many source tokens leave (ToFu Alg. 1; `ratio` is r / N)
    K         how many tokens survive, K = N - r
    d         depth at which early reduction gives way to late (ToFu Eq. 7)
    n_i       merging size: how many tokens survivor i stands for (ATM section 3, ToMe for ViTs)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenMap(NamedTuple):
    """Where K survivors of N tokens sit, and the survivor that stands for each token.

    kept: [B, K] long, raster positions of the survivors.
    home: [B, N] long, for every token the index 0..K-1 of its survivor; home[kept[k]] == k.
    """

    kept: Tensor
    home: Tensor

    @property
    def size(self) -> Tensor:
        """Merging size n_i of each survivor, itself included: float32 [B, K]; rows sum to N."""
        ones = torch.ones(self.home.shape, device=self.home.device)
        return torch.zeros(self.kept.shape, device=self.home.device).scatter_add(1, self.home, ones)

    def then(self, later: TokenMap) -> TokenMap:
        """This map followed by a map of its K survivors, as one map of the N tokens."""
        return TokenMap(self.kept.gather(1, later.kept), later.home.gather(1, self.home))


def merge_map(map: TokenMap, h: int, w: int) -> Tensor:
    """A picture of who stands for whom [B, 3, h, w], 0 to 1: a colour for each group, gray for a token alone."""
    size = map.size.gather(1, map.home)  # [B, N] of each token's group
    hue = (map.home * 0.618034) % 1  # golden ratio: neighbours in number are far in colour
    channels = torch.stack([((hue * 6 + shift) % 6 - 3).abs() - 1 for shift in (0, 4, 2)], dim=1).clamp(0, 1)
    colours = 0.25 + 0.75 * channels
    alone = (size == 1).unsqueeze(1)
    return colours.masked_fill(alone, 0.15).view(-1, 3, h, w)
