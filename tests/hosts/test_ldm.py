"""UNets in latent diffusion's layout, patched in place: the same pictures as in diffusers, and nothing left behind.

A1111=/folder/of/stable-diffusion-webui pytest tests/hosts/test_ldm.py also tries those that AUTOMATIC1111 draws with,
by A1111_PYTHON if its packages are another environment's.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import twins
from patcher_host import CrossAttention, PlainBlock, UNetModel
from torch import nn

import tofu_sd
from tofu_sd import TokenFusionConfig
from tofu_sd.core import matching
from tofu_sd.hosts import ldm

HELPERS = Path(__file__).resolve().parents[1] / "helpers"

OPTIONS = [
    {},
    {"match_on": "normed"},
    {"early": "mean", "late": "mean", "proportional": True},
    {"kv_only": True, "ratio": 0.75},
    {"kv_only": True, "proportional": True},
    {"levels": 2, "window": 2},
    {"start": 0.4, "end": 0.6},
    {"start": 0.6},
    {"seed": 3},
    {"share_across_blocks": True},
    {"temperature": 0.1, "early": "mean", "late": "mean", "window": 3, "sy": 1, "proportional": True},
]


def told(options):
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "default"


@pytest.fixture(params=["sd15", "sdxl"], scope="module")
def unets(request):
    """(a diffusers UNet, the same weights in latent diffusion's layout)."""
    unet = tiny.sd15_unet() if request.param == "sd15" else tiny.sdxl_unet(layers=(1, 2, 1))
    return unet, UNetModel(copy.deepcopy(unet), PlainBlock)


def predict(unets, h=16, w=16, by_name=False):
    unet, model = unets
    inputs = tiny.inputs(unet, h, w)
    x, context, added = inputs["sample"], inputs["encoder_hidden_states"], inputs.get("added_cond_kwargs")
    t = torch.full((len(x),), 500.0)
    with torch.no_grad():
        if by_name:  # as sgm calls it
            return model(x, timesteps=t, context=context, added=added)
        return model(x, t, context, None, added)


def state(model):
    return [(name, type(module), sorted(vars(module)), len(module._forward_pre_hooks))
            for name, module in model.named_modules()]  # fmt: skip


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=told)
def test_it_draws_what_the_diffusers_adapter_draws_and_is_restored_to_the_bit(unets, options, by_name):
    unet, model = unets
    if "levels" in options and unet.config.get("addition_embed_type"):
        pytest.skip("diffusers merges the middle block too, which lies on SDXL's second level")
    before, plain = state(model), predict(unets)
    with tofu_sd.patched(unet, **{"ratio": 0.5, **options}):
        expected = tiny.predict(unet, 16, 16)
    summary = ldm.apply(model, TokenFusionConfig.of(**{"ratio": 0.5, **options}))
    try:
        found = predict(unets, by_name=by_name)
    finally:
        ldm.restore(model)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(found, plain) == (options == {"start": 0.6})  # the call is at half of the sampling
    assert "transformer blocks" in summary.headline
    assert state(model) == before
    assert torch.equal(predict(unets), plain)


def test_applied_again_the_later_one_counts_and_nothing_is_left(unets):
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


def test_an_attention_that_the_program_changes_later_runs_on_fused_tokens(unets, monkeypatch):
    """These programs put xformers' forward and others in the class when they start, or when a setting changes."""
    _, model = unets
    ldm.apply(model, TokenFusionConfig(0.5))
    seen, original = [], CrossAttention.forward

    def other(self, x, context=None, mask=None, **kwargs):
        seen.append(x.shape[1])
        return original(self, x, context, mask)

    try:
        expected = predict(unets)
        monkeypatch.setattr(CrossAttention, "forward", other)
        assert torch.equal(predict(unets), expected)
    finally:
        ldm.restore(model)
    top = max(seen)
    assert top // 2 in seen


def test_an_attention_that_something_else_has_wrapped_is_refused(unets):
    """As HyperTile does in AUTOMATIC1111, on the instance, which would pass a class over in silence."""
    _, model = unets
    before = state(model)
    site = next(iter(ldm.find_places(model).values()))
    attn = site.layers["attn"]
    attn.forward = attn.forward
    try:
        with pytest.raises(RuntimeError, match=r"attn layer has a `forward` of its own, set by something else"):
            ldm.apply(model, TokenFusionConfig(0.5))
    finally:
        del attn.forward
    assert state(model) == before


def test_what_cannot_be_fused_here_is_refused_in_words(unets):
    _, model = unets
    before = state(model)
    with pytest.raises(ValueError, match="mlp layers cannot be merged here, only self-attention"):
        ldm.apply(model, TokenFusionConfig(0.5, merge_mlp=True))
    with pytest.raises(ValueError, match="min_tokens is 'auto', which is measured in diffusers only"):
        ldm.apply(model, TokenFusionConfig(0.5, min_tokens="auto"))
    with pytest.raises(ValueError, match="no eligible block in Linear"):
        ldm.apply(nn.Linear(2, 2), TokenFusionConfig(0.5))
    assert state(model) == before


def test_a_program_keeps_one_class_for_each_kind_of_attention():
    assert ldm.merged_attention(CrossAttention) is ldm.merged_attention(CrossAttention)
    assert issubclass(ldm.merged_attention(CrossAttention), CrossAttention)


# --- in the UNets of ldm and sgm themselves ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What was found, in a process of its own, and the folder of what was drawn."""
    program, python = os.environ.get("A1111"), os.environ.get("A1111_PYTHON", sys.executable)
    there = Path(program or "") / "repositories"
    if not program or not there.exists():
        pytest.skip("A1111 names no checkout of AUTOMATIC1111 that has its repositories/")
    folder, root = tmp_path_factory.mktemp("ldm"), Path(__file__).resolve().parents[2]
    paths = [there / "stable-diffusion-stability-ai", there / "generative-models", root, HELPERS]
    ran = subprocess.run(
        [python, str(HELPERS / "ldm_run.py"), str(folder)], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {"folder": folder, **json.loads(ran.stdout.splitlines()[-1])}


@pytest.mark.parametrize(("kind", "module", "blocks"), [("sd15", "ldm", "5 of 16"), ("sdxl", "sgm", "10 of 70")])
def test_in_the_real_unets_is_drawn_what_diffusers_draws_and_nothing_is_left(said, kind, module, blocks):
    assert said[kind]["class"].split(".")[0] == module
    assert f"on {blocks} transformer blocks" in said[kind]["headline"]
    assert set(said[kind]["laws"].values()) == {True}
    found = twins.read(kind, said["folder"] / kind, match_on="hidden")
    assert max(found["plain"], *found["fused"].values()) < 1e-4, found  # to rounding
    assert found["effect"] > 1e-2


def sampled(
    unet: Any, fusion: TokenFusionConfig | None, ts: tuple[float, ...] = (900.0, 700.0, 500.0, 300.0)
) -> list[Any]:
    """The predictions of one sampling by a program that joins the conditioning again in each call."""
    call = tiny.inputs(tiny.sd15_unet())
    if fusion is not None:
        ldm.apply(unet, fusion)
    with torch.no_grad():
        made = [unet(call["sample"], torch.tensor([t, t]), context=call["encoder_hidden_states"].clone()) for t in ts]
    ldm.restore(unet)
    return made


def test_maps_serve_several_steps_though_the_conditioning_is_another_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """AUTOMATIC1111 joins it again in each call; a patch is there for one sampling, so equal content belongs to it."""
    unet, matched, match = UNetModel(tiny.sd15_unet(), PlainBlock), [], matching.most_similar
    monkeypatch.setattr(matching, "most_similar", lambda *args: (matched.append(1), match(*args))[1])
    for every, times in ((1, 4), (2, 2), (4, 1)):
        matched.clear()
        sampled(unet, TokenFusionConfig(0.5, match_interval=every))
        assert len(matched) == 5 * times


def test_a_threshold_merges_from_the_second_step_on() -> None:
    unet = UNetModel(tiny.sd15_unet(), PlainBlock)
    plain, fixed = sampled(unet, None), sampled(unet, TokenFusionConfig(0.5))
    adaptive = sampled(unet, TokenFusionConfig(0.5, threshold=-1.0))
    assert torch.equal(adaptive[0], plain[0])
    assert all(torch.equal(one, other) for one, other in zip(adaptive[1:], fixed[1:], strict=True))
