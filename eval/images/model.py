"""Loads the model of a run, and tries every method on it before hours of generating."""

from __future__ import annotations

import copy
import inspect
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
from tofu_sd.demo.models import EMBEDDED

from .. import EvalError
from ..common.cli import quiet_patches
from ..common.files import without_paths
from ..methods.method import Method
from .checkpoint import HALF, check_path, local_folder, pick_variant
from .components import check_components, check_weights, missing_weights

# what libraries raise for files that are damaged, missing, pickled or of another version
LOAD_ERRORS = (
    OSError,
    ValueError,
    ImportError,
    RuntimeError,
    AttributeError,
    SafetensorError,
    UnpicklingError,
    EOFError,
)


def load_model(
    model: str, device: torch.device, dtype: torch.dtype, variant: str | None = None
) -> tuple[Any, nn.Module | None]:
    """Loads a pipeline and, for an embedded model, its classifier.

    Args:
        model: one of EMBEDDED, a folder, or an id of the hub.
        device: where it runs.
        dtype: of its weights.
        variant: of the weights' files, such as fp16; None takes the plain ones, or fp16 where there are no others.

    Returns:
        (pipeline, classifier or None).

    Raises:
        EvalError: it cannot be loaded, with the reason.
    """
    embedded = EMBEDDED.get(model)
    if embedded is not None:
        if variant is not None:
            raise EvalError(f"--variant is {variant!r}; the embedded model has none")
    else:
        check_path(model)
    try:
        if embedded is not None:
            pipe = demo.load(embedded.name, device, dtype)
            classifier = demo.load_classifier(embedded.name, device)
        else:
            pipe, classifier = _load(model, device, dtype, variant), None
        check_components(pipe)
    except EvalError as error:
        raise EvalError(f"cannot load the model {_shown(model)!r}: {error}") from error
    except (LookupError, TypeError) as error:  # for files with unexpected content
        why = f"a file of it is damaged, or of another version ({type(error).__name__}: {_why(error, model)})"
        raise EvalError(f"cannot load the model {_shown(model)!r}: {why}") from error
    except LOAD_ERRORS as error:
        raise EvalError(f"cannot load the model {_shown(model)!r}: {_why(error, model)}") from error
    except Exception as error:
        if type(error) is not Exception:  # a bug here: only tokenizers raises a bare Exception
            raise
        raise EvalError(f"cannot load the model {_shown(model)!r}: {_why(error, model)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, classifier


def denoiser_class(model: str) -> type[Any] | None:
    """The class of a model's UNet or transformer, by its configuration; None where that cannot be read."""
    import diffusers

    try:
        config = diffusers.DiffusionPipeline.load_config(EMBEDDED[model].weights if model in EMBEDDED else model)
    except LOAD_ERRORS:  # loading the model will say why
        return None
    names = [config[part][1] for part in ("unet", "transformer") if part in config]
    return getattr(diffusers, names[0], None) if names else None


def _load(model: str, device: torch.device, dtype: torch.dtype, requested: str | None) -> Any:
    """The pipeline of a folder or an id, whose weights must all be in files; `variant_of` names their variant."""
    folder = local_folder(model)
    variant = pick_variant(folder, requested) if folder else requested
    try:
        pipe, missing = _from_pretrained(model, dtype, variant)
    except OSError as error:
        if folder is not None or variant is not None or "no file named" not in str(error):
            raise
        # the files of an id that was not in the cache are known only now
        pipe, missing = _from_pretrained(model, dtype, variant := HALF)
    check_weights(missing)
    pipe.loaded_variant = variant
    return pipe.to(device)


def _from_pretrained(model: str, dtype: torch.dtype, variant: str | None) -> tuple[Any, dict[str, list[str]]]:
    from diffusers import AutoPipelineForText2Image

    more = {} if variant is None else {"variant": variant}
    with warnings.catch_warnings(), missing_weights() as missing:
        warnings.simplefilter("ignore", FutureWarning)  # about the new name of torch_dtype, which older ones lack
        # with a checker that blackens images, black would be compared with black
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
    """The reason in one line. diffusers reports a missing file where the network is unavailable."""
    causes: list[BaseException | None] = [error]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return "it is not on this machine, and huggingface.co is unreachable"
    if any(isinstance(cause, HFValidationError) for cause in causes) and not Path(model).is_dir():
        return "there is no such folder, and it is not a valid model id"
    if any(isinstance(cause, UnpicklingError) for cause in causes):
        return "a .bin file of its weights is damaged or holds code, which is not executed; use a safetensors file"
    text = without_paths(" ".join(str(error).split()))[:300]
    if "AutoPipeline can't find" in text:
        return f"it does not generate images from text alone; give a text-to-image model ({text})"
    return text or type(error).__name__


def revision(model: str) -> str | None:
    """The commit of a loaded model of the hub; None for a folder and an embedded model."""
    if model in EMBEDDED or Path(model).is_dir():
        return None
    found = try_to_load_from_cache(model, "model_index.json")
    return Path(found).parent.name if isinstance(found, str) else None


def try_methods(pipe: Any, methods: Sequence[Method]) -> None:
    """Applies each method once. EvalError for one that does not fit the model, before hours of generating."""
    for method in methods:
        if method.unavailable_reason:
            continue
        try:
            with quiet_patches(), method.apply(pipe):
                pass
        except (EvalError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise EvalError(f"method {method.name!r} does not fit this model: {error}") from error


def check_steps(pipe: Any, steps: int) -> None:
    """EvalError for more steps than the model's scheduler has."""
    scheduler = copy.deepcopy(pipe.scheduler)
    if getattr(scheduler.config, "use_dynamic_shifting", False):  # it needs more than their number
        return
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise EvalError(f"--steps is {steps}: {error}") from error


def default_size(pipe: Any) -> int:
    """Pixels a side of the images that a pipeline was trained for."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    side = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if not isinstance(side, int):
        raise EvalError(f"the model has no square default size (sample_size is {side}); give --size")
    return side * int(pipe.vae_scale_factor)


def check_guidance(methods: Sequence[Method], scale: float | None) -> None:
    """EvalError for a method that shares one map between the two halves of guidance, where there is only one half.

    Args:
        methods: of the run.
        scale: of the guidance; None where it is not known yet.
    """
    for method in methods:
        if method.fusion is not None and method.fusion.share_across_cfg and scale is not None and scale <= 1:
            raise EvalError(
                f"method {method.name!r} has share_across_cfg, and the guidance scale is {scale:g}: the images are "
                "generated without guidance, which begins above 1; give --guidance above 1 or drop share_across_cfg"
            )


def guidance_scale(pipe: Any, given: float | None) -> float | None:
    """The guidance scale of a pipeline: the given one or its default; 1 where its model needs no guidance."""
    config = getattr(getattr(pipe, "unet", None), "config", {})
    if config.get("time_cond_proj_dim") is not None:  # the scale is an input of the model, as in LCM
        return 1.0
    if given is not None:
        return given
    argument = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    return None if argument is None or not isinstance(argument.default, int | float) else float(argument.default)
