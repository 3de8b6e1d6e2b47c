"""SD.Next: a web UI that generates with diffusers pipelines, which are patched while one request runs.

It loads the script of the other web UIs, which calls this module where the model is a pipeline.
"""

from __future__ import annotations

import sys
from typing import Any

from ..api import apply_patch, remove_patch
from ..config import TokenFusionConfig


def runs_pipeline(p: Any) -> bool:
    """Whether a diffusers pipeline generates a request, instead of a model of the program's own."""
    model = getattr(p, "sd_model", None)
    return not hasattr(model, "forge_objects") and (hasattr(model, "unet") or hasattr(model, "transformer"))


def start(p: Any, config: TokenFusionConfig, settings: Any) -> None:
    """Patches the pipeline of a request.

    Args:
        p: the request.
        config: how tokens are merged.
        settings: the program's settings.

    Raises:
        ValueError: the program itself merges tokens; or, as TypeError and RuntimeError, see `apply_patch`.
    """
    method = _setting(p, settings, "token_merging_method")
    ratio = _setting(p, settings, f"{str(method).lower()}_ratio") if method in ("ToMe", "ToDo") else 0
    if ratio and ratio > 0:
        raise ValueError(
            f"the built-in {method} is on, at {ratio:g}, and tokens are not merged twice: set it to None in the "
            "settings, or switch Token Fusion off"
        )
    if config.ratio > 0:
        apply_patch(p.sd_model, config)


def stop(p: Any) -> None:
    """Undoes `start`; a pipeline that was not patched stays unchanged."""
    if hasattr(getattr(p.sd_model, "unet", None), "modules"):
        remove_patch(p.sd_model)


def show_comments(p: Any, processed: Any, prefix: str) -> None:
    """Adds the comments of a request that start with `prefix` below the image, as the program itself adds none."""
    if processed is not None:
        own = (comment for comment in p.comments if comment.startswith(prefix))
        processed.comments = "\n".join(dict.fromkeys([*processed.comments.splitlines(), *own]))


def grids() -> list[Any]:
    """Returns the module that holds the axes of both X/Y/Z grids of the program."""
    return [module for name, module in sys.modules.items() if name.endswith("xyz_grid_classes")]


def _setting(p: Any, settings: Any, name: str) -> Any:
    """Returns a setting of the request, or else of the program."""
    own = getattr(p, name, None)
    return getattr(settings, name, None) if own is None else own
