"""The model whose pictures are compared: loaded by name, and tried with every method before hours of drawing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn

from tofu_sd import demo

from . import EvalError
from .files import without_paths
from .methods import Method
from .options import quiet_patches


def load_model(model: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module | None]:
    """(pipeline on the device, the classifier that judges its pictures or None)."""
    try:
        if model == "demo":
            pipe, judge = demo.load(device=device, dtype=dtype), demo.judge(device=device)
        else:
            from diffusers import AutoPipelineForText2Image

            # a checker that blackens pictures would compare black with black
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # of the newer name of torch_dtype, which older ones lack
                pipe = AutoPipelineForText2Image.from_pretrained(
                    model, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
                ).to(device)
            judge = None
    except (LookupError, TypeError) as error:  # of files that hold something else than they should
        why = f"a file of it is damaged, or of another version ({type(error).__name__}: {_why(error, model)})"
        raise EvalError(f"cannot load the model {model!r}: {why}") from error
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError, SafetensorError) as error:
        raise EvalError(f"cannot load the model {model!r}: {_why(error, model)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, judge


def _why(error: BaseException, model: str) -> str:
    """The reason in one line. diffusers tells of a file that is not there where it was the network that was not."""
    causes: list[BaseException | None] = [error]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return "it is not on this machine, and huggingface.co, where it would come from, cannot be reached"
    if any(isinstance(cause, HFValidationError) for cause in causes) and not Path(model).is_dir():
        return "there is no such folder, and no model can have that id"
    return without_paths(" ".join(str(error).split()))[:300]


def revision(model: str) -> str | None:
    """The commit of a loaded model of the hub; None of a folder and of the embedded model."""
    if model == "demo" or Path(model).is_dir():
        return None
    found = try_to_load_from_cache(model, "model_index.json")
    return Path(found).parent.name if isinstance(found, str) else None


def try_out(pipe: Any, chosen: Sequence[Method]) -> None:
    """Applies each method once, so that one that does not fit the model is told of before hours of drawing."""
    for method in chosen:
        if method.missing:
            continue
        try:
            with quiet_patches(), method.applied(pipe):
                pass
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise EvalError(f"method {method.name!r} does not fit this model: {error}") from error


def check_steps(pipe: Any, steps: int) -> None:
    """EvalError for more steps than the model's scheduler can make."""
    scheduler = copy.deepcopy(pipe.scheduler)
    if getattr(scheduler.config, "use_dynamic_shifting", False):  # it takes more than their number
        return
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise EvalError(f"--steps is {steps}: {error}") from error


def own_size(pipe: Any) -> int:
    """Pixels a side of the pictures a pipeline was trained for."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    side = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if not isinstance(side, int):
        raise EvalError(f"the model names no square size of its own (sample_size is {side}); give --size")
    return side * int(pipe.vae_scale_factor)
