"""tomesd: Token Merging for Stable Diffusion, by its authors' package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .attention import is_unet, unet_of
from .registry import register_method


@register_method("tomesd", package=("tomesd", "tomesd"), takes_ratio=True, fits=is_unet)
@contextmanager
def tomesd(pipe: Any, ratio: float) -> Iterator[Any]:
    """Inside, the pipeline generates with tomesd's patch.

    Destinations are not random, as images would depend on what was generated before. The downsampling is set, because
    the default patches nothing in SDXL.
    """
    import tomesd as package

    package.apply_patch(pipe, ratio=ratio, use_rand=False, max_downsample=top_downsample(pipe))
    try:
        yield pipe
    finally:
        package.remove_patch(pipe)


def top_downsample(pipe: Any) -> int:
    """The latent's side over that of the highest resolution with attention: 1 for SD 1.x and 2.x, 2 for SDXL."""
    config = getattr(unet_of(pipe), "config", None)
    kinds = getattr(config, "down_block_types", None) or ()
    return 2 ** next((level for level, kind in enumerate(kinds) if "CrossAttn" in kind), 0)
