"""UNets in latent diffusion's layout, patched in place: they match diffusers and are restored completely.

A1111=/folder/of/stable-diffusion-webui pytest tests/hosts/test_ldm.py also tests AUTOMATIC1111's own UNets.
A1111_PYTHON names the interpreter if its packages are in another environment.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import diffusers_reference
import pytest
import tiny
import torch
from patcher_host import CrossAttention, PlainBlock, UNetModel
from torch import nn

import tofu_sd
from tofu_sd import TokenFusionConfig
from tofu_sd.core import matching
from tofu_sd.hosts import ldm

SCRIPTS = Path(__file__).resolve().parents[1] / "helpers" / "programs"

OPTIONS = [
    {},
    {"match_on": "normed"},
    {"early": "mean", "late": "mean", "proportional": True},
    {"early": "mlerp", "kv_early": "mean", "kv_late": "prune"},
    {"early": "mlerp", "kv_early": "mean", "kv_late": "mean", "proportional": True},
    {"kv_only": True, "ratio": 0.75},
    {"kv_only": True, "proportional": True},
    {"levels": 2, "window": 2},
    {"start": 0.4, "end": 0.6},
    {"start": 0.6},
    {"seed": 3},
    {"share_across_blocks": True},
    {"temperature": 0.1, "early": "mean", "late": "mean", "window": 3, "sy": 1, "proportional": True},
]


def options_id(options):
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "default"


@pytest.fixture(params=["sd15", "sdxl"], scope="module")
def unets(request):
    """Returns a diffusers UNet, and a UNet in latent diffusion's layout with the same weights."""
    unet = tiny.sd15_unet() if request.param == "sd15" else tiny.sdxl_unet(layers=(1, 2, 1))
    return unet, UNetModel(copy.deepcopy(unet), PlainBlock)


def predict(unets, h=16, w=16, by_name=False):
    unet, model = unets
    inputs = tiny.inputs(unet, h, w)
    x, context, added = inputs["sample"], inputs["encoder_hidden_states"], inputs.get("added_cond_kwargs")
    t = torch.full((len(x),), 500.0)
    with torch.no_grad():
        if by_name:  # sgm passes arguments by name
            return model(x, timesteps=t, context=context, added=added)
        return model(x, t, context, None, added)


def state(model):
    return [(name, type(module), sorted(vars(module)), len(module._forward_pre_hooks))
            for name, module in model.named_modules()]  # fmt: skip


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
def test_patch_matches_diffusers_and_restores_bit_equal(unets, options, by_name):
    unet, model = unets
    if "levels" in options and unet.config.get("addition_embed_type"):
        pytest.skip("diffusers merges the middle block too, which lies on SDXL's second level")
    before, plain = state(model), predict(unets)
    with tofu_sd.patched(unet, **{"ratio": 0.5, **options}):
        expected = tiny.predict(unet, 16, 16)
    summary = ldm.apply(model, TokenFusionConfig.of(**{"ratio": 0.5, **options}))
    try:
        result = predict(unets, by_name=by_name)
    finally:
        ldm.restore(model)
    assert torch.allclose(result, expected, atol=1e-4)
    assert torch.equal(result, plain) == (options == {"start": 0.6})  # the call is halfway through the sampling
    assert "transformer blocks" in summary.headline
    assert state(model) == before
    assert torch.equal(predict(unets), plain)


def test_second_patch_replaces_the_first_and_is_restored(unets):
    _, model = unets
    before = state(model)
    ldm.apply(model, TokenFusionConfig(0.25))
    ldm.apply(model, TokenFusionConfig(0.5))
    twice = predict(unets)
    ldm.restore(model)
    ldm.restore(model)
    assert state(model) == before
    ldm.apply(model, TokenFusionConfig(0.5))
    assert torch.equal(predict(unets), twice)
    ldm.restore(model)


def test_attention_class_changed_after_the_patch_gets_merged_tokens(unets, monkeypatch):
    """Programs replace `forward` of the class, for example with xformers', at start or when a setting changes."""
    _, model = unets
    ldm.apply(model, TokenFusionConfig(0.5))
    lengths, original = [], CrossAttention.forward

    def other(self, x, context=None, mask=None, **kwargs):
        lengths.append(x.shape[1])
        return original(self, x, context, mask)

    try:
        expected = predict(unets)
        monkeypatch.setattr(CrossAttention, "forward", other)
        assert torch.equal(predict(unets), expected)
    finally:
        ldm.restore(model)
    top = max(lengths)
    assert top // 2 in lengths


def test_attention_instance_with_its_own_forward_is_rejected(unets):
    """HyperTile in AUTOMATIC1111 replaces `forward` on the instance, which would silently hide the patched class."""
    _, model = unets
    before = state(model)
    site = next(iter(ldm.find_places(model).values()))
    attn = site.layers["attn"]
    attn.forward = partial(attn.forward)
    try:
        with pytest.raises(RuntimeError, match=r"attn layer has a `forward` of its own, set by something else"):
            ldm.apply(model, TokenFusionConfig(0.5))
    finally:
        del attn.forward
    assert state(model) == before


def test_unsupported_options_and_models_raise(unets):
    _, model = unets
    before = state(model)
    with pytest.raises(ValueError, match="mlp layers cannot be merged here, only self-attention"):
        ldm.apply(model, TokenFusionConfig(0.5, merge_mlp=True))
    with pytest.raises(ValueError, match="no eligible block in Linear"):
        ldm.apply(nn.Linear(2, 2), TokenFusionConfig(0.5))
    assert state(model) == before


def test_merged_attention_class_is_cached_per_attention_class():
    assert ldm.merged_attention(CrossAttention) is ldm.merged_attention(CrossAttention)
    assert issubclass(ldm.merged_attention(CrossAttention), CrossAttention)


# --- in the UNets of ldm and sgm themselves ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs the checks in a process of their own. Returns the results and the folder of the predictions."""
    program, python = os.environ.get("A1111"), os.environ.get("A1111_PYTHON", sys.executable)
    repositories = Path(program or "") / "repositories"
    if not program or not repositories.exists():
        pytest.skip("A1111 names no checkout of AUTOMATIC1111 that has its repositories/")
    folder, root = tmp_path_factory.mktemp("ldm"), Path(__file__).resolve().parents[2]
    paths = [repositories / "stable-diffusion-stability-ai", repositories / "generative-models", root, SCRIPTS]
    process = subprocess.run(
        [python, str(SCRIPTS / "ldm_run.py"), str(folder)], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}, timeout=900,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return {"folder": folder, **json.loads(process.stdout.splitlines()[-1])}


@pytest.mark.parametrize(("kind", "module", "blocks"), [("sd15", "ldm", "5 of 16"), ("sdxl", "sgm", "10 of 70")])
def test_ldm_and_sgm_unets_match_diffusers_and_are_restored(results, kind, module, blocks):
    assert results[kind]["class"].split(".")[0] == module
    assert f"on {blocks} transformer blocks" in results[kind]["headline"]
    assert set(results[kind]["checks"].values()) == {True}
    distances = diffusers_reference.read(kind, results["folder"] / kind, match_on="hidden")
    assert max(distances["plain"], *distances["merged"].values()) < 1e-4, distances  # to rounding
    assert distances["effect"] > 1e-2


def sample(
    unet: Any, fusion: TokenFusionConfig | None, ts: tuple[float, ...] = (900.0, 700.0, 500.0, 300.0)
) -> list[Any]:
    """Returns the predictions of one sampling. The program concatenates the conditioning again in each call."""
    call = tiny.inputs(tiny.sd15_unet())
    if fusion is not None:
        ldm.apply(unet, fusion)
    with torch.no_grad():
        predictions = [
            unet(call["sample"], torch.tensor([t, t]), context=call["encoder_hidden_states"].clone()) for t in ts
        ]
    ldm.restore(unet)
    return predictions


def test_maps_are_reused_across_steps_with_equal_conditioning(monkeypatch: pytest.MonkeyPatch) -> None:
    """AUTOMATIC1111 concatenates it again in each call. A patch lasts one sampling, so equal content belongs to it."""
    unet, matched, match = UNetModel(tiny.sd15_unet(), PlainBlock), [], matching._nearest
    monkeypatch.setattr(matching, "_nearest", lambda *args: (matched.append(1), match(*args))[1])
    for every, times in ((1, 4), (2, 2), (4, 1)):
        matched.clear()
        sample(unet, TokenFusionConfig(0.5, match_interval=every))
        assert len(matched) == 5 * times


def test_threshold_merges_from_the_second_step() -> None:
    unet = UNetModel(tiny.sd15_unet(), PlainBlock)
    plain, fixed = sample(unet, None), sample(unet, TokenFusionConfig(0.5))
    adaptive = sample(unet, TokenFusionConfig(0.5, threshold=-1.0))
    assert torch.equal(adaptive[0], plain[0])
    assert all(torch.equal(one, other) for one, other in zip(adaptive[1:], fixed[1:], strict=True))
