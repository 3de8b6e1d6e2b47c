"""Functional linearity is 1 for a straight path and less for a curved one; it determines depth_split."""

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
def test_linear_map_has_linearity_one(seed, points):
    g = torch.Generator().manual_seed(seed)
    layer = nn.Linear(6, 4).double()
    x1, x2 = torch.randn(2, 3, 5, 6, generator=g, dtype=torch.float64)
    with torch.no_grad():
        linearity = functional_linearity(layer, x1, x2, points)
    assert linearity.shape == (3, 5)
    assert torch.allclose(linearity, torch.ones(3, 5), atol=1e-5)


def test_quarter_circle_linearity_is_chord_over_arc():
    """Computes Eq. 8 by hand: straight segments join the points of the arc."""

    def quarter_circle(x):
        angle = x[..., :1] * math.pi / 2
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    pieces = 10
    linearity = functional_linearity(quarter_circle, torch.tensor([[0.0]]), torch.tensor([[1.0]]), pieces + 1)
    arc = pieces * 2 * math.sin(math.pi / 4 / pieces)
    assert linearity.item() == pytest.approx(math.sqrt(2) / arc, abs=1e-6)


def test_linearity_decreases_with_curvature_between_0_and_1():
    x1, x2 = torch.full((1, 1), -1.0), torch.full((1, 1), 1.0)
    linearities = [
        functional_linearity(lambda x, b=b: torch.cat([x, b * x * x], -1), x1, x2).item() for b in (0.0, 0.5, 2.0, 8.0)
    ]
    assert linearities == sorted(linearities, reverse=True)
    assert linearities[0] == pytest.approx(1)
    assert 0 < linearities[-1] < 0.3
    there_and_back = functional_linearity(lambda x: x * x, x1, x2)
    assert there_and_back.item() == pytest.approx(0, abs=1e-6)


def test_equal_endpoints_have_linearity_one():
    x = torch.randn(2, 3)
    assert torch.equal(functional_linearity(lambda y: y, x, x), torch.ones(2))


def test_linearity_of_one_point_raises():
    with pytest.raises(ValueError, match="points is 1"):
        functional_linearity(lambda x: x, torch.zeros(1, 1), torch.ones(1, 1), points=1)


@pytest.mark.parametrize(
    ("curve", "d"),
    [
        ({0: 1.0, 1: 1.0, 2: 1.0}, 0),  # averaging has half the error of pruning
        ({0: 0.4, 1: 0.5, 2: 0.9, 3: 1.0}, 2),
        ({0: 0.4, 1: 0.5, 13: 0.6}, 14),  # no block is linear: pruning everywhere
        ({0: 0.72, 1: 0.70}, 0),  # 0.707 is between the two; pruning block 1 means pruning block 0 too
        ({0: 0.4, 1: 0.9, 2: 0.4, 3: 0.9}, 3),
        ({}, 0),
    ],
)
def test_best_split_minimizes_pair_error(curve, d):
    assert best_split(curve) == d


def test_averaging_beats_pruning_above_one_over_root_two():
    """The error model of best_split on triangles: ends 1 apart, the output of the mean h off their midpoint."""
    for h in (0.1, 0.49, 0.51, 2.0):
        ends, middle = torch.tensor([[-0.5, 0.0], [0.5, 0.0]]), torch.tensor([0.0, h])
        averaged = (ends - middle).pow(2).sum()
        fl = 1 / (2 * math.hypot(0.5, h))
        assert averaged.item() == pytest.approx(0.5 / fl**2, rel=1e-5)
        assert (averaged < 1) == (fl > 1 / math.sqrt(2)) == (h < 0.5)


@pytest.fixture(scope="module")
def pipe():
    return tiny.quiet(tiny.sd15_pipe())


def test_measuring_covers_every_block_and_step_and_leaves_model_unchanged(pipe):
    call = {"prompt": "a fox", "num_inference_steps": 2, "output_type": "latent"}
    before = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    hooks = [len(module._forward_pre_hooks) for module in pipe.unet.modules()]
    with measuring(pipe) as records:
        during = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(before, during)
    assert [len(module._forward_pre_hooks) for module in pipe.unet.modules()] == hooks
    blocks = len(tofu_sd.hosts.diffusers_unet.find_blocks(pipe.unet))
    assert {(record.depth, record.layer, record.call) for record in records} == {
        (d, layer, call) for d in range(blocks) for layer in ("attn", "mlp") for call in (0, 1)
    }
    assert all(0 < record.value <= 1 + 1e-5 and record.pairs > 0 for record in records)
    assert len({record.timestep for record in records}) == 2


def test_measured_pairs_are_the_merged_pairs(pipe, monkeypatch):
    """Half of 16 x 16 tokens are merged: 128 in each of two samples, or fewer if `pairs` limits them."""
    inputs = tiny.inputs(pipe.unet, 16, 16)
    for pairs, expected in ((1000, 2 * 128), (10, 20)):
        with measuring(pipe.unet, TokenFusionConfig(0.5), pairs) as records, torch.no_grad():
            pipe.unet(**inputs)
        assert records[0].pairs == expected
    with measuring(pipe.unet, TokenFusionConfig(0.0)) as records, torch.no_grad():
        pipe.unet(**inputs)
    assert records == []


def test_half_precision_dtype_linearity_agrees_with_float32(pipe):
    """Similar tokens can be as close to each other as adjacent 16-bit numbers."""
    records = {}
    for dtype in (torch.float32, torch.bfloat16):
        unet = tiny.sd15_unet().to(dtype)
        inputs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
                  for k, v in tiny.inputs(unet).items()}  # fmt: skip
        with measuring(unet) as records[dtype], torch.no_grad():
            unet(**inputs)
    for exact, half in zip(*records.values(), strict=True):
        assert half.value == pytest.approx(exact.value, abs=0.01)


def test_linear_layer_in_a_unet_has_linearity_one(pipe):
    unet = tiny.sd15_unet()
    block = tofu_sd.hosts.diffusers_unet.find_blocks(unet)[0]
    feed_forward = block.layers["mlp"]
    feed_forward.net = nn.ModuleList([nn.Linear(block.width, block.width)])
    with measuring(unet) as records, torch.no_grad():
        unet(**tiny.inputs(unet))
    values = {record.depth: record.value for record in records if record.layer == "mlp"}
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert min(values.values()) < 0.999


def test_auto_depth_split_of_a_pipeline_is_measured_and_reported(pipe, monkeypatch):
    curves = []
    monkeypatch.setattr(measurement, "best_split", lambda curve: curves.append(curve) or 3)
    with tofu_sd.patched(pipe, 0.5, depth_split="auto"):
        report = tofu_sd.summary(pipe)
    assert report.config.depth_split == 3
    assert list(curves[0]) == [row.depth for row in report.rows]  # only merged blocks determine the split
    with tofu_sd.patched(pipe, 0.5), tofu_sd.patched(pipe, 0.5, depth_split="auto"):
        pass  # measured on the unpatched model, not on the outer patch


def test_auto_depth_split_is_deterministic(pipe):
    curves = []
    for _ in range(2):
        with tofu_sd.patched(pipe, 0.5, depth_split="auto"):
            curves.append(tofu_sd.summary(pipe).config)
    assert curves[0] == curves[1]


def test_auto_depth_split_of_img2img_uses_the_text_to_image_pipeline():
    pipe = tiny.quiet(tiny.sd15_pipe(StableDiffusionImg2ImgPipeline))
    with tofu_sd.patched(pipe, 0.5, depth_split="auto"):
        assert isinstance(tofu_sd.summary(pipe).config.depth_split, int)


def test_auto_depth_split_without_text_to_image_pipeline_raises_and_changes_nothing(pipe):
    with pytest.raises(ValueError, match=r"needs a text-to-image pipeline; this is a UNet2D.*: give a number"):
        tofu_sd.apply_patch(pipe.unet, 0.5, depth_split="auto")
    assert tofu_sd.summary(pipe).config is None
    with tofu_sd.patched(pipe), pytest.raises(ValueError, match="is patched"), measuring(pipe):
        pass
    with pytest.raises(ValueError, match="depth_split is 'soon'; it must be None, 'auto' or an integer >= 0"):
        TokenFusionConfig(0.5, depth_split="soon")
    with pytest.raises(ValueError, match="is measured on a pipeline of diffusers"):
        TokenFusionConfig(0.5, depth_split="auto").reductions_at(0, 2)


def test_command_prints_every_block_and_the_split_and_repeats_it_from_file(pipe, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measurement, "load", lambda model: pipe)
    path, plot = str(tmp_path / "curve.json"), tmp_path / "curve.svg"
    assert command.main(["--steps", "1", "--prompt", "a fox", "--out", path]) == 0
    output = capsys.readouterr().out
    blocks = tofu_sd.hosts.diffusers_unet.find_blocks(pipe.unet)
    assert sum(f"| {block.name.replace('.transformer_blocks', '')} |" in output for block in blocks) == len(blocks)
    assert output.count(" \\* |") == len(Curve.read(path).merged) == 5
    assert f"depth_split={Curve.read(path).depth_split}, by" in output
    assert command.main(["--table", path, "--plot", str(plot)]) == 0
    assert capsys.readouterr().out == output
    assert "<svg" in plot.read_text()


def test_command_reports_invalid_options_in_one_line(pipe, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measurement, "load", lambda model: pipe)
    assert command.main(["--ratio", "2"]) == 2
    assert "ratio is 2.0" in capsys.readouterr().err
    assert command.main(["--table", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"rows": []}')
    (tmp_path / "empty.json").write_text('{"model": "a", "versions": "b", "merged": [], "measured": []}')
    for arguments, expected in (
        (["--table", str(tmp_path / "other.json")], "other.json holds no measurements of this program"),
        (["--table", str(tmp_path / "empty.json")], "empty.json holds no measurements of this program"),
        (["--ratio", "0"], "ratio is 0; pairs are measured that would be merged, so it must be above 0"),
        (["--ratio", "1e-4", "--steps", "1"], "ratio is 0.0001; at this size it would merge no token"),
        (["--steps", "0"], "steps is 0; it must be an integer >= 1"),
        (["--images", str(tmp_path), "--steps", "3"], "--steps applies to text-to-image models, and --images to"),
    ):
        assert command.main(arguments) == 2
        message = capsys.readouterr().err
        assert expected in message
        assert message.count("\n") == 1


def test_command_rejects_folder_without_images(capsys, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
    assert command.main(["--images", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "there are no images in" in message
    assert message.count("\n") == 1


def test_command_measures_a_classifier_on_images(monkeypatch, capsys, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
    from PIL import Image

    model = timm.create_model("vit_tiny_patch16_224", depth=3)
    for i in range(2):
        Image.effect_noise((300, 260), 90).convert("RGB").save(tmp_path / f"{i}.png")
    assert command.main(["--model", "vit_tiny_patch16_224"]) == 2
    assert "which needs images: --images DIR" in capsys.readouterr().err
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    path, plot = str(tmp_path / "curve.json"), tmp_path / "curve.svg"
    options = ["--model", "vit_tiny_patch16_224", "--images", str(tmp_path), "--out", path, "--plot", str(plot)]
    assert command.main(options) == 0
    output = capsys.readouterr().out
    assert output.startswith("| block | depth | attention | feed-forward |\n")
    assert output.count("| blocks.") == 3
    assert "vit_tiny_patch16_224: 2 images" in output
    json.loads(Path(path).read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    curve = Curve.read(path)
    assert f"depth_split={curve.depth_split}, by the feed-forward of the layers" in output
    whole = {(c, d, layer) for c in range(2) for d in range(3) for layer in LAYERS}
    assert {(record.call, record.depth, record.layer) for record in curve.measured} == whole
    assert "<svg" in plot.read_text()


def test_package_import_does_not_import_its_command():
    """Python warns if `-m` runs a module that is already imported."""
    completed = subprocess.run(
        [sys.executable, "-m", "tofu_sd.linearity", "--table", "none"], capture_output=True, text=True
    )
    assert completed.returncode == 2
    assert "RuntimeWarning" not in completed.stderr
