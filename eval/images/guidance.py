"""Whether a pipeline generates with classifier-free guidance, and the methods that need it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from .. import EvalError
from ..methods.method import Method


def check_guidance(methods: Sequence[Method], scale: float | None) -> None:
    """EvalError for a method that shares one map between the two halves of guidance, where there is one half alone.

    scale: of the guidance; None where it is not known yet.
    """
    for method in methods:
        if method.fusion is not None and method.fusion.share_across_cfg and scale is not None and scale <= 1:
            raise EvalError(
                f"method {method.name!r} has share_across_cfg, and the guidance scale is {scale:g}: the images are "
                "generated without guidance, which begins above 1; give --guidance above 1 or drop share_across_cfg"
            )


def guidance_scale(pipe: Any, asked: float | None) -> float | None:
    """The scale a pipeline generates with: the one asked for or its default; 1 where its model needs no guidance."""
    config = getattr(getattr(pipe, "unet", None), "config", {})
    if config.get("time_cond_proj_dim") is not None:  # the scale is an input of the model, as in LCM
        return 1.0
    if asked is not None:
        return asked
    argument = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    return None if argument is None or not isinstance(argument.default, int | float) else float(argument.default)
