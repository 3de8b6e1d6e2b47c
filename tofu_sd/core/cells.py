"""Matching within cells of 2 x 2 tokens: pairs, and whole cells. All local: nothing is compared over the map.

The sizes of the groups are known beforehand. If all groups have the same size n, softmax cancels log n, so that
proportional attention needs no bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import map_of_groups, map_shapes, pair_up, with_groups
from ..kernels.operators import is_compiling, operator
from .token_map import TokenMap


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
        cosine, pairs = pair_up(tokens, cells.tokens)
        once = TokenMap(*map_of_groups(cosine, pairs, min(r, 2 * M), cells.rest))
        if r <= 2 * M:
            return once
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
        members = cells.tokens.expand(len(tokens), -1, -1)
        if r == cells.tokens.numel() // 4 * 3:  # all of them
            similarity = tokens.new_zeros(len(tokens), len(cells.tokens), dtype=torch.float32)
        else:
            unit = tokens[:, cells.tokens].to(torch.promote_types(tokens.dtype, torch.float32))
            unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min(torch.finfo(unit.dtype).tiny)
            mean_cosine = unit.mean(dim=2).square().sum(dim=-1)
            similarity = mean_cosine.nan_to_num(nan=-1, posinf=-1, neginf=-1)  # not finite: similar to none
        return TokenMap(*map_of_groups(similarity, members, r // 3, cells.rest))


def _pairs_of_pairs(averages: Tensor, cells: Cells) -> TokenMap:
    """Pairs the 2 M pairs [B, 2 M, C] of adjacent cells, and the two of each single cell. Tokens of the rest follow."""
    _, adjacent = pair_up(averages, cells.adjacent)
    members = torch.cat((adjacent, cells.single.expand(len(averages), -1, -1)), dim=1)
    pairs = members.shape[1]
    similarity = averages.new_zeros(members.shape[:2])
    return TokenMap(*map_of_groups(similarity, members, pairs, 2 * pairs + _numbers(len(cells.rest), cells.rest)))


def _average_of_pairs(tokens: Tensor, map: TokenMap, pairs: int) -> Tensor:
    """Averages the tokens of the first groups of a map, which have two each: [B, pairs, C], at least float32."""
    full = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    sums = full.new_zeros(len(full), map.after[1], full.shape[-1])
    return sums.scatter_add(1, map.group_idx.unsqueeze(-1).expand_as(full), full)[:, :pairs] / 2


def _numbers(n: int, like: Tensor) -> Tensor:
    """Returns 0 to n - 1."""
    return torch.arange(n, device=like.device)


def match_in_cells(tokens: Tensor, cells: Cells, r: int, whole: bool) -> TokenMap:
    """Runs `match_cells` if `whole`, else `match_pairs`; compiled, as an operator, so that r enters as a number."""
    if is_compiling():
        return TokenMap.of_tensors(*_match_in_cells(tokens, *cells, r, whole))
    return match_cells(tokens, cells, r) if whole else match_pairs(tokens, cells, r)


def _map_shapes(tokens: Tensor, order: Tensor, corners: Tensor, columns: Tensor, r: int, whole: bool) -> list[Tensor]:
    return map_shapes(order, tokens.shape[0], tokens.shape[1], r)  # len() would make constants of symbols


@operator(
    "tofu_sd::match_in_cells",
    "(Tensor tokens, Tensor order, Tensor corners, Tensor columns, SymInt r, bool whole) -> Tensor[]",
    _map_shapes,
)
def _match_in_cells(
    tokens: Tensor, order: Tensor, corners: Tensor, columns: Tensor, r: int, whole: bool
) -> list[Tensor]:
    map = (match_cells if whole else match_pairs)(tokens, Cells(order, corners, columns), r)
    return with_groups(*map.tensors)
