"""The stand-in has Stable Diffusion 1.5's sizes, and the paper's suite runs on its folder from end to end."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextConfig, CLIPTextModel

import tofu_sd
from eval import run as run_module
from eval.common import files
from eval.speed import model_shapes as shapes
from eval.speed import stand_in as standin

SMALL = {"block_out_channels": (8,) * 4, "norm_num_groups": 4}
needs_names = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="ImageNet's class names come from torchvision"
)


def test_stand_in_has_the_parameter_counts_of_sd15():
    """The counts of runwayml/stable-diffusion-v1-5's own files."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **shapes.SD15)
        parts = [unet, AutoencoderKL(**standin.VAE), CLIPTextModel(CLIPTextConfig(**standin.TEXT))]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [859_520_964, 83_653_863, 123_060_480]
    assert [row.size for row in tofu_sd.summary(tofu_sd.apply_patch(unet, 0.5)).rows] == [(64, 64)] * 5


@pytest.fixture
def small(monkeypatch):
    """The same at the smallest widths that run."""
    monkeypatch.setattr(standin, "VAE", {**standin.VAE, **SMALL, "sample_size": 64})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(standin, "TEXT", {**standin.TEXT, **sizes, "projection_dim": 16})
    shape = {**shapes.SD15, **SMALL, "attention_head_dim": 2, "cross_attention_dim": 16}
    monkeypatch.setitem(shapes.CASES, "sd15-512", shapes.Case("sd15-512", shape, 64))


@needs_names
def test_paper_suite_runs_on_the_stand_in(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert standin.main(["model"]) == 0
    typed = ["--model", "model", "--limit", "2", "--steps", "2", "--size", "168", "--device", "cpu", "--out", "out"]
    assert run_module.main(["--suite", "paper", *typed]) == 0
    found = files.read_json(tmp_path / "out" / "results.json")
    assert [row["method"] for row in found["rows"]] == ["baseline", "tome", "tofu", "baseline, other seeds"]
    assert found["settings"]["prompts"] == "imagenet1k"
    assert (found["settings"]["n"], found["settings"]["of"]) == (2, 2000)
    full, _, tofu, _ = (row["metrics"]["MS-SSIM"]["value"] for row in found["rows"])
    assert full == 1
    assert tofu < 1
    assert not any(row["flat"] for row in found["rows"])


@needs_names
def test_stand_in_is_deterministic(small, tmp_path):
    generated = [
        torch.cat([p.flatten() for part in ("unet", "vae", "text_encoder") for p in getattr(pipe, part).parameters()])
        for pipe in (standin.build(["a fox"]), standin.build(["a fox"]))
    ]
    assert torch.equal(*generated)


@needs_names
def test_full_disk_leaves_no_partial_stand_in(small, tmp_path, monkeypatch, capsys):
    def full(pipe, folder):
        Path(folder).mkdir()
        (Path(folder) / "half").write_text("")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(standin.StableDiffusionPipeline, "save_pretrained", full)
    assert standin.main([str(tmp_path / "model")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert standin.main([str(tmp_path / "mine")]) == 2
    assert capsys.readouterr().err == "error: mine exists already; give a new folder\n"
    assert list((tmp_path / "mine").iterdir()) == []
