"""Matching within cells of 2 x 2 tokens: pairs, and whole cells. All local: nothing is compared over the map.

The sizes of the groups are known beforehand. If all groups have the same size n, softmax cancels log n, so that
proportional attention needs no bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.operators import is_compiling, operator
from .token_map import TokenMap

PAIRINGS = ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))
"""The three ways to pair four tokens: the first with the second, the third with the fourth."""
PAIR_OF_TOKEN = ((0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0))
"""The pair of each token in each of these."""


class Cells(NamedTuple):
    """The M cells of 2 x 2 tokens of a map, from the top left. No tensor of a map with cells is empty: a compiler would
    treat that as another case.

    Args:
        order: [N], raster positions: cell by cell, each row by row, then the tokens of an odd last row and column.
        corners: [M], raster positions of the top-left tokens.
        columns: [m], whose length is the number of cells in a row.
    """

    order: Tensor
    corners: Tensor
    columns: Tensor

    @property
    def tokens(self) -> Tensor:
        """[M, 4], the tokens of each cell."""
        return self.order[: 4 * len(self.corners)].view(-1, 4)

    @property
    def rest(self) -> Tensor:
        """[R], the tokens of an odd last row and column, which stay alone."""
        return self.order[4 * len(self.corners) :]

    @property
    def adjacent(self) -> Tensor:
        """[P, 4], numbers 0 to 2 M - 1: the pairs of two cells beside each other. A cell has two pairs."""
        return self._pairs()[:, : len(self.columns) // 2 * 2].reshape(-1, 4)

    @property
    def single(self) -> Tensor:
        """[Q, 2], the same of a cell without a neighbour, at the end of a row."""
        return self._pairs()[:, len(self.columns) // 2 * 2 :].reshape(-1, 2)

    def _pairs(self) -> Tensor:
        return _numbers(2 * len(self.corners), self.order).view(-1, len(self.columns), 2)


def make_cells(h: int, w: int, device: torch.device) -> Cells:
    """Divides an h x w map into cells of 2 x 2 tokens."""
    rows, cols = h // 2, w // 2
    y, x = torch.arange(rows, device=device).unsqueeze(1), torch.arange(cols, device=device)
    corner = (2 * y * w + 2 * x).flatten()
    tokens = torch.stack((corner, corner + 1, corner + w, corner + w + 1), dim=1).flatten()
    in_cell = torch.zeros(h * w, dtype=torch.int32, device=device).index_fill(0, tokens, 1)
    rest = in_cell.argsort(stable=True)[: h * w - len(tokens)]
    return Cells(torch.cat((tokens, rest)), corner, x)


def match_pairs(tokens: Tensor, cells: Cells, r: int) -> TokenMap:
    """Merges the r most similar pairs of tokens, each within a cell of 2 x 2.

    In each cell the pairing is the best of the three: the one with the largest sum of cosines. With r = 2 M every cell
    becomes two tokens. With r = 3 M two adjacent cells become two tokens, by pairing the averages of their pairs.

    Args:
        tokens: [B, N, C], compared by cosine, without gradient.
        cells: the M cells of the map.
        r: number of merged tokens: 0 to 2 M, or 3 M.

    Returns:
        The map. Survivors are sorted by the size of their groups, the largest first.
    """
    with torch.no_grad():
        M = len(cells.tokens)
        if r <= 2 * M:
            return _pairs(tokens, cells, r)
        once = _pairs(tokens, cells, 2 * M)
        averages = _average_of_pairs(tokens, once, 2 * M)
        return once.compose(_pairs_of_pairs(averages, cells))


def match_cells(tokens: Tensor, cells: Cells, r: int) -> TokenMap:
    """Merges the r / 3 cells whose tokens are most similar, each of 2 x 2 tokens into one.

    A cell's similarity is the mean of all cosines of its tokens.

    Args:
        tokens: [B, N, C], compared without gradient.
        cells: the M cells of the map.
        r: number of merged tokens, a multiple of 3 up to 3 M.

    Returns:
        The map. Survivors are sorted by the size of their groups, the largest first.
    """
    with torch.no_grad():
        (B, N, _), M, n = tokens.shape, len(cells.tokens), r // 3
        order = _numbers(M, cells.rest).expand(B, -1)
        if n < M:
            mean_cosine = _unit(tokens[:, cells.tokens]).mean(dim=2).square().sum(dim=-1)
            order = _finite(mean_cosine).argsort(dim=1, descending=True, stable=True)
        merged, apart = cells.tokens[order[:, :n]], cells.tokens[order[:, n:]].flatten(1)  # [B, n, 4], [B, 4 (M - n)]
        groups = _numbers(n, order).repeat_interleave(4).expand(B, -1)
        return _map(merged[..., 0], merged.flatten(1), groups, torch.cat((apart, cells.rest.expand(B, -1)), dim=1), N)


class _Paired(NamedTuple):
    """The best pairing of each of M cells.

    Args:
        cosine: [B, 2 M], of each pair.
        first, second: [B, 2 M], positions of its tokens.
        of_token: [B, 4 M], the pair of each token of the cells.
    """

    cosine: Tensor
    first: Tensor
    second: Tensor
    of_token: Tensor


def _pair_up(tokens: Tensor, fours: Tensor) -> _Paired:
    """Pairs four tokens at a time. fours: [M, 4], positions of tokens [B, N, C]."""
    unit = _unit(tokens[:, fours]).unbind(2)
    cosines = [torch.stack([(unit[i] * unit[j]).sum(-1) for i, j in ((a, b), (c, d))], -1) for a, b, c, d in PAIRINGS]
    cosine = _finite(torch.stack(cosines, dim=2))  # [B, M, 3, 2]
    best = cosine.sum(dim=-1).argmax(dim=-1)  # [B, M]
    chosen = cosine.gather(2, best[..., None, None].expand(-1, -1, 1, 2))
    pairing, pair = (torch.tensor(table, device=fours.device)[best] for table in (PAIRINGS, PAIR_OF_TOKEN))
    positions = fours.expand(len(tokens), -1, -1).gather(2, pairing).view(len(tokens), -1, 2)
    of_token = (pair + 2 * _numbers(len(fours), fours).unsqueeze(1)).flatten(1)
    return _Paired(chosen.flatten(1), positions[..., 0], positions[..., 1], of_token)


def _pairs(tokens: Tensor, cells: Cells, r: int) -> TokenMap:
    """Merges the r most similar of the 2 M pairs."""
    paired, pairs = _pair_up(tokens, cells.tokens), 2 * len(cells.tokens)
    members, numbers = (x.expand(len(tokens), -1) for x in (cells.tokens.flatten(), _numbers(pairs, cells.rest)))
    order = numbers if r == pairs else paired.cosine.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(1, order, numbers)
    apart = paired.second.gather(1, order[:, r:])
    alone = torch.cat((apart, cells.rest.expand(len(tokens), -1)), dim=1)
    return _map(paired.first.gather(1, order), members, rank.gather(1, paired.of_token), alone, tokens.shape[1])


def _pairs_of_pairs(averages: Tensor, cells: Cells) -> TokenMap:
    """Pairs the 2 M pairs [B, 2 M, C] of adjacent cells, and the two of each single cell. Tokens of the rest follow."""
    paired, B = _pair_up(averages, cells.adjacent), len(averages)
    adjacent, single, rest = (x.numel() for x in (cells.adjacent, cells.single, cells.rest))
    kept = torch.cat((paired.first, cells.single[:, 0].expand(B, -1)), dim=1)
    members = torch.cat((cells.adjacent.flatten(), cells.single.flatten())).expand(B, -1)
    of_single = (adjacent + _numbers(single, kept)) // 2
    groups = torch.cat((paired.of_token, of_single.expand(B, -1)), dim=1)
    return _map(
        kept, members, groups, (adjacent + single + _numbers(rest, kept)).expand(B, -1), adjacent + single + rest
    )


def _average_of_pairs(tokens: Tensor, map: TokenMap, pairs: int) -> Tensor:
    """Averages the tokens of the first groups of a map, which have two each: [B, pairs, C], at least float32."""
    full = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    sums = full.new_zeros(len(full), map.after[1], full.shape[-1])
    return sums.scatter_add(1, map.group_idx.unsqueeze(-1).expand_as(full), full)[:, :pairs] / 2


def _map(kept: Tensor, members: Tensor, groups: Tensor, alone: Tensor, N: int) -> TokenMap:
    """Returns a map of groups, followed by tokens that stand for themselves.

    Args:
        kept: [B, G], positions of the groups' survivors.
        members: [B, L], positions of the tokens of all groups. One that is in `alone` too is no member after all.
        groups: [B, L], the group of each, 0 to G - 1.
        alone: [B, A], positions of the tokens that stand for themselves.
        N: number of tokens.
    """
    singles = kept.shape[1] + _numbers(alone.shape[1], alone).expand_as(alone)
    group_idx = kept.new_empty(len(kept), N).scatter(1, members, groups).scatter(1, alone, singles)
    return TokenMap(torch.cat((kept, alone), dim=1), group_idx)


def _unit(x: Tensor) -> Tensor:
    """Returns unit vectors [..., C], at least in float32: half precision cannot separate cosines near 1."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _finite(cosine: Tensor) -> Tensor:
    """Tokens that are not finite are similar to none."""
    return cosine.nan_to_num(nan=-1, posinf=-1, neginf=-1)


def _numbers(n: int, like: Tensor) -> Tensor:
    """Returns 0 to n - 1."""
    return torch.arange(n, device=like.device)


def match_in_cells(tokens: Tensor, cells: Cells, r: int, whole: bool) -> TokenMap:
    """Runs `match_cells` if `whole`, else `match_pairs`; compiled, as an operator, so that r enters as a number."""
    if is_compiling():
        return TokenMap(*_match_in_cells(tokens, *cells, r, whole))
    return match_cells(tokens, cells, r) if whole else match_pairs(tokens, cells, r)


def _map_shapes(
    tokens: Tensor, order: Tensor, corners: Tensor, columns: Tensor, r: int, whole: bool
) -> tuple[Tensor, Tensor]:
    B, N = tokens.shape[0], tokens.shape[1]  # len() would make constants of symbols
    return order.new_empty(B, N - r), order.new_empty(B, N)


@operator(
    "tofu_sd::match_in_cells",
    "(Tensor tokens, Tensor order, Tensor corners, Tensor columns, SymInt r, bool whole) -> (Tensor, Tensor)",
    _map_shapes,
)
def _match_in_cells(
    tokens: Tensor, order: Tensor, corners: Tensor, columns: Tensor, r: int, whole: bool
) -> tuple[Tensor, Tensor]:
    map = (match_cells if whole else match_pairs)(tokens, Cells(order, corners, columns), r)
    return map.kept_idx, map.group_idx
