"""Functional linearity: what is straight has 1, what curves has less, and from it comes the split."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tofu_sd
from tofu_sd import TokenFusionConfig
from tofu_sd.linearity import Curve, measurement, measuring
from tofu_sd.linearity import __main__ as command
from tofu_sd.patching.linearity import LAYERS, best_split, functional_linearity


@given(st.integers(0, 2**31), st.integers(2, 20))
def test_of_a_linear_map_it_is_one(seed, points):
    g = torch.Generator().manual_seed(seed)
    layer = nn.Linear(6, 4).double()
    x1, x2 = torch.randn(2, 3, 5, 6, generator=g, dtype=torch.float64)
    with torch.no_grad():
        found = functional_linearity(layer, x1, x2, points)
    assert found.shape == (3, 5)
    assert torch.allclose(found, torch.ones(3, 5), atol=1e-5)


def test_of_a_quarter_of_a_circle_it_is_chord_over_arc():
    """Eq. 8 by hand: the points of the arc are joined by straight pieces."""

    def circle(x):
        angle = x[..., :1] * math.pi / 2
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    pieces = 10
    found = functional_linearity(circle, torch.tensor([[0.0]]), torch.tensor([[1.0]]), pieces + 1)
    arc = pieces * 2 * math.sin(math.pi / 4 / pieces)
    assert found.item() == pytest.approx(math.sqrt(2) / arc, abs=1e-6)


def test_it_falls_as_the_way_curves_and_lies_between_0_and_1():
    x1, x2 = torch.full((1, 1), -1.0), torch.full((1, 1), 1.0)
    bends = [
        functional_linearity(lambda x, b=b: torch.cat([x, b * x * x], -1), x1, x2).item() for b in (0.0, 0.5, 2.0, 8.0)
    ]
    assert bends == sorted(bends, reverse=True)
    assert bends[0] == pytest.approx(1)
    assert 0 < bends[-1] < 0.3
    there_and_back = functional_linearity(lambda x: x * x, x1, x2)
    assert there_and_back.item() == pytest.approx(0, abs=1e-6)


def test_where_there_is_no_way_nothing_is_lost():
    x = torch.randn(2, 3)
    assert torch.equal(functional_linearity(lambda y: y, x, x), torch.ones(2))


def test_a_way_has_two_ends():
    with pytest.raises(ValueError, match="points is 1"):
        functional_linearity(lambda x: x, torch.zeros(1, 1), torch.ones(1, 1), points=1)


@pytest.mark.parametrize(
    ("curve", "d"),
    [
        ({0: 1.0, 1: 1.0, 2: 1.0}, 0),  # averaging costs half of what pruning does
        ({0: 0.4, 1: 0.5, 2: 0.9, 3: 1.0}, 2),
        ({0: 0.4, 1: 0.5, 13: 0.6}, 14),  # nothing is straight: pruning everywhere
        ({0: 0.72, 1: 0.70}, 0),  # 0.707 lies between the two; one early block is not worth pruning for another's sake
        ({0: 0.4, 1: 0.9, 2: 0.4, 3: 0.9}, 3),
        ({}, 0),
    ],
)
def test_the_split_makes_the_pairs_error_least(curve, d):
    assert best_split(curve) == d


def test_averaging_half_way_beats_pruning_above_one_over_root_two():
    """The error model of best_split, on triangles: ends D apart, the average h beside their middle."""
    for h in (0.1, 0.49, 0.51, 2.0):
        ends, middle = torch.tensor([[-0.5, 0.0], [0.5, 0.0]]), torch.tensor([0.0, h])
        averaged = (ends - middle).pow(2).sum()
        fl = 1 / (2 * math.hypot(0.5, h))
        assert averaged.item() == pytest.approx(0.5 / fl**2, rel=1e-5)
        assert (averaged < 1) == (fl > 1 / math.sqrt(2)) == (h < 0.5)


@pytest.fixture(scope="module")
def pipe():
    return tiny.quiet(tiny.sd15_pipe())


def test_every_block_is_measured_at_every_step_and_the_model_stays_as_it_was(pipe):
    call = {"prompt": "a fox", "num_inference_steps": 2, "output_type": "latent"}
    before = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    hooks = [len(module._forward_pre_hooks) for module in pipe.unet.modules()]
    with measuring(pipe) as found:
        during = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(before, during)
    assert [len(module._forward_pre_hooks) for module in pipe.unet.modules()] == hooks
    blocks = len(tofu_sd.hosts.diffusers_unet.find_blocks(pipe.unet))
    assert {(one.depth, one.layer, one.call) for one in found} == {
        (d, role, call) for d in range(blocks) for role in ("attn", "mlp") for call in (0, 1)
    }
    assert all(0 < one.value <= 1 + 1e-5 and one.pairs > 0 for one in found)
    assert len({one.timestep for one in found}) == 2


def test_the_pairs_are_those_that_would_be_fused(pipe, monkeypatch):
    """Half of 16 x 16 tokens leave: 128 of each of two samples, or as many of them as are asked for."""
    inputs = tiny.inputs(pipe.unet, 16, 16)
    for pairs, expected in ((1000, 2 * 128), (10, 20)):
        with measuring(pipe.unet, TokenFusionConfig(0.5), pairs) as found, torch.no_grad():
            pipe.unet(**inputs)
        assert found[0].pairs == expected
    with measuring(pipe.unet, TokenFusionConfig(0.0)) as found, torch.no_grad():
        pipe.unet(**inputs)
    assert found == []


def test_half_precision_measures_what_float32_does(pipe):
    """Like tokens lie as near to each other as numbers of 16 bits do."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        unet = tiny.sd15_unet().to(dtype)
        inputs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
                  for k, v in tiny.inputs(unet).items()}  # fmt: skip
        with measuring(unet) as found[dtype], torch.no_grad():
            unet(**inputs)
    for exact, half in zip(*found.values(), strict=True):
        assert half.value == pytest.approx(exact.value, abs=0.01)


def test_a_layer_that_is_linear_between_tokens_has_one(pipe):
    unet = tiny.sd15_unet()
    site = tofu_sd.hosts.diffusers_unet.find_blocks(unet)[0]
    feed_forward = site.layers["mlp"]
    feed_forward.net = nn.ModuleList([nn.Linear(site.width, site.width)])
    with measuring(unet) as found, torch.no_grad():
        unet(**tiny.inputs(unet))
    values = {one.depth: one.value for one in found if one.layer == "mlp"}
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert min(values.values()) < 0.999


def test_the_split_of_a_pipeline_is_measured_and_said(pipe, monkeypatch):
    seen = []
    monkeypatch.setattr(measurement, "best_split", lambda curve: seen.append(curve) or 3)
    with tofu_sd.patched(pipe, 0.5, depth_split="auto"):
        report = tofu_sd.summary(pipe)
    assert report.config.depth_split == 3
    assert list(seen[0]) == [row.depth for row in report.rows]  # the fused blocks alone decide
    with tofu_sd.patched(pipe, 0.5), tofu_sd.patched(pipe, 0.5, depth_split="auto"):
        pass  # measured on the model itself, not on what is patched already


def test_measured_again_it_is_the_same(pipe):
    curves = []
    for _ in range(2):
        with tofu_sd.patched(pipe, 0.5, depth_split="auto"):
            curves.append(tofu_sd.summary(pipe).config)
    assert curves[0] == curves[1]


def test_it_is_measured_through_the_text_to_image_pipeline_of_another_kind():
    pipe = tiny.quiet(tiny.sd15_pipe(StableDiffusionImg2ImgPipeline))
    with tofu_sd.patched(pipe, 0.5, depth_split="auto"):
        assert isinstance(tofu_sd.summary(pipe).config.depth_split, int)


def test_what_draws_no_pictures_is_refused_and_stays_as_it_was(pipe):
    with pytest.raises(ValueError, match=r"needs a text-to-image pipeline; this is a UNet2D.*: give a number"):
        tofu_sd.apply_patch(pipe.unet, 0.5, depth_split="auto")
    assert tofu_sd.summary(pipe).config is None
    with tofu_sd.patched(pipe), pytest.raises(ValueError, match="is patched"), measuring(pipe):
        pass
    with pytest.raises(ValueError, match="depth_split is 'soon'; it must be None, 'auto' or an integer >= 0"):
        TokenFusionConfig(0.5, depth_split="soon")
    with pytest.raises(ValueError, match="is measured on a pipeline of diffusers"):
        TokenFusionConfig(0.5, depth_split="auto").reduction_at(0, 2)


def test_the_command_prints_every_block_and_the_split_and_again_from_its_file(pipe, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measurement, "load", lambda model: pipe)
    kept, drawn = str(tmp_path / "curve.json"), tmp_path / "curve.svg"
    assert command.main(["--steps", "1", "--prompt", "a fox", "--out", kept]) == 0
    said = capsys.readouterr().out
    sites = tofu_sd.hosts.diffusers_unet.find_blocks(pipe.unet)
    assert sum(f"| {site.name.replace('.transformer_blocks', '')} |" in said for site in sites) == len(sites)
    assert said.count(" \\* |") == len(Curve.read(kept).merged) == 5
    assert f"depth_split={Curve.read(kept).depth_split}, by" in said
    assert command.main(["--table", kept, "--plot", str(drawn)]) == 0
    assert capsys.readouterr().out == said
    assert "<svg" in drawn.read_text()


def test_the_command_says_what_is_wrong(pipe, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measurement, "load", lambda model: pipe)
    assert command.main(["--ratio", "2"]) == 2
    assert "ratio is 2.0" in capsys.readouterr().err
    assert command.main(["--table", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"rows": []}')
    (tmp_path / "empty.json").write_text('{"model": "a", "versions": "b", "merged": [], "measured": []}')
    for arguments, said in (
        (["--table", str(tmp_path / "other.json")], "other.json holds no measurements of this program"),
        (["--table", str(tmp_path / "empty.json")], "empty.json holds no measurements of this program"),
        (["--ratio", "0"], "ratio is 0; pairs are measured that would be merged, so it must be above 0"),
        (["--ratio", "1e-4", "--steps", "1"], "ratio is 0.0001; at this size it would merge no token"),
        (["--steps", "0"], "steps is 0; it must be an integer >= 1"),
        (["--images", str(tmp_path), "--steps", "3"], "--steps applies to text-to-image models, and --images to"),
    ):
        assert command.main(arguments) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1


def test_a_folder_without_pictures_is_refused(capsys, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
    assert command.main(["--images", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "there are no images in" in told
    assert told.count("\n") == 1


def test_the_command_measures_a_classifier_on_pictures(monkeypatch, capsys, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
    from PIL import Image

    made = timm.create_model("vit_tiny_patch16_224", depth=3)
    for i in range(2):
        Image.effect_noise((300, 260), 90).convert("RGB").save(tmp_path / f"{i}.png")
    assert command.main(["--model", "vit_tiny_patch16_224"]) == 2
    assert "which needs images: --images DIR" in capsys.readouterr().err
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: made)
    kept, drawn = str(tmp_path / "curve.json"), tmp_path / "curve.svg"
    asked = ["--model", "vit_tiny_patch16_224", "--images", str(tmp_path), "--out", kept, "--plot", str(drawn)]
    assert command.main(asked) == 0
    said = capsys.readouterr().out
    assert said.startswith("| depth | block | attention | feed-forward |\n")
    assert said.count("| blocks.") == 3
    assert "vit_tiny_patch16_224: 2 images" in said
    json.loads(Path(kept).read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    curve = Curve.read(kept)
    assert f"depth_split={curve.depth_split}, by the feed-forward of the layers" in said
    whole = {(c, d, role) for c in range(2) for d in range(3) for role in LAYERS}
    assert {(one.call, one.depth, one.layer) for one in curve.measured} == whole
    assert "<svg" in drawn.read_text()


def test_the_package_does_not_bring_its_program_with_it():
    """Python warns of a module that is run and was imported already."""
    told = subprocess.run(
        [sys.executable, "-m", "tofu_sd.linearity", "--table", "none"], capture_output=True, text=True
    )
    assert told.returncode == 2
    assert "RuntimeWarning" not in told.stderr
