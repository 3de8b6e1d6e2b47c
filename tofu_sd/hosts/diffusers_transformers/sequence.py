"""Where the image tokens lie among the tokens that a layer gets, and the norm that passes only them to the matching."""

from __future__ import annotations

from torch import Tensor, nn

from ...patching.block_state import BlockState
from ...patching.host import ATTRIBUTE


def image_span(state: BlockState, length: int, joined: bool) -> tuple[int, int] | None:
    """Returns the positions of the first image token and after the last; None where nothing is merged.

    The image comes after the text, and before the tokens of reference images, which are not merged.

    Args:
        state: of the block.
        length: number of tokens of the layer.
        joined: whether they start with the text.

    Raises:
        RuntimeError: there are more or fewer tokens than the image and its references have.
    """
    current = state.current
    if current.grid is None:
        return None
    n = len(current.grid.parts.src) + len(current.grid.parts.dst)
    others = 0 if current.others is None else len(current.others)
    start = length - n - others
    if start < 0 or (start > 0 and not joined):
        raise RuntimeError(
            f"a layer got {length} tokens, and the image has {n} with {others} of reference images: something "
            "(context parallelism?) has changed the sequence; call tofu_sd.remove_patch"
        )
    return start, start + n


class ImageNorm(nn.LayerNorm):
    """A block's first norm, which passes the image tokens of its input to the matching. Overrides __call__ as
    NormForMatching does.
    """

    joined = False

    def __call__(self, hidden_states: Tensor) -> Tensor:
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        if state is not None:
            span = image_span(state, hidden_states.shape[1], self.joined)
            if span is not None:
                state.update_map(hidden_states[:, slice(*span)].contiguous())
        return super().__call__(hidden_states)


class JoinedNorm(ImageNorm):
    """The first norm of a block that gets text and image as one sequence."""

    joined = True
