"""A block's first norm, the same in every host: what it is given is what the paper's matching compares."""

from __future__ import annotations

from torch import Tensor, nn

from ..patching.block_info import ATTRIBUTE
from ..patching.block_state import BlockState


class FusedNorm(nn.LayerNorm):
    """A block's first norm that shows its input, the block's hidden states, to the matching.

    It overrides __call__ and not forward: offloading and layerwise casting set `forward` on the instance, which would
    hide an override of the class.
    """

    def __call__(self, hidden_states: Tensor) -> Tensor:
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        if state is not None:
            # tokens lie channel by channel here; the norm makes this copy in any case, and rows are read from it faster
            hidden_states = hidden_states.contiguous()
            state.update_map(hidden_states)
        return super().__call__(hidden_states)


def refuse_wrapped(where: str) -> None:
    """RuntimeError for a layer whose `forward` something else has set."""
    raise RuntimeError(
        f"{where} has a `forward` of its own, set by something else (a cache, an attention hook): fusion would be "
        "passed over silently; apply tofu_sd first, then the other"
    )
