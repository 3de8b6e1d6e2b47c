"""A method's name on the command line -> what is done to the pipeline while it draws."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tofu_sd
from tofu_sd import TokenFusion, recipes
from tofu_sd.policy import did_you_mean

from . import EvalError, shapes

OTHER_SEEDS = 1_000_003  # added to every seed of the scale row; further than any list of prompts is long
DEEPCACHE_STEPS = 3  # of which one runs whole; its authors' example


@dataclass(frozen=True)
class Method:
    """One row of the results. fusion: of this package's methods.

    name: as it was asked for. key: its folder. identity: all that decides its pictures beside the run's settings.
    applied: a context in which a pipeline draws by this method. cycle: after how many steps it does the same again.
    whole: whether it takes a whole UNet. missing: what to install, where it cannot be had.
    """

    name: str
    key: str
    ratio: float | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    applied: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    fusion: TokenFusion | None = None
    seed_shift: int = 0
    cycle: int = 1
    whole: bool = False
    missing: str | None = None


FULL = Method("full", "full")
SCALE = Method("full, other seeds", "full-other-seeds", None, {"seed_shift": OTHER_SEEDS}, seed_shift=OTHER_SEEDS)


def parse(names: str, ratios: list[float]) -> list[Method]:
    """The methods of a list such as "tofu,kv:tome+p", each at every ratio, in that order and each once."""
    methods: dict[str, Method] = {}
    for name in (part.strip() for part in names.split(",")):
        for ratio in ratios:
            method = _one(name, ratio)
            methods.setdefault(method.key, method)
    return list(methods.values())


def _one(name: str, ratio: float) -> Method:
    if name == "full":
        return FULL
    if name.partition(":")[0] == "deepcache":
        return _deepcache(name, ratio)
    try:
        if name == "tomesd":
            return _tomesd(TokenFusion(ratio=ratio).ratio)  # the same limits, told the same way
        fusion = recipes.named(name, ratio)
    except recipes.UnknownMethodError as error:
        known = ["full", *recipes.RECIPES, *PEERS]
        raise EvalError(
            f"unknown method {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}; this package's also with "
            "kv: before, +p behind and any @option=value at the end; deepcache: before any stacks the two"
        ) from error
    except (ValueError, TypeError) as error:
        raise EvalError(str(error)) from error
    identity = {"fusion": repr(fusion_fields(fusion)), "code": code()}
    applied = partial(tofu_sd.patched, ratio=fusion)
    return Method(name, fusion.key, fusion.ratio, identity, applied, fusion, cycle=fusion.match_every)


PEERS = ("tomesd", "deepcache")


def fusion_fields(fusion: TokenFusion) -> dict[str, Any]:
    """A TokenFusion's fields, functions by their names, so that it reads the same in every process."""
    return {name: getattr(value, "__name__", value) for name, value in vars(fusion).items()}


def _tomesd(ratio: float) -> Method:
    key = f"tomesd-r{100 * ratio:g}"
    if importlib.util.find_spec("tomesd") is None:
        return Method("tomesd", key, ratio, missing="pip install tomesd")
    version = importlib.metadata.version("tomesd")
    return Method("tomesd", key, ratio, {"tomesd": version}, partial(_with_tomesd, ratio=ratio))


@contextmanager
def _with_tomesd(pipe: Any, ratio: float) -> Iterator[Any]:
    import tomesd

    # random destinations would depend on what was drawn before; left to itself it does nothing on SDXL
    tomesd.apply_patch(pipe, ratio=ratio, use_rand=False, max_downsample=_top_downsample(pipe))
    try:
        yield pipe
    finally:
        tomesd.remove_patch(pipe)


def _deepcache(name: str, ratio: float) -> Method:
    """DeepCache alone, or on top of the method behind the colon."""
    inner = _one(name.partition(":")[2], ratio) if ":" in name else FULL
    key = "deepcache" if inner is FULL else f"deepcache-{inner.key}"
    if inner.missing or importlib.util.find_spec("DeepCache") is None:
        return Method(name, key, inner.ratio, missing=inner.missing or "pip install DeepCache")
    identity = {**inner.identity, "DeepCache": importlib.metadata.version("DeepCache"), "steps": DEEPCACHE_STEPS}
    cycle = math.lcm(DEEPCACHE_STEPS, inner.cycle)
    applied = partial(_with_deepcache, inner=inner)
    return Method(name, key, inner.ratio, identity, applied, inner.fusion, cycle=cycle, whole=True)


@contextmanager
def _with_deepcache(pipe: Any, inner: Method) -> Iterator[Any]:
    from DeepCache import DeepCacheSDHelper

    if not hasattr(pipe, "unet"):  # a UNet by itself, whose steps it counts in a pipeline's schedule
        schedule = SimpleNamespace(timesteps=shapes.timesteps(DEEPCACHE_STEPS))
        pipe = SimpleNamespace(unet=pipe, scheduler=schedule)
    with ExitStack() as stack:
        stack.enter_context(inner.applied(pipe))
        helper = DeepCacheSDHelper(pipe)
        helper.set_params(cache_interval=DEEPCACHE_STEPS, cache_branch_id=0)
        untouched = [module for module in pipe.unet.modules() if "forward" not in vars(module)]
        helper.enable()
        try:
            yield pipe
        finally:
            helper.disable()
            for module in untouched:  # it leaves each its own `forward`, set on the instance
                vars(module).pop("forward", None)


def _top_downsample(pipe: Any) -> int:
    """The latent's side over that of the highest resolution with attention: 1 for SD 1.x and 2.x, 2 for SDXL."""
    config = getattr(getattr(pipe, "unet", pipe), "config", None)
    kinds = getattr(config, "down_block_types", None) or ()
    return 2 ** next((level for level, kind in enumerate(kinds) if "CrossAttn" in kind), 0)


@cache
def code() -> str:
    """Changes with any file of tofu_sd, so that pictures of an older version are made again."""
    root, sha = Path(tofu_sd.__file__).parent, hashlib.sha256()
    for name in sorted(path.relative_to(root) for path in root.rglob("*.py")):
        if name.parts[0] != "demo":  # its weights are part of the pipeline's own hash
            sha.update(f"{name.as_posix()} ".encode() + (root / name).read_bytes())
    return sha.hexdigest()[:16]
