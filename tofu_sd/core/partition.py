"""Divides the tokens of a map into sources and destinations, over the whole map or within windows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Cells


class Partition(NamedTuple):
    """Raster positions of the source tokens [S], in raster order, and of the destination tokens [D], cell by cell."""

    src: Tensor
    dst: Tensor


def partition(h: int, w: int, sx: int, sy: int, device: torch.device, draw: Tensor | None = None) -> Partition:
    """Chooses one destination in every sx × sy cell of an h × w map; all others are sources (ToFu Alg. 1, line 4).

    Cells start at the top left; remaining rows and columns at the far edges hold only sources. A map smaller than a
    cell is one cell, so that there is always a destination.

    Args:
        h, w: of the map.
        sx, sy: width and height of a cell.
        device: of the result.
        draw: None takes each cell's top-left token. An integer tensor of one value draws each cell's destination as a
            hash of that value, without synchronization and in compiled code.
    """
    rows, cols = max(1, h // sy), max(1, w // sx)
    y = (torch.arange(rows, device=device) * sy).unsqueeze(1)
    x = (torch.arange(cols, device=device) * sx).unsqueeze(0)
    if draw is not None:
        cell = torch.arange(rows * cols, device=device).view(rows, cols)
        chance = _hash(cell + 0x9E3779B9 * (draw.flatten()[0].to(device).long() & 0xFFFFFFFF))
        y = y + chance % min(sy, h)
        x = x + (chance >> 16) % min(sx, w)
    dst = (y * w + x).flatten()
    is_dst = torch.zeros(h * w, dtype=torch.int32, device=device).index_fill(0, dst, 1)
    return Partition(is_dst.argsort(stable=True)[: h * w - rows * cols], dst)


class Windows(NamedTuple):
    """Sources and destinations of each window of a map.

    Args:
        src: [T, S'], raster positions of the sources of each window; short rows are padded with their first value.
        dst: [T, D'], the same of the destinations.
        src_index: [S], index of each source of the partition in the flattened `src`.
        dst_index: [D], index of each destination in the flattened `dst`.
    """

    src: Tensor
    dst: Tensor
    src_index: Tensor
    dst_index: Tensor


def windows(parts: Partition, h: int, w: int, sx: int, sy: int, side: int) -> Windows:
    """Divides a map into windows of side × side cells, from the top left; they are smaller at the far edges.

    Remaining sources at the far edges belong to the last windows.

    Args:
        parts: sources and destinations. The sources may be all tokens, destinations included.
        h, w: of the map.
        sx, sy: width and height of a cell.
        side: of a window, in cells.
    """
    rows, cols = max(1, h // sy), max(1, w // sx)
    down, across = -(-rows // side), -(-cols // side)
    n = torch.arange(h * w, device=parts.src.device)
    y, x = ((n // w) // sy).clamp_max(rows - 1) // side, ((n % w) // sx).clamp_max(cols - 1) // side
    window = y * across + x  # [N]
    # (tokens, cells) along a side of an inner window, if there is one, and of the last
    heights = [(side * sy, side)] * (down > 1) + [(h - (down - 1) * side * sy, rows - (down - 1) * side)]
    widths = [(side * sx, side)] * (across > 1) + [(w - (across - 1) * side * sx, cols - (across - 1) * side)]
    excludes_dst = len(parts.src) < h * w
    most = max(tall * wide - a * b * excludes_dst for tall, a in heights for wide, b in widths)
    src, src_index = _by_window(parts.src, window, down * across, most)
    dst, dst_index = _by_window(parts.dst, window, down * across, min(side, rows) * min(side, cols))
    return Windows(src, dst, src_index, dst_index)


def _by_window(tokens: Tensor, window: Tensor, T: int, most: int) -> tuple[Tensor, Tensor]:
    """Returns the tokens [M] in rows [T, most] by window, and the index of each in the flattened rows: [M]."""
    order = window[tokens].argsort(stable=True)
    own = window[tokens][order]
    first = torch.searchsorted(own, torch.arange(T, device=tokens.device))  # [T], start of each window
    src_index = own * most + torch.arange(len(order), device=tokens.device) - first[own]
    rows = tokens.new_full((T * most,), -1).index_copy(0, src_index, tokens[order]).view(T, most)
    return rows.where(rows >= 0, rows[:, :1]), torch.empty_like(src_index).index_copy(0, order, src_index)


def _hash(value: Tensor) -> Tensor:
    """Returns a 32-bit hash of each integer, in int64: two rounds of xor-shift and multiply."""
    value = value & 0xFFFFFFFF
    for _ in range(2):
        value = (((value >> 16) ^ value) * 0x45D9F3B) & 0xFFFFFFFF  # the product stays below 2**59
    return (value >> 16) ^ value


class PartitionTensors(NamedTuple):
    """The grid of a map. It holds only tensors, as a compiler would treat integers as constants.

    Args:
        parts: sources and destinations.
        num_merged: [r]; its length is the number of tokens to merge.
        windows: the windows within which sources are compared; None for the whole map.
        cells: the 2 x 2 cells of the map, for matchers that stay within them; None for others.
    """

    parts: Partition
    num_merged: Tensor
    windows: Windows | None
    cells: Cells | None = None

    @property
    def indices(self) -> tuple[Tensor, ...]:
        """All tensors of positions."""
        return (*self.parts, *(self.windows or ()), *(self.cells or ()))
