"""Reads height and width of an image from the position ids of its tokens, which rotary models get."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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
_seen: dict[int, tuple[Layout, ...]] = {}  # by id of the model. Compiled code cannot read ids, and takes an earlier one


def read_layout(ids: Tensor, native: int, model: nn.Module) -> Layout:
    """Returns the layout of image tokens.

    Ids are read once for each tensor, as reading synchronizes a device. Compiled code takes the model's last layout
    with as many tokens, or a square of its own size, and asserts that the ids agree.

    Args:
        ids: [M, 3] or [M, 4], (image, row, column, ...) of each token; a batch dimension may come first.
        native: side of the model's own map.
        model: the transformer that gets them.

    Raises:
        ValueError: the first image's tokens are no grid in raster order.
        RuntimeError: compiled code, at a size that is not known.
    """
    if is_compiling():
        return _assumed(ids[0] if ids.ndim == 3 else ids, native, _seen.get(id(model), ()))
    known = _layouts.get(ids)
    if known is None or known[0] != version_of(ids):
        known = version_of(ids), _read(ids[0] if ids.ndim == 3 else ids)
        _layouts[ids] = known
    layout: Layout = known[1]
    _remember(layout, model)
    return layout


def version_of(x: Tensor) -> Any:
    """Returns a value that changes when a tensor is changed in place; inference tensors have a new one at each call."""
    return object() if x.is_inference() else x._version


def _remember(layout: Layout, model: nn.Module) -> None:
    seen = _seen.get(id(model))
    if seen is None:
        weakref.finalize(model, _seen.pop, id(model), None)
    elif seen[0] == layout:
        return
    _seen[id(model)] = (layout, *[other for other in seen or () if other.tokens != layout.tokens][:31])


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


def _assumed(ids: Tensor, native: int, seen: tuple[Layout, ...]) -> Layout:
    tokens = ids.shape[0]
    for layout in (*seen, Layout(native, native, 0)):
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
