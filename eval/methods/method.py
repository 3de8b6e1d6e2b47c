"""Method: one row of the results, and what decides its images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from tofu_sd import TokenFusionConfig

SEED_SHIFT = 1_000_003  # added to every seed of OTHER_SEEDS; larger than the length of any list of prompts


@dataclass(frozen=True)
class Method:
    """One row of the results.

    Args:
        name: as the user wrote it. slug: its folder. ratio: None for a method without one.
        identity: all that decides its images besides the settings of the run.
        apply: a context manager in which a pipeline generates by this method.
        fusion: the configuration of this package's own methods.
        seed_shift: added to every seed.
        period: after how many steps the method does the same again.
        varies: whether images differ in cost.
        needs_full_unet: whether it takes a whole UNet or transformer.
        unavailable_reason: what to install, where the method cannot run.
        check: raises EvalError for a pipeline and a latent's side that the method cannot take.
    """

    name: str
    slug: str
    ratio: float | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    apply: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    fusion: TokenFusionConfig | None = None
    seed_shift: int = 0
    period: int = 1
    varies: bool = False
    needs_full_unet: bool = False
    unavailable_reason: str | None = None
    check: Callable[[Any, int], None] | None = None


BASELINE = Method("baseline", "baseline")  # the unpatched model
OTHER_SEEDS = Method(
    "baseline, other seeds", "baseline-other-seeds", None, {"seed_shift": SEED_SHIFT}, seed_shift=SEED_SHIFT
)
