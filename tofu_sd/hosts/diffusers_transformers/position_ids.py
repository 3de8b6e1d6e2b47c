"""Reads height and width of an image from the position ids of its tokens, which rotary models get."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...kernels.operators import is_compiling


class Layout(NamedTuple):
    """Image tokens of a sequence: h x w tokens of the image, then `after` tokens of reference images."""

    h: int
    w: int
    after: int

    @property
    def tokens(self) -> int:
        return self.h * self.w + self.after


_layouts: Any = WeakIdKeyDictionary()  # of each tensor of ids: (its version, its layout). Pipelines keep one per image
_seen: tuple[Layout, ...] = ()  # compiled code cannot read ids, and takes the layout of an earlier call


def read_layout(ids: Tensor, native: int) -> Layout:
    """Returns the layout of image tokens.

    Ids are read once for each tensor, as reading synchronizes a device. Compiled code takes the last layout with as
    many tokens, or a square of the model's own size, and asserts that the ids agree.

    Args:
        ids: [M, 3] or [M, 4], (image, row, column, ...) of each token; a batch dimension may come first.
        native: side of the model's own map.

    Raises:
        ValueError: the first image's tokens are no grid in raster order.
        RuntimeError: compiled code, at a size that is not known.
    """
    if is_compiling():
        return _assumed(ids[0] if ids.ndim == 3 else ids, native)
    version = None if ids.is_inference() else ids._version
    known = _layouts.get(ids)
    if known is None or known[0] != version:
        known = version, _read(ids[0] if ids.ndim == 3 else ids)
        _layouts[ids] = known
        _remember(known[1])
    layout: Layout = known[1]
    return layout


def _remember(layout: Layout) -> None:
    global _seen
    _seen = (layout, *[other for other in _seen if other.tokens != layout.tokens][:31])


def _read(ids: Tensor) -> Layout:
    positions = ids.detach().to("cpu", torch.float64)
    own = positions[:, 0] == positions[0, 0]
    n = int(own.sum())
    rows, columns = (positions[:n, axis] - positions[0, axis] for axis in (1, 2))
    h, w = int(rows.max()) + 1, int(columns.max()) + 1
    layout = Layout(h, w, len(positions) - n)
    if not own[:n].all() or h * w != n or not torch.equal(rows * w + columns, torch.arange(n, dtype=torch.float64)):
        raise ValueError(
            f"the position ids of {n} image tokens are no grid of height x width in raster order (they reach {h} x {w})"
            ": tokens without neighbours cannot be merged; call tofu_sd.remove_patch"
        )
    return layout


def _assumed(ids: Tensor, native: int) -> Layout:
    tokens = ids.shape[0]
    for layout in (*_seen, Layout(native, native, 0)):
        if tokens == layout.tokens:
            n = torch.arange(layout.h * layout.w, device=ids.device)
            rows, columns = (ids[: layout.h * layout.w, axis] - ids[0, axis] for axis in (1, 2))
            fits = (rows == n // layout.w).all() & (columns == n % layout.w).all()
            torch._assert_async(fits, f"the compiled model was made for an image of {layout.h} x {layout.w} tokens")
            return layout
    raise RuntimeError(
        "a compiled model cannot read height and width from its position ids: run it once at this size before "
        "torch.compile, or compile only the blocks, with compile_repeated_blocks()"
    )
