"""Loads networks of transformers that metrics measure with."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.provenance import version, weights_hash
from .base import LOAD_ERRORS, first_line, install_hint


def load_net(model_id: str, device: torch.device) -> tuple[Any, Any] | str:
    """A model of transformers in float32 and its input processor, by id or folder.

    Returns:
        (model, processor), or a message why they are unavailable.
    """
    try:
        from transformers import AutoImageProcessor, AutoModel, AutoProcessor

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about the new name of torch_dtype, which older ones lack
            # without a dtype, newer versions would take the one it was saved in
            model = AutoModel.from_pretrained(model_id, torch_dtype=torch.float32)
        model = model.to(device).eval().requires_grad_(False)
        kind = AutoProcessor if hasattr(model, "text_model") else AutoImageProcessor
        return model, kind.from_pretrained(model_id)
    except ImportError as error:
        return install_hint(error, "transformers")
    except LOAD_ERRORS as error:
        return f"no weights: {first_line(error)}"


def describe_net(model_id: str, model: nn.Module, processor: Any) -> str:
    """Package, name and hashes of the weights and of the input processing."""
    name = Path(model_id).name if Path(model_id).is_dir() else model_id
    settings = str(sorted(getattr(processor, "image_processor", processor).to_dict().items()))
    input_hash = hashlib.sha256(settings.encode()).hexdigest()[:8]
    return f"transformers {version('transformers')}, {name}, weights {weights_hash(model)}, input {input_hash}"
