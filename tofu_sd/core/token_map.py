"""The nouns everything turns on: which tokens stay, and what stands for each of the others.

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

    kept_idx: Tensor
    group_idx: Tensor

    @property
    def before(self) -> torch.Size:
        """[B, N], of the tokens that are fused."""
        return self.group_idx.shape

    @property
    def after(self) -> torch.Size:
        """[B, K], of what they are fused into."""
        return self.kept_idx.shape

    @property
    def size(self) -> Tensor:
        """Merging size n_i of each survivor, itself included: float32 [B, K]; rows sum to N."""
        one = torch.ones((), device=self.group_idx.device).expand_as(self.group_idx)
        return torch.zeros(self.kept_idx.shape, device=self.group_idx.device).scatter_add(1, self.group_idx, one)

    def compose(self, later: TokenMap) -> TokenMap:
        """This map followed by a map of its K survivors, as one map of the N tokens."""
        return TokenMap(self.kept_idx.gather(1, later.kept_idx), later.group_idx.gather(1, self.group_idx))

    def repeat_for_cfg(self) -> TokenMap:
        """The same map for a batch of two such halves."""
        return TokenMap(self.kept_idx.repeat(2, 1), self.group_idx.repeat(2, 1))

    def argmax_map(self) -> TokenMap:
        """Itself: each token has one home."""
        return self


class SoftMap(NamedTuple):
    """How much of each of N tokens goes into each of K condensed ones, window by window (AdaptiVision Eq. 2).

    weights: [B, T, M, D], a_ik of the M tokens and D centroids of each of T windows, 0 where a row or column only fills
    up a smaller window; the other rows sum to 1.
    tokens: [T, M] long, raster positions of the tokens. place: [N] long, where each token stands in `tokens` laid flat.
    kept: [K] long, raster positions of the centroids. seat: [K] long, where each stands in [T, D] laid flat.
    """

    weights: Tensor
    tokens: Tensor
    place: Tensor
    kept_idx: Tensor
    dst_index: Tensor

    @property
    def before(self) -> torch.Size:
        """[B, N], of the tokens that are condensed."""
        return torch.Size((len(self.weights), len(self.place)))

    @property
    def after(self) -> torch.Size:
        """[B, K], of what they are condensed into."""
        return torch.Size((len(self.weights), len(self.dst_index)))

    @property
    def size(self) -> Tensor:
        """Merging size sum_i a_ik of each condensed token, no whole number: [B, K]; rows sum to N."""
        return self.weights.sum(dim=2).flatten(1)[:, self.dst_index]

    def repeat_for_cfg(self) -> SoftMap:
        """The same map for a batch of two such halves."""
        return self._replace(weights=self.weights.repeat(2, 1, 1, 1))

    def argmax_map(self) -> TokenMap:
        """Every token wholly to the centroid that has most of it, a centroid's own token to itself."""
        (B, T, _, D), K = self.weights.shape, len(self.dst_index)
        n = torch.arange(K, device=self.dst_index.device)
        number = n.new_zeros(T * D).index_copy(0, self.dst_index, n).view(T, 1, D)  # of each centroid among all
        nearest_dst = self.weights.argmax(dim=-1, keepdim=True)  # [B, T, M, 1]
        group_idx = number.expand(B, T, self.weights.shape[2], D).gather(-1, nearest_dst).flatten(1)[:, self.place]
        return TokenMap(self.kept_idx.expand(B, -1), group_idx.index_copy(1, self.kept_idx, n.expand(B, -1)))


def draw_merge_map(map: TokenMap, h: int, w: int) -> Tensor:
    """A picture of who stands for whom [B, 3, h, w], 0 to 1: a colour for each group, gray for a token alone."""
    size = map.size.gather(1, map.group_idx)  # [B, N] of each token's group
    hue = (map.group_idx * 0.618034) % 1  # golden ratio: neighbours in number are far in colour
    channels = torch.stack([((hue * 6 + shift) % 6 - 3).abs() - 1 for shift in (0, 4, 2)], dim=1).clamp(0, 1)
    colours = 0.25 + 0.75 * channels
    alone = (size == 1).unsqueeze(1)
    return colours.masked_fill(alone, 0.15).view(-1, 3, h, w)
