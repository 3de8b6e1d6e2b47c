"""Checks an installation, and explains what is wrong with it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

import torch


def check_torchvision() -> None:
    """Checks that torchvision, if it is installed, works with the installed torch.

    transformers and diffusers import torchvision if it is installed. A CUDA build of it with a CPU-only torch makes
    `import diffusers` fail with "operator torchvision::nms does not exist".

    Raises:
        ImportError: it does not work. Says how to repair the installation.
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
