"""Divides the tokens of a map into sources and destinations, over the whole map or within windows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Partition(NamedTuple):
    """Raster positions of the source tokens [S], in raster order, and of the destination tokens [D], cell by cell."""

    src: Tensor
    dst: Tensor


def partition(h: int, w: int, sx: int, sy: int, device: torch.device, draw: Tensor | None = None) -> Partition:
    """One destination in every sx × sy cell of an h × w map; all other tokens are sources (Alg. 1, line 4).

    Cells are laid from the top left; rows and columns left over at the far edges hold sources alone. A side shorter
    than its cell makes one cell of what there is, so that there is always a destination.

    draw: None takes each cell's top-left token; an integer tensor (any shape, one value) draws each cell's destination
    anew from that value, by arithmetic alone, so that it costs no synchronisation and compiles.
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
    taken = torch.zeros(h * w, dtype=torch.int32, device=device).index_fill(0, dst, 1)
    return Partition(taken.argsort(stable=True)[: h * w - rows * cols], dst)


class Windows(NamedTuple):
    """The same tokens laid out by windows of the map, each with its own destinations.

    src [T, S'] and dst [T, D']: raster positions, rows filled up with their first. slot [S]: where each source of the
    partition stands in `src`, laid flat; seat [D]: where each destination stands in `dst`.
    """

    src: Tensor
    dst: Tensor
    src_index: Tensor
    dst_index: Tensor


def windows(parts: Partition, h: int, w: int, sx: int, sy: int, side: int) -> Windows:
    """Squares of side × side cells from the top left; smaller at the far edges, whose leftover sources they take.

    The sources may be all tokens, destinations included.
    """
    rows, cols = max(1, h // sy), max(1, w // sx)
    down, across = -(-rows // side), -(-cols // side)
    n = torch.arange(h * w, device=parts.src.device)
    y, x = ((n // w) // sy).clamp_max(rows - 1) // side, ((n % w) // sx).clamp_max(cols - 1) // side
    window = y * across + x  # [N]
    # (tokens, cells) along a side of a window in the middle, where there is one, and of the last
    heights = [(side * sy, side)] * (down > 1) + [(h - (down - 1) * side * sy, rows - (down - 1) * side)]
    widths = [(side * sx, side)] * (across > 1) + [(w - (across - 1) * side * sx, cols - (across - 1) * side)]
    apart = len(parts.src) < h * w
    most = max(tall * wide - a * b * apart for tall, a in heights for wide, b in widths)
    src, src_index = _by_window(parts.src, window, down * across, most)
    dst, dst_index = _by_window(parts.dst, window, down * across, min(side, rows) * min(side, cols))
    return Windows(src, dst, src_index, dst_index)


def _by_window(tokens: Tensor, window: Tensor, T: int, most: int) -> tuple[Tensor, Tensor]:
    """The tokens [M] in rows [T, most] by their window, and where each of them stands there, laid flat: [M]."""
    order = window[tokens].argsort(stable=True)
    own = window[tokens][order]
    first = torch.searchsorted(own, torch.arange(T, device=tokens.device))  # [T] where each window begins
    src_index = own * most + torch.arange(len(order), device=tokens.device) - first[own]
    rows = tokens.new_full((T * most,), -1).index_copy(0, src_index, tokens[order]).view(T, most)
    return rows.where(rows >= 0, rows[:, :1]), torch.empty_like(src_index).index_copy(0, order, src_index)


def _hash(value: Tensor) -> Tensor:
    """A well-mixed 32-bit number of each integer, held in int64: two rounds of xor-shift and multiply."""
    value = value & 0xFFFFFFFF
    for _ in range(2):
        value = (((value >> 16) ^ value) * 0x45D9F3B) & 0xFFFFFFFF  # the product stays below 2**59
    return (value >> 16) ^ value


class PartitionTensors(NamedTuple):
    """What a block may know of its map, in tensors alone: a compiler would take an int for a constant.

    parts: sources and destinations. num_merged: [r], only its length counts: how many tokens to merge. windows: in
    which destinations a source looks, None for the whole map.
    """

    parts: Partition
    num_merged: Tensor
    windows: Windows | None
