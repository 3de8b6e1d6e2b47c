"""The ablations command of AdaptiVision: each variant matches its row and is trained once."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")

from eval.reporting import pages
from research.adaptivision import ablations as condensation
from research.classifiers import datasets as labelled
from research.classifiers import models as classifiers
from research.classifiers import train
from research.demo_training.renders.scenes import nearness, render
from tofu_sd.demo.scene_classes import CLASSES


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory):
    """Limits the data to one training scene and one test scene per class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "PER_CLASS", 1)
        patch.setattr(train, "FRESH", 1)
        patch.setattr(condensation, "COUNTED", 2)
        rendered, guided, cache = labelled.rendered, labelled.guided, tmp_path_factory.mktemp("scenes")
        patch.setattr(labelled, "rendered", lambda *args: rendered(*args, cache=cache))
        patch.setattr(labelled, "guided", lambda *args: guided(*args, cache=cache))
        yield


def run(out, *more):
    few_samples = ["--samples", "32", "--depth", "1", "--seeds", "0", "--device", "cpu"]
    assert condensation.main(["--out", str(out), *few_samples, *more]) == 0
    return json.loads((out / "condensation.json").read_text())


@pytest.fixture(scope="module")
def trained(few_scenes, tmp_path_factory):
    """Returns the output folder and its results."""
    out = tmp_path_factory.mktemp("condensation")
    return out, run(out, "--of", "components,strategy")


def test_each_variant_has_the_parts_in_its_name_and_is_trained_once(few_scenes, trained, monkeypatch):
    tmp_path, results = trained
    rows = {row["variant"]: row for row in results["rows"]}
    assert list(rows) == ["all patches", "+ clusters", "+ clusters + focus", "+ clusters + focus + guidance",
                          "random patches", "important patches"]  # fmt: skip
    assert rows["all patches"]["tokens"] == 196
    for name in ("random patches", "important patches"):
        assert rows[name]["tokens"] == 48
        assert rows[name]["flops"] < rows["all patches"]["flops"]
    assert 12 <= rows["+ clusters"]["tokens"] <= 48
    # each variant has the parts in its name
    plain, clustered, guided = (
        classifiers.load(str(tmp_path / f"{name}-0"), torch.device("cpu"))[0].model
        for name in ("all-patches", "+-clusters", "+-clusters-+-focus-+-guidance")
    )
    assert plain.condense is None
    assert clustered.guide is None
    assert not clustered.layers[0].attention.rows.weight.any()  # attention is not modulated
    assert guided.guide is not None
    assert guided.layers[0].attention.rows.weight.any()
    monkeypatch.setattr(train, "train", None)  # is not called again
    assert run(tmp_path, "--of", "components,strategy")["rows"] == results["rows"]


def test_training_with_other_options_raises(few_scenes, trained, capsys):
    tmp_path, _ = trained
    for other, message in (("--samples", "samples 32, not 2"), ("--depth", "depth 1, not 2")):
        options = ["--out", str(tmp_path), "--samples", "32", "--depth", "1", "--seeds", "0", "--device", "cpu"]
        assert condensation.main([*options, other, "2", "--of", "components"]) == 2
        assert f"holds a training with {message}" in capsys.readouterr().err


def test_each_variant_is_trained_once_per_seed(few_scenes, tmp_path):
    only = [v for v in condensation.VARIANTS if v.name == "random patches"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(condensation, "VARIANTS", only)
        (row,) = run(tmp_path, "--of", "strategy", "--seeds", "3,4")["rows"]
    assert len(row["accuracy"]["by_seed"]) == 2
    folders = ",".join(str(tmp_path / f"random-patches-{seed}") for seed in (3, 4))
    one, other = classifiers.load(folders, torch.device("cpu"))
    assert not torch.equal(one.model.position, other.model.position)


def test_page_shows_the_tables(few_scenes, trained):
    page = f"<!-- python -m research.adaptivision.ablations --table {trained[0]} --of strategy -->\n<!-- end -->\n"
    filled = pages.filled(page)
    assert "**How tokens become fewer (table 5)**" in filled
    assert filled.count("\n| ") == 1 + 4
    assert "Trainings of seeds 0, 32 images each · 96 fresh scenes of 96 classes" in filled


def test_guidance_belongs_to_its_image(few_scenes, tmp_path):
    data = labelled.guided(labelled.rendered(16, 1, 5), 1, 5)
    assert data.guidance.shape == (96, 49, 16)
    near = nearness([CLASSES[7]], [5 + 7], 28)
    first = near[0, 0, :4, 4:8].flatten()  # the second piece of the top row
    assert torch.allclose(data.guidance[7, 1], first, atol=0.5 / 255 + 1e-6)
    assert torch.allclose(data.images[7][0], render([CLASSES[7]], [5 + 7], 16)[0], atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--of", "colours"], "unknown table 'colours'"),
        (["--seeds", "one"], "'one' is not an integer"),
        (["--clusters", "48"], "'48' is neither two numbers such as 16,64 nor none"),
        (["--clusters", "48,12"], "clusters is (48, 12); it must be the fewest and the most"),
        (["--table", "nowhere"], "nowhere holds no results of research.adaptivision.ablations"),
    ],
)
def test_invalid_options_print_an_error(few_scenes, tmp_path, capsys, options, message):
    assert condensation.main(["--out", str(tmp_path / "out"), "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_guidance_needs_scenes(tmp_path, capsys):
    assert (
        train.main(["--out", str(tmp_path / "out"), "--data", str(tmp_path), "--guided", "--kind", "adaptivision"]) == 2
    )
    assert "--guided needs scenes, whose depth is known" in capsys.readouterr().err
