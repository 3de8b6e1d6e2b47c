"""Which attention processors of diffusion transformers work on merged tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

_PLACE = "diffusers."
_NATIVE = "native"  # the backend that calls torch's scaled_dot_product_attention


def check_processor(attention: nn.Module, known: Collection[str]) -> None:
    """Raises RuntimeError for a processor that is not known to run on merged tokens, or that runs elsewhere.

    Args:
        attention: has the processor.
        known: names of the classes of diffusers that do.
    """
    processor: Any = attention.processor
    _check_backend(processor)
    kind = type(processor)
    if not kind.__module__.startswith(_PLACE) or kind.__name__ not in known:
        raise RuntimeError(
            f"{kind.__module__}.{kind.__qualname__} is not known to run on merged tokens: set one of "
            f"{', '.join(known)} of diffusers, or call tofu_sd.remove_patch"
        )


def _check_backend(processor: Any) -> None:
    """Raises RuntimeError where a processor's attention does not reach torch's scaled_dot_product_attention."""
    if not hasattr(processor, "_attention_backend"):  # an older kind, which calls it
        return
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry  # not in older versions

    backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    name = str(getattr(backend, "value", backend))
    if name != _NATIVE:
        raise RuntimeError(
            f"the attention backend {name!r} does not call torch's scaled_dot_product_attention, where tokens are "
            f"merged: use {_NATIVE!r}, or call tofu_sd.remove_patch"
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise RuntimeError(
            "parallelism (enable_parallelism) splits the sequence over devices, where tokens cannot be merged: leave "
            "it off, or call tofu_sd.remove_patch"
        )
