"""TokenMap and SoftMap: which tokens survive, and which survivor stands for each of the others.

Letters of the papers
    B, N, C   batch, tokens, channels of the hidden states x [B, N, C]
    h, w      the map the tokens are laid out on in raster order: token n = y * w + x, N = h * w
    S, D      number of source and destination tokens, S + D = N
    r         number of merged tokens (ToFu Alg. 1; `ratio` is r / N)
    K         number of survivors, K = N - r
    d         depth from which the late reduction is used (ToFu Eq. 7)
    n_i       merging size: how many tokens survivor i stands for (ATM section 3, ToMe for ViTs)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import Groups

SizeClasses = tuple[tuple[int, int], ...]
"""((count, size), ...): the first `count` survivors stand for `size` tokens each, and so on."""


class TokenMap(NamedTuple):
    """K survivors of N tokens, and the survivor that stands for each token.

    Args:
        kept_idx: [B, K] long, raster positions of the survivors.
        group_idx: [B, N] long, for every token the index 0..K-1 of its survivor; group_idx[kept_idx[k]] == k.
        groups: the tokens of each survivor, where a kernel listed them; other kernels then need not.
    """

    kept_idx: Tensor
    group_idx: Tensor
    groups: Groups | None = None

    @property
    def before(self) -> torch.Size:
        """[B, N], of the tokens before merging."""
        return self.group_idx.shape

    @property
    def after(self) -> torch.Size:
        """[B, K], of the survivors."""
        return self.kept_idx.shape

    @property
    def size(self) -> Tensor:
        """Merging size n_i of each survivor, itself included: float32 [B, K]; rows sum to N."""
        one = torch.ones((), device=self.group_idx.device).expand_as(self.group_idx)
        return torch.zeros(self.kept_idx.shape, device=self.group_idx.device).scatter_add(1, self.group_idx, one)

    @property
    def log_size(self) -> Tensor:
        """Returns log(n_i) of each survivor: float32 [B, K]."""
        return self.size.log() if self.groups is None else self.groups.log_size

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the map; `of_tensors` is its inverse."""
        return [self.kept_idx, self.group_idx, *(self.groups or ())]

    @staticmethod
    def of_tensors(kept_idx: Tensor, group_idx: Tensor, *groups: Tensor) -> TokenMap:
        """Returns the map of these tensors."""
        return TokenMap(kept_idx, group_idx, Groups(*groups) if groups else None)

    def compose(self, later: TokenMap) -> TokenMap:
        """Returns this map followed by a map of its K survivors, as one map of the N tokens."""
        return TokenMap(self.kept_idx.gather(1, later.kept_idx), later.group_idx.gather(1, self.group_idx))

    def repeat_for_cfg(self) -> TokenMap:
        """Returns the map of a batch that repeats the samples."""
        return TokenMap.of_tensors(*(tensor.repeat(2, 1) for tensor in self.tensors))

    def argmax_map(self) -> TokenMap:
        """Returns itself: each token has one survivor."""
        return self


class SoftMap(NamedTuple):
    """The share of each of N tokens in each of K clusters, within windows (AdaptiVision Eq. 2).

    Args:
        weights: [B, T, M, D], a_ik of the M tokens and D centroids of each of T windows. Padding of smaller windows is
            0; all other rows sum to 1.
        tokens: [T, M] long, raster positions of the tokens.
        src_index: [N] long, index of each token in the flattened `tokens`.
        kept_idx: [K] long, raster positions of the centroids.
        dst_index: [K] long, index of each centroid in the flattened [T, D].
    """

    weights: Tensor
    tokens: Tensor
    src_index: Tensor
    kept_idx: Tensor
    dst_index: Tensor

    @property
    def before(self) -> torch.Size:
        """[B, N], of the tokens."""
        return torch.Size((len(self.weights), len(self.src_index)))

    @property
    def after(self) -> torch.Size:
        """[B, K], of the clusters."""
        return torch.Size((len(self.weights), len(self.dst_index)))

    @property
    def size(self) -> Tensor:
        """Size sum_i a_ik of each cluster, not an integer: [B, K]; rows sum to N."""
        return self.weights.sum(dim=2).flatten(1)[:, self.dst_index]

    @property
    def log_size(self) -> Tensor:
        """The logarithm of each cluster's size: [B, K]."""
        return self.size.log()

    def repeat_for_cfg(self) -> SoftMap:
        """Returns the map of a batch that repeats the samples."""
        return self._replace(weights=self.weights.repeat(2, 1, 1, 1))

    def argmax_map(self) -> TokenMap:
        """Assigns every token to the centroid with its largest share, and a centroid's own token to itself."""
        (B, T, _, D), K = self.weights.shape, len(self.dst_index)
        n = torch.arange(K, device=self.dst_index.device)
        cluster = n.new_zeros(T * D).index_copy(0, self.dst_index, n).view(T, 1, D)  # index of each centroid
        nearest = self.weights.argmax(dim=-1, keepdim=True)  # [B, T, M, 1]
        group_idx = cluster.expand(B, T, self.weights.shape[2], D).gather(-1, nearest).flatten(1)[:, self.src_index]
        return TokenMap(self.kept_idx.expand(B, -1), group_idx.index_copy(1, self.kept_idx, n.expand(B, -1)))


def has_equal_groups(map: TokenMap | SoftMap, size: int | None) -> bool:
    """Whether all survivors stand for `size` tokens each, given that none stands for more; False for None."""
    return size is not None and map.before[1] == size * map.after[1]


def size_classes(map: TokenMap | SoftMap, size: int) -> SizeClasses:
    """Returns the classes of a map whose first survivors stand for `size` tokens each, and the rest for themselves.

    Args:
        map: of N tokens to K survivors.
        size: of every group that has more than one token.
    """
    survivors = map.after[1]
    groups = (map.before[1] - survivors) // (size - 1)
    return tuple(each for each in ((groups, size), (survivors - groups, 1)) if each[0])


def draw_merge_map(map: TokenMap, h: int, w: int) -> Tensor:
    """Draws a map as images [B, 3, h, w] in 0..1: a colour for each group, dark gray for a token that is alone."""
    size = map.size.gather(1, map.group_idx)  # [B, N] of each token's group
    hue = (map.group_idx * 0.618034) % 1  # golden ratio: successive groups differ in colour
    channels = torch.stack([((hue * 6 + shift) % 6 - 3).abs() - 1 for shift in (0, 4, 2)], dim=1).clamp(0, 1)
    colours = 0.25 + 0.75 * channels
    alone = (size == 1).unsqueeze(1)
    return colours.masked_fill(alone, 0.15).view(-1, 3, h, w)
