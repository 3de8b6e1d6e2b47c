"""Where the image tokens lie among the tokens that a layer gets, and the norm that passes only them to the matching."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from ...patching.block_state import BlockState
from ...patching.host import ATTRIBUTE

TextPlace = Literal["apart", "before", "after"]
"""Where the text is in the tokens of a layer: not among them, before the image, or after it."""


def image_span(state: BlockState, length: int, text: TextPlace) -> tuple[int, int] | None:
    """Returns the positions of the first image token and after the last; None where nothing is merged.

    The tokens of reference images follow the image, and are not merged.

    Args:
        state: of the block.
        length: number of tokens of the layer.
        text: where the text is among them.

    Raises:
        RuntimeError: there are more or fewer tokens than the image and its references have.
    """
    current = state.current
    if current.grid is None:
        return None
    n = len(current.grid.parts.src) + len(current.grid.parts.dst)
    others = 0 if current.others is None else len(current.others)
    rest = length - n - others  # of the text
    if rest < 0 or (rest > 0 and text == "apart"):
        raise RuntimeError(
            f"a layer got {length} tokens, and the image has {n} with {others} of reference images: something "
            "(context parallelism?) has changed the sequence; call tofu_sd.remove_patch"
        )
    start = rest if text == "before" else 0
    return start, start + n


class ImageInput(nn.Module):
    """A block's first norm, which passes the image tokens of its input to the matching. Overrides __call__ as
    NormForMatching does.
    """

    text: TextPlace = "apart"

    def __call__(self, hidden_states: Tensor) -> Any:
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        if state is not None:
            span = image_span(state, hidden_states.shape[1], self.text)
            if span is not None:
                state.update_map(hidden_states[:, slice(*span)].contiguous())
        return super().__call__(hidden_states)


class ImageNorm(ImageInput, nn.LayerNorm):
    """The first norm of a block that gets text and image apart."""


class JoinedNorm(ImageInput, nn.LayerNorm):
    """The first norm of a block that gets text and image as one sequence, the text first."""

    text = "before"
