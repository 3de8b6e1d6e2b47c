"""Properties of every patched diffusion transformer, on tiny models of each family."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from anatomy import anatomy
from tiny_transformers import MODELS, Tiny
from torch import Tensor
from torch.utils._pytree import tree_map

import tofu_sd
from tofu_sd.hosts.diffusers_transformers import host_of

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "without proportional attention": {"proportional": False},
    "kv_only": {"kv_only": True},
    "mean everywhere": {"early": "mean", "late": "mean"},
    "queries and keys apart": {"early": "mlerp", "late": "mlerp", "kv_early": "partial_mlerp", "kv_late": "mean"},
    "windows": {"window": 2},
    "pairs": {"matching": "pairs"},
    "pairs twice": {"matching": "pairs", "ratio": 0.75, "kv_only": True},
    "cells": {"matching": "cells", "ratio": 0.75, "kv_only": True, "early": "mean", "late": "mean"},
    "soft matching": {"temperature": 0.1, "early": "mean", "late": "mean", "window": 3, "sy": 1},
    "random destinations": {"seed": 3},
    "normed": {"match_on": "normed"},
    "step window": {"start": 0.2, "end": 0.8},
    "depth split": {"depth_split": 1},
    "shared maps": {"share_across_blocks": True},
    "match interval": {"match_interval": 2},
    "min_tokens": {"min_tokens": 60},
}
LATENT = (16, 16)  # of 8 x 8 tokens
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
families = pytest.mark.parametrize("family", MODELS.values(), ids=MODELS)


# --- ratio 0, and undo ------------------------------------------------------------------------------------------------


@families
@options
def test_ratio_0_equals_the_baseline_and_undo_is_exact(family: Tiny, options: dict[str, Any]) -> None:
    model = family.make()
    baseline, before = family.predict(model), anatomy(model)
    merged = family.predict(tofu_sd.apply_patch(model, **{"ratio": 0.5, **options}))
    assert merged.isfinite().all()
    assert not torch.equal(merged, baseline)
    tofu_sd.remove_patch(model)
    assert anatomy(model) == before
    assert torch.equal(family.predict(model), baseline)
    if "temperature" not in options:  # whose ratio follows from its cells
        assert torch.equal(family.predict(tofu_sd.apply_patch(model, **{**options, "ratio": 0.0})), baseline)


@families
def test_patched_restores_the_outer_patch(family: Tiny) -> None:
    model = family.make()
    with tofu_sd.patched(model, 0.5):
        outer = family.predict(model)
        with tofu_sd.patched(model, 0.25, kv_only=True):
            assert not torch.equal(family.predict(model), outer)
        assert torch.equal(family.predict(model), outer)
    assert not any("_tofu" in vars(module) for module in model.modules())


# --- copies -----------------------------------------------------------------------------------------------------------


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@families
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_copy_is_patched_and_independent(family: Tiny, copied: Callable[[Any], Any]) -> None:
    model = family.make()
    baseline = family.predict(model)
    merged = family.predict(tofu_sd.apply_patch(model, 0.5))
    other = copied(model)
    assert torch.equal(family.predict(other), merged)
    tofu_sd.remove_patch(model)
    assert torch.equal(family.predict(other), merged)
    assert torch.equal(family.predict(model), baseline)
    assert torch.equal(family.predict(tofu_sd.remove_patch(other)), baseline)


@families
def test_saved_model_is_unpatched(family: Tiny, tmp_path: Path) -> None:
    model = family.make()
    baseline, names = family.predict(model), list(model.state_dict())
    tofu_sd.apply_patch(model, 0.5)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert not any(b"tofu" in file.read_bytes() for file in tmp_path.iterdir())
    assert torch.equal(family.predict(type(model).from_pretrained(tmp_path).eval()), baseline)


# --- reproducibility and sizes ----------------------------------------------------------------------------------------


@families
def test_image_is_independent_of_its_batch(family: Tiny) -> None:
    """In float64, as matrix products of two sizes round differently, and cosines that are nearly equal may swap."""
    model = tofu_sd.apply_patch(family.make().double(), 0.5)
    call = tree_map(lambda v: v.double() if isinstance(v, Tensor) else v, family.inputs(batch=3))
    alone = {k: v[1:2] if isinstance(v, Tensor | list) and len(v) == 3 else v for k, v in call.items()}
    assert torch.allclose(family.predict(model, **call)[1:2], family.predict(model, **alone), atol=1e-9)


@families
def test_result_is_independent_of_earlier_sizes(family: Tiny) -> None:
    model = tofu_sd.apply_patch(family.make(), 0.5, window=2)
    first = family.predict(model)
    family.predict(model, h=6, w=10, batch=1)
    assert torch.equal(family.predict(model), first)


@families
@pytest.mark.parametrize(("h", "w"), [(6, 10), (5, 7), (4, 16), (1, 8)])
@pytest.mark.parametrize("options", [{}, {"window": 2}, {"matching": "cells"}, {"kv_only": True}], ids=str)
def test_all_sizes_are_merged(family: Tiny, h: int, w: int, options: dict[str, Any]) -> None:
    model = family.make()
    baseline = family.predict(model, h, w)
    merged = family.predict(tofu_sd.apply_patch(model, 0.5, **options), h, w)
    assert merged.shape == baseline.shape
    assert merged.isfinite().all()
    assert torch.equal(merged, baseline) == (h == 1 and "matching" in options)  # one row has no cells of 2 x 2


@families
def test_maps_have_the_size_of_the_image(family: Tiny) -> None:
    """A map of 6 x 10 tokens that was taken for 10 x 6 would merge tokens that are not neighbours."""
    model = tofu_sd.apply_patch(family.make(), 0.5, window=1)
    with tofu_sd.record_maps(model) as records:
        family.predict(model, 6, 10)
    blocks = len(host_of(model).find_blocks(model))
    assert [(record.h, record.w) for record in records] == [(6, 10)] * blocks
    for record in records:
        kept = record.map.kept_idx.gather(1, record.map.group_idx)
        n = torch.arange(60)
        assert ((kept // 10) // 2 == (n // 10) // 2).all()  # the same cell of 2 x 2
        assert ((kept % 10) // 2 == (n % 10) // 2).all()


# --- speed and summary ------------------------------------------------------------------------------------------------


@families
def test_nothing_is_merged_where_it_is_slower(family: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from tofu_sd.patching import autotune
    from tofu_sd.timing_cache import Timing

    monkeypatch.setattr(autotune.MergeRule, "_measure", lambda *_: Timing(full=1.0, merged=2.0))
    model = family.make()
    baseline = family.predict(model)
    assert torch.equal(family.predict(tofu_sd.apply_patch(model, 0.5)), baseline)
    assert "slower with merging" in tofu_sd.summary(model, LATENT).headline
    assert not torch.equal(family.predict(tofu_sd.apply_patch(model, 0.5, min_tokens=0)), baseline)


@families
@pytest.mark.parametrize("options", [{}, {"kv_only": True}, {"share_across_blocks": True}], ids=str)
def test_attention_is_timed_as_the_model_runs_it(
    family: Tiny, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tofu_sd.patching import autotune

    monkeypatch.setattr(autotune.MergeRule, "_measure", autotune.MergeRule._measure_for_real)
    model = tofu_sd.apply_patch(family.make(), 0.5, **options)
    with caplog.at_level("INFO", logger="tofu_sd"):
        family.predict(model)
    assert "cannot be timed" not in caplog.text
    assert all(row.pays is not None for row in tofu_sd.summary(model, LATENT).rows)


@families
def test_summary_counts_attention_modules_and_their_share(family: Tiny) -> None:
    model = family.make()
    report = tofu_sd.summary(tofu_sd.apply_patch(model, 0.5), LATENT)
    modules = [
        name for name, module in model.named_modules() if "_tofu" in vars(module) and hasattr(module, "processor")
    ]
    assert report.attention_modules == len(modules)
    assert f"{len(modules)} attention modules merged, attention takes" in report.headline
    assert "not patched" in tofu_sd.summary(family.make()).headline
    wide = tofu_sd.summary(model, latent=(128, 128))
    assert 0 < report.attention_share < wide.attention_share < 1  # it grows with the square of the map
    family.predict(model)
    assert "of them on merged tokens" in str(tofu_sd.summary(model))


@families
def test_options_without_effect_are_refused(family: Tiny) -> None:
    model = family.make()
    name = type(model).__name__
    for options, message in (
        ({"levels": 2}, f"levels is 2, and {name} has one resolution"),
        ({"depth_split": "auto"}, f"depth_split is 'auto', which is measured on UNets only, and this is a {name}"),
    ):
        with pytest.raises(ValueError, match=message):
            tofu_sd.apply_patch(model, 0.5, **options)
    for option, reason in host_of(model).family.refused.items():
        with pytest.raises(ValueError, match=f"{option} does not work with {name}: {reason}"):
            tofu_sd.apply_patch(model, 0.5, **{option: True})
    assert not any("_tofu" in vars(module) for module in model.modules())


# --- training, precision, compilers -----------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("options", [{}, {"kv_only": True}, {"kv_early": "mean"}], ids=str)
def test_gradient_checkpointing_keeps_the_gradients(family: Tiny, options: dict[str, Any]) -> None:
    model = tofu_sd.apply_patch(family.make().train(), 0.5, **options)

    # diffusers drops Chroma's mask in checkpointed single blocks
    call = {"attention_mask": None} if "attention_mask" in family.inputs() else {}

    def gradients() -> list[Tensor]:
        model.zero_grad()
        family.run(model, **call).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    whole = gradients()
    model.enable_gradient_checkpointing()
    assert whole
    assert all(torch.equal(a, b) for a, b in zip(whole, gradients(), strict=True))
    tofu_sd.remove_patch(model)
    assert not all(torch.equal(a, b) for a, b in zip(whole, gradients(), strict=True))


@families
def test_half_precision_runs(family: Tiny) -> None:
    model = tofu_sd.apply_patch(family.make().to(torch.bfloat16), 0.5)
    call = tree_map(lambda v: v.bfloat16() if isinstance(v, Tensor) else v, family.inputs())
    out = family.predict(model, **call)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


COMPILED: dict[str, dict[str, Any]] = {
    "default": {},
    "kv_only": {"kv_only": True},
    "queries and keys apart": {"kv_early": "mean", "kv_late": "mean"},
    "cells": {"matching": "cells", "ratio": 0.75, "kv_only": True},
}


@families
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("regional", [True, False], ids=["regional", "whole"])
def test_compiled_model_equals_the_eager_one(family: Tiny, options: dict[str, Any], regional: bool) -> None:
    """One graph without a break. The eager backend computes what the model does, so results are equal."""
    torch._dynamo.reset()
    model = family.make()
    baseline = family.predict(model)
    tofu_sd.apply_patch(model, **{"ratio": 0.5, **options})
    expected = family.predict(model)
    if regional:
        for info in host_of(model).find_blocks(model):
            model.get_submodule(info.name).compile(fullgraph=True, backend="eager")
        result = family.predict(model)
    else:
        tofu_sd.apply_patch(model, tofu_sd.summary(model).config, min_tokens=0)  # this map is smaller than the native
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        result = family.predict(compiled)
    assert torch.allclose(result, expected, atol=1e-6)  # reductions run in another operator
    assert not torch.allclose(result, baseline, atol=1e-3)


PUBLISHED: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "sd3-medium": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
        0.33,
        0.64,
    ),
    "sd3.5-medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "dual_attention_layers": tuple(range(13)),
        },
        0.38,
        0.70,
    ),
    "pixart-sigma": ("PixArtTransformer2DModel", {"caption_channels": 4096}, 0.33, 0.66),
    "flux.1": ("FluxTransformer2DModel", {}, 0.20, 0.48),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_share_of_published_models_equals_the_counted_one(name: str) -> None:
    """Counted once by torch's FlopCounterMode, at 1024 and 2048 px. Embeddings are not part of this count."""
    cls, options, at_1024, at_2048 = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(diffusers, cls)(**options)
    for side, expected in ((128, at_1024), (256, at_2048)):
        assert tofu_sd.summary(model, (side, side)).attention_share == pytest.approx(expected, abs=0.007)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler for C++")
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_compiled_code_equals_the_eager_model(name: str) -> None:
    """Inductor compares strides that contain the number of merged tokens, where it once failed on SD3."""
    torch._dynamo.reset()
    family = MODELS[name]
    model = tofu_sd.apply_patch(family.make(), 0.5, min_tokens=0)
    expected = family.predict(model)
    model.transformer_blocks[0].compile(fullgraph=True)
    assert torch.allclose(family.predict(model), expected, atol=1e-4)
