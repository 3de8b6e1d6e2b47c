"""What can be wrong with an installation before any of our code runs, said in words."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

import torch


def check_torchvision() -> None:
    """Raises ImportError, saying how to mend it, where torchvision is installed but does not fit the installed torch.

    transformers and diffusers import torchvision wherever they find it, so that a CUDA build of it beside a CPU-only
    torch makes even `import diffusers` fail, with "operator torchvision::nms does not exist".
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, OSError, ImportError) as error:
        try:
            version = importlib.metadata.version("torchvision")
        except importlib.metadata.PackageNotFoundError:
            version = "of unknown version"
        raise ImportError(
            f"torchvision {version} does not work with torch {torch.__version__} ({error}). The two are built for each "
            "other: run `pip install -U torch torchvision` to get a matching pair, or `pip uninstall torchvision` if "
            "you do not need it"
        ) from error
