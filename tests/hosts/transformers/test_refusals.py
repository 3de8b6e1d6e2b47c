"""Diffusion transformers that are not supported are refused by name, with the reason."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from anatomy import anatomy
from torch import nn

import tofu_sd
from tofu_sd.hosts.diffusers_transformers import registry

REASONS = {
    "SanaTransformer2DModel": "its attention is linear",
    "Lumina2Transformer2DModel": "its text has another length in each sample",
    "HunyuanDiT2DModel": "its skip connections",
    "AuraFlowTransformer2DModel": "its text comes with register tokens",
    "CogVideoXTransformer3DModel": "where its tokens lie is not known",
    "SD3ControlNetModel": "a ControlNet of a diffusion transformer",
    "FluxMultiControlNetModel": "a ControlNet of a diffusion transformer",
    "ZImageControlNetModel": "a ControlNet of a diffusion transformer",
}


def _empty(cls: type[Any]) -> Any:
    """An instance without weights; building the real ones takes seconds."""
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    return model


@pytest.mark.parametrize("name", REASONS)
def test_unsupported_transformer_is_refused_with_the_reason(name: str) -> None:
    model = _empty(getattr(diffusers, name))
    before = anatomy(model)
    for function in (tofu_sd.apply_patch, tofu_sd.summary):
        with pytest.raises(TypeError, match=rf"does not support {name}: {REASONS[name]}.*; supported.*SD3Transformer"):
            function(model)
    assert anatomy(model) == before


def test_nunchaku_is_refused() -> None:
    """It subclasses the classes of diffusers, and keeps their pipelines."""
    kind = type("NunchakuFluxTransformer2dModel", (nn.Module,), {"__module__": "nunchaku.models.transformers"})
    with pytest.raises(TypeError, match="does not support NunchakuFluxTransformer2dModel: its own kernels"):
        tofu_sd.apply_patch(kind())


def test_every_reason_names_a_class_of_diffusers() -> None:
    for name in (*registry.FAMILIES, *registry.REASONS):
        assert hasattr(diffusers, name)
