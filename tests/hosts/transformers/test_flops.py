"""FLOPs that are counted from the sizes of layers equal those that torch counts while a model runs."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_transformers import MODELS, TEXT
from torch.utils.flop_counter import FlopCounterMode

import tofu_sd
from eval.images.flops import FORMULAS
from tofu_sd.hosts.diffusers_transformers import host_of
from tofu_sd.hosts.diffusers_transformers.flops import FORMS, forward_flops

LATENT, BATCH = (16, 16), 2
STATES = ("sd3", "sd3.5", "pixart")  # families whose states are merged before the projections


def counted(name: str, model: Any, call: dict[str, Any]) -> float:
    """FLOPs of one sample, by torch's own counter."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        MODELS[name].predict(model, **call)
    return counter.get_total_flops() / BATCH


def computed(name: str, model: Any, form: str | None) -> float:
    """The same from the sizes of layers. Z-Image pads its text to 32 tokens."""
    host: Any = host_of(model)
    pairs = [(block, host._kind(block)) for block in host.find_blocks(model)]
    text = 32 if name == "z-image" else TEXT
    return sum(forward_flops(model, pairs, LATENT, text, FORMS[form] if form else frozenset(), 0.5))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, "all"),
        ({"kv_early": "mean", "kv_late": "mean"}, "all"),
        ({"kv_only": True}, "keys and values"),
    ],
    ids=["queries, keys and values", "their own reduction", "keys and values"],
)
def test_merging_saves_what_its_form_saves(name: str, options: dict[str, Any], form: str) -> None:
    """Pairs are matched without products of matrices, so nothing is added."""
    if name in STATES:
        form += ", projections too"
    call: dict[str, Any] = {}
    if name == "z-image":  # prompts of one length
        call = {"cap_feats": MODELS[name].inputs()["cap_feats"][:1] * 2}
    model = MODELS[name].make()
    baseline = counted(name, model, call)
    merged = counted(name, tofu_sd.apply_patch(model, 0.5, matching="pairs", **options), call)
    assert baseline - merged == computed(name, model, None) - computed(name, model, form)


def test_whole_blocks_save_their_share_of_tokens() -> None:
    """Without text all parts of a block shrink with its tokens, attention with their square."""
    model = MODELS["pixart"].make()
    host: Any = host_of(model)
    pairs = [(block, host._kind(block)) for block in host.find_blocks(model)]
    (attention, rest), (short, less) = (
        forward_flops(model, pairs, LATENT, 0, FORMS["whole blocks"], ratio) for ratio in (0.0, 0.5)
    )
    modulation = sum(
        2 * module.in_features * module.out_features
        for block, _ in pairs
        for name, module in model.get_submodule(block.name).named_modules()
        if "norm" in name and hasattr(module, "in_features")
    )
    assert short == attention / 4
    assert less - modulation == (rest - modulation) / 2
