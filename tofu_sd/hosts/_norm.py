"""A block's first norm, the same in every host: its input is what the paper's matching compares."""

from __future__ import annotations

from torch import Tensor, nn

from ..patching.block_state import BlockState
from ..patching.host import ATTRIBUTE, has_forward_of


class NormForMatching(nn.LayerNorm):
    """A block's first norm, which passes its input, the block's hidden states, to the matching.

    It overrides __call__ instead of forward: offloading and layerwise casting set `forward` on the instance, which
    would hide an override in the class.
    """

    def __call__(self, hidden_states: Tensor) -> Tensor:
        state: BlockState | None = getattr(self, ATTRIBUTE, None)
        if state is not None:
            # channels come first in memory here; the norm copies anyway, and rows of the copy are read faster
            hidden_states = hidden_states.contiguous()
            state.update_map(hidden_states)
        return super().__call__(hidden_states)


def check_forward(layer: nn.Module, name: str, merged: type[nn.Module]) -> None:
    """Raises RuntimeError for a layer whose `forward` something else has set.

    A hook that was removed may leave the class's own `forward` on the layer, which changes nothing: `attach` drops it.

    Args:
        layer: what is patched.
        name: of the layer, for the message.
        merged: the class that will replace its class.
    """
    if "forward" not in vars(layer) or has_forward_of(layer, type(layer), merged):
        return
    raise RuntimeError(
        f"{name} has a `forward` of its own, set by something else (a cache, an attention hook), which would "
        "bypass token fusion silently; apply tofu_sd first, then the other"
    )
