"""Which attention processors of diffusion transformers work on merged tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

_PLACE = "diffusers."


def check_processor(attention: nn.Module, known: Collection[str]) -> None:
    """Raises RuntimeError for a processor that is not known to run on merged tokens, or that runs elsewhere.

    Args:
        attention: has the processor.
        known: names of the classes of diffusers that do.
    """
    processor: Any = attention.processor
    kind = type(processor)
    if not kind.__module__.startswith(_PLACE) or kind.__name__ not in known:
        raise RuntimeError(
            f"{kind.__module__}.{kind.__qualname__} is not known to run on merged tokens: set one of "
            f"{', '.join(known)} of diffusers, or call tofu_sd.remove_patch"
        )
