"""What others do to make the same pictures cheaper, to be measured in the same run.

tomesd and DeepCache are their authors' packages. Of ToDo and HyperTile the idea alone is here, in a few lines of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor

import tofu_sd

from .. import EvalError
from ..common.cli import quiet_patches
from ..common.files import digest
from ..common.provenance import version
from .schedule import timesteps

DEEPCACHE_STEPS = 3  # of which one runs whole; its authors' example
MOST_STEPS = 500  # of a schedule, where there is none: as many as `timesteps` has


@dataclass(frozen=True)
class Peer:
    """applied: a context in which a pipeline or UNet draws by it; called with the ratio too, where it takes one.

    package: (the module, its name on PyPI), None for what is written here. cycle: steps after which it does the same.
    """

    applied: Callable[..., AbstractContextManager[Any]]
    package: tuple[str, str] | None = None
    takes_ratio: bool = False
    cycle: int = 1

    @property
    def missing(self) -> str | None:
        """How to get it where it is not there."""
        # not whether it can be imported: any folder of its name, as of a clone beside us, can
        if self.package is None or version(self.package[1]):
            return None
        return f"pip install {self.package[1]}"

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its pictures."""
        code = {"peers": digest(Path(__file__))}
        return code if self.package is None else {**code, self.package[0]: version(self.package[1])}


@contextmanager
def _tomesd(pipe: Any, ratio: float) -> Iterator[Any]:
    import tomesd

    # random destinations would depend on what was drawn before; left to itself it does nothing on SDXL
    tomesd.apply_patch(pipe, ratio=ratio, use_rand=False, max_downsample=_top_downsample(pipe))
    try:
        yield pipe
    finally:
        tomesd.remove_patch(pipe)


def _top_downsample(pipe: Any) -> int:
    """The latent's side over that of the highest resolution with attention: 1 for SD 1.x and 2.x, 2 for SDXL."""
    config = getattr(getattr(pipe, "unet", pipe), "config", None)
    kinds = getattr(config, "down_block_types", None) or ()
    return 2 ** next((level for level, kind in enumerate(kinds) if "CrossAttn" in kind), 0)


@contextmanager
def _deepcache(pipe: Any, inner: Callable[[Any], AbstractContextManager[Any]]) -> Iterator[Any]:
    from DeepCache import DeepCacheSDHelper

    if not hasattr(pipe, "unet"):  # a UNet by itself, whose steps it counts in a pipeline's schedule
        schedule = SimpleNamespace(timesteps=timesteps(MOST_STEPS))
        pipe = SimpleNamespace(unet=pipe, scheduler=schedule)
    with ExitStack() as stack:
        stack.enter_context(inner(pipe))
        helper = DeepCacheSDHelper(pipe)
        helper.set_params(cache_interval=DEEPCACHE_STEPS, cache_branch_id=0)
        untouched = [module for module in pipe.unet.modules() if "forward" not in vars(module)]
        try:
            helper.enable()
            yield pipe
        finally:
            with suppress(KeyError):  # of what it had not come to when it failed
                helper.disable()
            for module in untouched:  # it leaves each its own `forward`, set on the instance
                vars(module).pop("forward", None)


def map_of(tokens: Tensor) -> Tensor:
    """Tokens [B, N, C] of a square map as [B, side, side, C]: pictures are square here."""
    side = math.isqrt(tokens.shape[1])
    return tokens.view(tokens.shape[0], side, side, -1)


class DownsampledKeys(Attention):  # type: ignore[misc]
    """Queries attend to every other token of every other row: ToDo (Smith et al., 2024), nearest neighbour, by 2."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        keys = map_of(hidden_states)[:, ::2, ::2].flatten(1, 2)
        return super().forward(hidden_states, encoder_hidden_states=keys)


class TiledAttention(Attention):  # type: ignore[misc]
    """Each quarter of the map attends to itself alone, as in HyperTile (tfernd, 2023), 2 x 2 tiles."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        square = map_of(hidden_states)
        B, side, _, C = square.shape
        tiles = square.view(B, 2, side // 2, 2, side // 2, C).transpose(2, 3).reshape(4 * B, -1, C)
        out = super().forward(tiles).view(B, 2, 2, side // 2, side // 2, -1)
        return out.transpose(2, 3).reshape(B, side * side, -1)


def fused_attentions(unet: Any, ratio: float = 0.5, latent: tuple[int, int] | None = None) -> list[tuple[Any, int]]:
    """(self-attention, tokens that fusion leaves) of each block of the highest resolution that has attention."""
    with quiet_patches(), tofu_sd.patched(unet, ratio):
        rows = tofu_sd.summary(unet, latent).rows
    return [(unet.get_submodule(row.name).attn1, row.after) for row in rows]


def check_tiles(pipe: Any, latent: int) -> None:
    """EvalError where a latent of this side gives a map that does not divide into tiles."""
    with quiet_patches(), tofu_sd.patched(pipe):
        sizes = [row.size for row in tofu_sd.summary(pipe, (latent, latent)).rows]
    for h, w in sizes:
        if h % 2:
            raise EvalError(f"hypertile cuts maps into 2 x 2 tiles, and this size gives one of {h} x {w} tokens")


@contextmanager
def _instead(pipe: Any, attention: type[Attention]) -> Iterator[Any]:
    """Another class for the self-attention of the highest resolution that has attention."""
    own = [(module, type(module)) for module, _ in fused_attentions(getattr(pipe, "unet", pipe))]
    for module, _ in own:
        module.__class__ = attention
    try:
        yield pipe
    finally:
        for module, kind in own:
            module.__class__ = kind


ALONE: dict[str, Peer] = {
    "tomesd": Peer(_tomesd, ("tomesd", "tomesd"), takes_ratio=True),
    "todo": Peer(partial(_instead, attention=DownsampledKeys)),
    "hypertile": Peer(partial(_instead, attention=TiledAttention)),
}
STACKED: dict[str, Peer] = {"deepcache": Peer(_deepcache, ("DeepCache", "deepcache"), cycle=DEEPCACHE_STEPS)}
