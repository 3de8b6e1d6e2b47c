"""The benchmark of diffusion transformers: real sizes, ceilings as counted elsewhere, an ideal that is one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from eval import bench as bench_module
from eval.families.tiny import FLUX
from eval.speed import tables
from eval.speed import transformer_shapes as shapes
from eval.speed.ideal import ideal
from eval.speed.transformer_shapes import CASES, TransformerCase
from tofu_sd.core.proportional import SDPA
from tofu_sd.hosts.diffusers_transformers import host_of

CPU = torch.device("cpu")
PIXARTS_HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": (
        "SD3Transformer2DModel",
        {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16,
         "joint_attention_dim": 16, "pooled_projection_dim": 16, "dual_attention_layers": (0,)},
    ),
    "pixart": ("PixArtTransformer2DModel", {**PIXARTS_HEADS, "num_layers": 2, "cross_attention_dim": 16,
                                            "caption_channels": 16, "sample_size": 16}),
    "flux1": ("FluxTransformer2DModel", {**FLUX, "pooled_projection_dim": 16, "guidance_embeds": True}),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
         "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)},
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
         "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64]},
    ),
}  # fmt: skip
SMALL_CASES = {name: TransformerCase(f"{name}-128", name, kind, shape, 128) for name, (kind, shape) in SMALL.items()}
small_cases = pytest.mark.parametrize("name", SMALL_CASES)

# (a), (a'), (b), (b'), (c), (∞) at 1024 and 2048 px, by torch's FlopCounterMode over whole models on the meta device
COUNTED: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "sd3-medium": ((1.30, 1.50, 1.18, 1.25, 2.19, 1.48), (1.91, 2.15, 1.46, 1.53, 2.87, 2.82)),
    "sd3.5-medium": ((1.37, 1.67, 1.22, 1.32, 2.30, 1.60), (2.09, 2.41, 1.53, 1.61, 3.01, 3.34)),
    "sd3.5-large": ((1.20, 1.40, 1.12, 1.20, 2.09, 1.30), (1.65, 1.89, 1.35, 1.43, 2.66, 2.15)),
    "flux1": ((1.16, 1.31, 1.10, 1.17, 1.98, 1.25), (1.54, 1.73, 1.30, 1.38, 2.53, 1.92)),
    "pixart-sigma": ((1.32, 1.51, 1.20, 1.27, 2.39, 1.48), (1.98, 2.19, 1.49, 1.55, 2.99, 2.95)),
    "qwen-image": ((1.16, 1.37, 1.10, 1.19, 2.13, 1.23), (1.54, 1.79, 1.31, 1.39, 2.59, 1.90)),
    "z-image": ((1.13, 1.33, 1.08, 1.17, 2.10, 1.18), (1.45, 1.69, 1.26, 1.34, 2.50, 1.72)),
}
PARAMETERS = {
    "sd3-medium": 2.03, "sd3.5-medium": 2.24, "sd3.5-large": 8.06, "flux1": 11.90, "qwen-image": 20.43,
    "z-image": 6.15, "pixart-sigma": 0.61,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_ceilings_equal_the_counted_ones(name: str) -> None:
    """Within 2 %: embeddings are not part of them, nor Z-Image's refiners."""
    for pixels, expected in zip(shapes.PIXELS, COUNTED[name], strict=True):
        found = CASES[f"{name}-{pixels}"].ceilings(0.5)
        assert list(found.values()) == pytest.approx(expected, rel=0.02)


def test_every_case_has_counted_ceilings() -> None:
    assert {f"{name}-{pixels}" for name in COUNTED for pixels in shapes.PIXELS} == set(CASES)


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_the_published_size(name: str) -> None:
    """In billions of parameters; Flux's embedding of guidance adds 0.01."""
    model = CASES[f"{name}-1024"].on_meta()
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], abs=0.016)


class Lengths(TorchFunctionMode):
    """Inside, the numbers of queries and keys of each attention are appended to `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SDPA:
            query, key = args[:2] if args else (kwargs["query"], kwargs["key"])
            self.seen.append((query.shape[2], key.shape[2]))
        return func(*args, **(kwargs or {}))


def lengths(model: Any, call: Any) -> list[tuple[int, int]]:
    with Lengths() as seen, torch.no_grad():
        result = model(call.sample, torch.tensor(500.0), **call.more)
    assert len(result) == len(call.sample)
    return seen.seen


@small_cases
def test_block_model_has_one_block_of_each_kind(name: str) -> None:
    case = SMALL_CASES[name]
    part, _ = shapes.build(case, 2, CPU, torch.float32, whole=False)
    whole, _ = shapes.build(case, 2, CPU, torch.float32, whole=True)
    host: Any = host_of(whole)
    for kind in host.family.kinds:
        assert len(getattr(part.transformer, kind.blocks)) == 1
        assert len(getattr(whole.transformer, kind.blocks)) == 2


@small_cases
def test_ideal_attends_with_as_few_tokens_as_merging_leaves(name: str) -> None:
    """The image's 64 tokens become 32. The text's tokens and attention of the text alone stay."""
    case = SMALL_CASES[name]
    model, call = shapes.build(case, 2, CPU, torch.float32, whole=False)
    before = lengths(model, call)
    with ideal(model, 0.5, case.latent):
        after = lengths(model, call)
        again = lengths(model, call)
    assert after == again
    host: Any = host_of(model)
    merged = [
        layer for block in host.find_blocks(model.transformer) for layer in block.layers if layer.startswith("attn")
    ]
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(changed) == len(merged)
    assert all((a[0] - 32, a[1] - 32) == b for a, b in changed)


@small_cases
def test_rows_and_ceilings_of_a_transformer(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.setitem(bench_module.TRANSFORMERS, "small-128", SMALL_CASES[name])
    out = tmp_path / "b.json"
    options = ["--case", "small-128", "--device", "cpu", "--rounds", "2", "--out", str(out)]
    assert bench_module.main([*options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == [
        "baseline", "ideal", "tofu+p", "tome+p", "tome+p@window=8", "kv:tome+p@matching=cells",
    ]  # fmt: skip
    assert not [row["skipped"] for row in rows if "skipped" in row]
    assert rows[0]["scope"] == "block"
    expected = SMALL_CASES[name].ceilings(0.5)
    assert all(row["ceilings"] == expected for row in rows)
    text = tables.markdown(tables.read(out), {})
    assert "one block of each kind" in text
    assert f"by FLOPs: all {expected['all']:.2f}×, all, projections too" in text


def test_ceilings_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(bench_module.TRANSFORMERS, "small-128", SMALL_CASES["pixart"])
    assert bench_module.main(["--case", "small-128", "--device", "cpu", "--rounds", "2", "--method", "tofu+p"]) == 0
    expected = SMALL_CASES["pixart"].ceilings(0.5)["keys and values"]
    assert f"keys and values {expected:.2f}×" in " ".join(capsys.readouterr().out.split())


def test_scope_that_transformers_do_not_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_module.main(["--case", "sd3-medium-1024", "--scope", "attention"]) == 2
    assert "sd3-medium-1024 is a transformer, which has no scope attention" in capsys.readouterr().err


def test_methods_of_unets_are_skipped_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tomesd")
    monkeypatch.setitem(bench_module.TRANSFORMERS, "small-128", SMALL_CASES["sd3"])
    options = ["--case", "small-128", "--device", "cpu", "--rounds", "2", "--json", "--method", "tomesd,todo"]
    assert bench_module.main(options) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["skipped"] for row in rows[2:])
