"""Classifiers are trained the same again, resume, and refuse another training's folder."""

from __future__ import annotations

import shutil

import pytest
import torch
from classifier_run import SMALL

pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")

from eval import EvalError
from research.classifiers import datasets as labelled
from research.classifiers import models as classifiers
from research.classifiers import train
from tofu_sd import demo


def test_training_is_deterministic(images, tmp_path):
    few = ["--data", str(images), *SMALL, "--coarse", "128", "--samples", "128", "--seed", "3"]
    weights = []
    for name in ("a", "b"):
        assert train.main(["--out", str(tmp_path / name), *few]) == 0
        weights.append((tmp_path / name / classifiers.WEIGHTS).read_bytes())
    assert weights[0] == weights[1]


def test_folder_of_another_training_is_kept(images, tmp_path, capsys):
    few = ["--data", str(images), *SMALL, "--coarse", "64", "--samples", "64"]
    assert train.main(["--out", str(tmp_path / "a"), *few]) == 0
    weights = (tmp_path / "a" / classifiers.WEIGHTS).read_bytes()
    assert train.main(["--out", str(tmp_path / "a"), *few, "--seed", "1"]) == 2
    assert "a holds a training with seed 0, not 1" in capsys.readouterr().err
    shutil.copytree(images, tmp_path / "others")  # the same names, one image fewer
    (tmp_path / "others" / "train" / "shade0" / "0.png").unlink()
    few[1] = str(tmp_path / "others")
    assert train.main(["--out", str(tmp_path / "a"), *few]) == 2
    assert "a holds a training with pictures " in capsys.readouterr().err
    assert (tmp_path / "a" / classifiers.WEIGHTS).read_bytes() == weights


def test_training_resumes_with_a_copy_of_its_images_on_its_device(images, tmp_path, monkeypatch):
    """Cluster jobs copy their images to the node. "auto" is the device that is found there."""
    few = ["--out", str(tmp_path / "a"), *SMALL[:-2], "--coarse", "64", "--samples", "64"]
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cpu"))  # "auto" may be another device here
    assert train.main([*few, "--data", str(images)]) == 0
    copied = tmp_path / "copied" / images.name
    shutil.copytree(images, copied, copy_function=shutil.copyfile)  # with new dates
    assert train.main([*few, "--data", str(copied), "--device", "cpu"]) == 0


def test_training_saved_before_an_option_existed_resumes(tmp_path):
    train.init_output_dir(tmp_path, {"seed": 1, "gone": 2, "device": "auto"})  # as saved before "auto" was resolved
    with pytest.raises(EvalError, match="holds a training with seed 1, not 2"):
        train.init_output_dir(tmp_path, {"seed": 2})
    with pytest.raises(EvalError, match="holds a training with heads 3, not 4"):  # it had the default
        train.init_output_dir(tmp_path, {"seed": 1, "heads": 4})
    train.init_output_dir(tmp_path, {"seed": 1, "device": "cpu", "heads": 3})
    with pytest.raises(EvalError, match="holds a training with device cpu, not cuda"):
        train.init_output_dir(tmp_path, {"seed": 1, "device": "cuda", "heads": 3})


def test_rate_applies_to_fine_without_a_coarse_stage(images, tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(train, "fit", lambda name, model, loss, schedule, work: rates.append((name, schedule.rate)))
    sizes = ["--data", str(images), *SMALL, "--samples", "1", "--rate", "0.001"]
    for kind, own in (("adaptivision", ["--clusters", "2,4"]), ("vit", ["--coarse", "64"])):
        assert train.main(["--out", str(tmp_path / kind), *sizes, "--kind", kind, *own]) == 0
    assert rates == [("fine", 0.001), ("coarse", 0.001), ("fine", 0.0005)]


SIZES = {"side": 32, "width": 24, "depth": 2, "heads": 2}


@pytest.mark.parametrize("stem", classifiers.STEMS)
def test_refine_keeps_the_coarse_weights(stem):
    torch.manual_seed(0)
    coarse, same = (classifiers.Architecture(stem=stem, patch=16, **SIZES).build() for _ in range(2))
    train.refine(coarse, same)
    assert all(torch.equal(a, b) for a, b in zip(coarse.parameters(), same.parameters(), strict=True))
    fine = classifiers.Architecture(stem=stem, patch=8, **SIZES).build()
    train.refine(coarse, fine)
    if stem == "convolutions":
        before = coarse.state_dict()
        changed = [name for name, value in fine.state_dict().items() if value.shape != before[name].shape]
        assert changed == ["pos_embed"]
        assert torch.equal(fine.patch_embed.proj.weight, coarse.patch_embed.proj.weight)
    else:  # four flat patches have similar embeddings; their norm may differ
        image = torch.rand(1, 3, 2, 2).repeat_interleave(16, 2).repeat_interleave(16, 3)
        embeddings = [model.patch_embed(image).unflatten(1, (n, n))[0] for model, n in ((coarse, 2), (fine, 4))]
        assert (torch.nn.functional.cosine_similarity(embeddings[0], embeddings[1][::2, ::2], dim=-1) > 0.9).all()


def test_convolutions_start_from_the_demo_classifier_on_scenes(tmp_path):
    architecture = classifiers.Architecture(stem="convolutions", patch=8, **SIZES)
    scenes = labelled.rendered(8, 1, 70, cache=tmp_path)
    stem = train.initialized(architecture, scenes).patch_embed
    image = torch.rand(2, 3, 32, 32)
    maps = demo.load_classifier().maps(image)[2]  # [2, 80, 4, 4]
    tokens = stem.proj(maps).flatten(2).mT
    assert torch.allclose(stem(image), tokens, atol=1e-5)
    other = train.initialized(architecture, labelled.Labelled(scenes.images, scenes.classes, "mine", "")).patch_embed
    assert not torch.allclose(other(image), tokens, atol=1e-2)


def test_augmentation_depends_only_on_its_generator():
    images = torch.rand(4, 3, 16, 16)
    one, again = (train.augmented(images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, again)
    assert one.shape == images.shape
    assert not torch.equal(one, train.augmented(images, torch.Generator().manual_seed(6)))


PLAIN = ["--kind", "adaptivision", "--clusters", "none"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--patch", "5"], "side is 32; it must be a multiple of the patch's 5 pixels"),
        (["--stem", "roots"], "stem is 'roots'; it must be patches or convolutions"),
        (["--stem", "convolutions"], "patch is 4; before convolutions it must be a multiple of 8"),
        (["--heads", "5"], "width is 24; it must be a multiple of the 5 heads"),
        (["--kind", "swin"], "kind is 'swin'; it must be vit or adaptivision"),
        (["--data", "nowhere"], "there is no folder 'nowhere/train' of images"),
        (["--rate", "nan"], "argument --rate: 'nan' is not a finite number"),
        (["--rate", "-1"], "argument --rate: '-1' is not above 0"),
        (["--guided"], "--guided applies to adaptivision, and --kind is vit"),
        (["--clusters", "9,3"], "--clusters applies to adaptivision, and --kind is vit"),
        (["--no-focus"], "--focus applies to adaptivision, and --kind is vit"),
        (["--kind", "adaptivision", "--coarse", "5"], "--coarse applies to vit, and --kind is adaptivision"),
        ([*PLAIN, "--strategy", "random"], "strategy is 'random', and clusters is None, which keeps all patches"),
        ([*PLAIN, "--temperature", "-1"], "temperature is -1.0; it must be above 0"),
        (
            ["--patch", "32", "--coarse", "32"],
            "side is 32; it must be a multiple of the patch's 64 pixels: a vit trains at twice its patch size first",
        ),
    ],
)
def test_invalid_training_options_print_an_error_and_write_nothing(images, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert train.main(["--out", str(out), "--data", str(images), *SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()
