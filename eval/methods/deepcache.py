"""DeepCache: deep features are reused for a few steps (Ma et al., CVPR 2024), by its authors' package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial, update_wrapper
from types import SimpleNamespace
from typing import Any

from .attention import is_unet, unet_of
from .registry import register_method
from .schedule import timesteps

INTERVALS = {"deepcache": 3, "deepcache-2": 2}  # steps, one of which runs in full; 3 is its authors' example
MOST_STEPS = 500  # of the stand-in schedule of a UNet without a pipeline: as many as `timesteps` has


@contextmanager
def deepcache(
    pipe: Any, inner: Callable[[Any], AbstractContextManager[Any]], *, interval: int = INTERVALS["deepcache"]
) -> Iterator[Any]:
    """Inside, the pipeline generates with DeepCache on top of another method."""
    from DeepCache import DeepCacheSDHelper

    if unet_of(pipe) is pipe:  # a UNet alone, whose steps are counted in a pipeline's schedule
        schedule = SimpleNamespace(timesteps=timesteps(MOST_STEPS))
        pipe = SimpleNamespace(unet=pipe, scheduler=schedule)
    with ExitStack() as stack:
        stack.enter_context(inner(pipe))
        helper = DeepCacheSDHelper(pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        untouched = [module for module in pipe.unet.modules() if "forward" not in vars(module)]
        try:
            helper.enable()
            yield pipe
        finally:
            with suppress(KeyError):  # of what it had not reached when it failed
                helper.disable()
            for module in untouched:  # it leaves each its own `forward`, set on the instance
                vars(module).pop("forward", None)


for _name, _interval in INTERVALS.items():
    register_method(_name, package=("DeepCache", "deepcache"), stackable=True, period=_interval, fits=is_unet)(
        update_wrapper(partial(deepcache, interval=_interval), deepcache)
    )
