"""First Block Cache: a step whose first block changes little reuses the other blocks' change; by diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, update_wrapper
from typing import Any

import diffusers

from .. import EvalError
from .registry import register_method

# the relative change of the first block's residual up to which a step is skipped; 0.05 is diffusers' default
THRESHOLDS = {"first-block-cache": 0.05, "first-block-cache-10": 0.1, "first-block-cache-20": 0.2}


def has_cache(denoiser: type[Any]) -> bool:
    """Whether diffusers has caches for a class of transformers."""
    return hasattr(denoiser, "enable_cache")


@contextmanager
def first_block_cache(
    pipe: Any,
    inner: Callable[[Any], AbstractContextManager[Any]],
    *,
    threshold: float = THRESHOLDS["first-block-cache"],
) -> Iterator[Any]:
    """Inside, the pipeline generates with First Block Cache on top of another method.

    A batch is skipped as a whole, so that an image depends on its neighbours in the batch.
    """
    transformer = getattr(pipe, "transformer", pipe)
    if not has_cache(type(transformer)):
        raise EvalError(f"diffusers has no cache for {type(transformer).__name__}")
    with ExitStack() as stack:
        stack.enter_context(inner(pipe))
        before = [(module, {*vars(module)}) for module in transformer.modules()]
        try:
            transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
            yield pipe
        finally:
            transformer.disable_cache()
            for module, own in before:  # it leaves its registry and each block's `forward`, set on the instance
                for name in vars(module).keys() - own:
                    vars(module).pop(name)


for _name, _threshold in THRESHOLDS.items():
    register_method(_name, stackable=True, varies=True, fits=has_cache)(
        update_wrapper(partial(first_block_cache, threshold=_threshold), first_block_cache)
    )
