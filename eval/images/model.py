"""The model whose pictures are compared: loaded by name, and tried with every method before hours of drawing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn

from tofu_sd import demo

from .. import EvalError
from ..common.cli import quiet_patches
from ..common.files import without_paths
from ..methods.method import Method
from .checkpoint import HALF, check_path, local_folder, pick_variant
from .components import check_components, check_weights, missing_weights

# what libraries raise of files that are damaged, missing, pickled or of another version
BROKEN = (OSError, ValueError, ImportError, RuntimeError, AttributeError, SafetensorError, UnpicklingError, EOFError)


def load_model(
    model: str, device: torch.device, dtype: torch.dtype, variant: str | None = None
) -> tuple[Any, nn.Module | None]:
    """(pipeline on the device, the classifier that judges its pictures or None).

    variant: of the weights' files, such as fp16; None takes the plain ones, or fp16 where there are no others.
    """
    if model == "demo":
        if variant is not None:
            raise EvalError(f"--variant is {variant!r}; the embedded model has none")
    else:
        check_path(model)
    try:
        if model == "demo":
            pipe, judge = demo.load(device=device, dtype=dtype), demo.load_classifier(device=device)
        else:
            pipe, judge = _load(model, device, dtype, variant), None
        check_components(pipe)
    except EvalError as error:
        raise EvalError(f"cannot load the model {_shown(model)!r}: {error}") from error
    except (LookupError, TypeError) as error:  # of files that hold something else than they should
        why = f"a file of it is damaged, or of another version ({type(error).__name__}: {_why(error, model)})"
        raise EvalError(f"cannot load the model {_shown(model)!r}: {why}") from error
    except BROKEN as error:
        raise EvalError(f"cannot load the model {_shown(model)!r}: {_why(error, model)}") from error
    except Exception as error:
        if type(error) is not Exception:  # of its own kind: a bug here; tokenizers raises it bare
            raise
        raise EvalError(f"cannot load the model {_shown(model)!r}: {_why(error, model)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, judge


def _load(model: str, device: torch.device, dtype: torch.dtype, asked: str | None) -> Any:
    """The pipeline of a folder or an id, all of whose weights are in files; `variant_of` names their variant."""
    folder = local_folder(model)
    variant = pick_variant(folder, asked) if folder else asked
    try:
        pipe, missing = _from_pretrained(model, dtype, variant)
    except OSError as error:
        if folder is not None or variant is not None or "no file named" not in str(error):
            raise
        # of an id that was not here before its files are known only now
        pipe, missing = _from_pretrained(model, dtype, variant := HALF)
    check_weights(missing)
    pipe.loaded_variant = variant
    return pipe.to(device)


def _from_pretrained(model: str, dtype: torch.dtype, variant: str | None) -> tuple[Any, dict[str, list[str]]]:
    from diffusers import AutoPipelineForText2Image

    more = {} if variant is None else {"variant": variant}
    with warnings.catch_warnings(), missing_weights() as missing:
        warnings.simplefilter("ignore", FutureWarning)  # of the newer name of torch_dtype, which older ones lack
        # a checker that blackens pictures would compare black with black
        pipe = AutoPipelineForText2Image.from_pretrained(
            model, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False, **more
        )
    return pipe, missing


def variant_of(pipe: Any) -> str | None:
    """The variant of the files that a pipeline's weights come from; None for the plain ones."""
    return getattr(pipe, "loaded_variant", None)


def _shown(model: str) -> str:
    """A model's id, or the name of its folder."""
    return without_paths(model) if Path(model).exists() else model


def _why(error: BaseException, model: str) -> str:
    """The reason in one line. diffusers tells of a file that is not there where it was the network that was not."""
    causes: list[BaseException | None] = [error]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return "it is not on this machine, and huggingface.co, where it would come from, cannot be reached"
    if any(isinstance(cause, HFValidationError) for cause in causes) and not Path(model).is_dir():
        return "there is no such folder, and no model can have that id"
    if any(isinstance(cause, UnpicklingError) for cause in causes):
        return "a .bin file of its weights is damaged or holds code, which is not run; get it as safetensors"
    text = without_paths(" ".join(str(error).split()))[:300]
    if "AutoPipeline can't find" in text:
        return f"it makes no images from text alone; give a text-to-image model ({text})"
    return text or type(error).__name__


def revision(model: str) -> str | None:
    """The commit of a loaded model of the hub; None of a folder and of the embedded model."""
    if model == "demo" or Path(model).is_dir():
        return None
    found = try_to_load_from_cache(model, "model_index.json")
    return Path(found).parent.name if isinstance(found, str) else None


def try_out(pipe: Any, chosen: Sequence[Method]) -> None:
    """Applies each method once, so that one that does not fit the model is told of before hours of drawing."""
    for method in chosen:
        if method.unavailable_reason:
            continue
        try:
            with quiet_patches(), method.apply(pipe):
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
