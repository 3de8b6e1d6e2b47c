"""A method's name on the command line -> what is done to the pipeline while it draws."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import tofu_sd
from tofu_sd import TokenFusion, recipes
from tofu_sd.utils import did_you_mean

from .. import EvalError
from . import peers

OTHER_SEEDS = 1_000_003  # added to every seed of the scale row; further than any list of prompts is long


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
    peer, colon, inner = name.partition(":")
    if peer in peers.STACKED and (inner or not colon):
        return _stacked(name, peer, _one(inner, ratio) if inner else FULL)
    try:
        if name in peers.ALONE:
            return _peer(name, TokenFusion(ratio=ratio).ratio)  # the same limits, told the same way
        fusion = recipes.named(name, ratio)
    except recipes.UnknownMethodError as error:
        known = ["full", *recipes.RECIPES, *peers.ALONE, *peers.STACKED]
        raise EvalError(
            f"unknown method {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}; this package's also with "
            f"kv: before, +p behind and any @option=value at the end; {' or '.join(f'{p}:' for p in peers.STACKED)} "
            "before another stacks the two"
        ) from error
    except (ValueError, TypeError) as error:
        raise EvalError(str(error)) from error
    identity = {"fusion": repr(fusion_fields(fusion)), "code": code()}
    applied = partial(tofu_sd.patched, ratio=fusion)
    name = "@".join(part for part in name.split("@") if not part.startswith("ratio="))  # shown beside it anyway
    return Method(name, fusion.key, fusion.ratio, identity, applied, fusion, cycle=fusion.match_every)


def _peer(name: str, ratio: float) -> Method:
    peer = peers.ALONE[name]
    key = f"{name}-r{100 * ratio:g}" if peer.takes_ratio else name
    shown = ratio if peer.takes_ratio else None
    if peer.missing:
        return Method(name, key, shown, missing=peer.missing)
    applied = partial(peer.applied, ratio=ratio) if peer.takes_ratio else peer.applied
    own = {"code": code()} if peer.package is None else {}  # they find their blocks by this package
    return Method(name, key, shown, {**own, **peer.identity}, applied)


def _stacked(name: str, peer_name: str, inner: Method) -> Method:
    peer = peers.STACKED[peer_name]
    key = peer_name if inner is FULL else f"{peer_name}-{inner.key}"
    if peer.missing or inner.missing:
        return Method(name, key, inner.ratio, missing=peer.missing or inner.missing)
    identity = {**inner.identity, **peer.identity}
    applied = partial(peer.applied, inner=inner.applied)
    cycle = math.lcm(peer.cycle, inner.cycle)
    return Method(name, key, inner.ratio, identity, applied, inner.fusion, cycle=cycle, whole=True)


def fusion_fields(fusion: Any) -> dict[str, Any]:
    """The fields of a TokenFusion or its like, functions by their names, so that it reads the same in every process."""
    return {name: getattr(value, "__name__", value) for name, value in vars(fusion).items()}


@cache
def code() -> str:
    """Changes with any file of tofu_sd, so that pictures of an older version are made again."""
    root, sha = Path(tofu_sd.__file__).parent, hashlib.sha256()
    for name in sorted(path.relative_to(root) for path in root.rglob("*.py")):
        if name.parts[0] != "demo":  # its weights are part of the pipeline's own hash
            sha.update(f"{name.as_posix()} ".encode() + (root / name).read_bytes())
    return sha.hexdigest()[:16]
