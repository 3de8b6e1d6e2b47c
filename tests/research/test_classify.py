"""Token reduction in classifiers: training, evaluation and tables."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

timm = pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")

from eval import EvalError  # noqa: E402
from eval.reporting import pages  # noqa: E402
from eval.reporting import tables as table  # noqa: E402
from research.classifiers import calibration, figures, predictions, tables, train  # noqa: E402
from research.classifiers import classify as command  # noqa: E402
from research.classifiers import datasets as labelled  # noqa: E402
from research.classifiers import evaluate as classify  # noqa: E402
from research.classifiers import methods as reductions  # noqa: E402
from research.classifiers import models as classifiers  # noqa: E402
from research.demo_training.scenes import render  # noqa: E402
from tofu_sd import demo  # noqa: E402
from tofu_sd.core.reductions import mean, mlerp, prune  # noqa: E402
from tofu_sd.demo.scene_classes import CLASSES  # noqa: E402
from tofu_sd.vit.methods import AdaptiveReduction, TokenReduction  # noqa: E402

SMALL = [
    "--stem",
    "patches",
    "--side",
    "32",
    "--patch",
    "4",
    "--width",
    "24",
    "--depth",
    "4",
    "--heads",
    "2",
    "--device",
    "cpu",
]
SHADES = 6  # classes of images, separated by brightness


def everywhere(patch, name, value):
    """Replaces a name in each module that uses it."""
    for module in (classify, predictions, tables):
        if hasattr(module, name):
            patch.setattr(module, name, value)


@pytest.fixture(autouse=True)
def _few_calibration_images(monkeypatch):
    """Limits the calibration images, as thresholds are calibrated in many tests."""
    for module in (classify, predictions):
        monkeypatch.setattr(module, "CALIBRATION", 16)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Returns a folder with train/ and val/: noise images, one brightness per class."""
    root = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 8)):
        for shade in range(SHADES):
            folder = root / part / f"shade{shade}"
            folder.mkdir(parents=True)
            for i in range(n):
                grain = noise.random((36, 40, 3)) * 30 + 45 * shade
                Image.fromarray(grain.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Trains two classifiers that differ in their seed."""
    root = tmp_path_factory.mktemp("trained")
    for seed in "01":
        out = ["--out", str(root / seed), "--seed", seed, "--data", str(images)]
        assert train.main([*out, *SMALL, "--coarse", "1280", "--samples", "1280"]) == 0
    return f"{root / '0'},{root / '1'}"


def run(trained, images, out, *more):
    assert command.main(["--model", trained, "--data", str(images / "val"), "--out", str(out), "--device", "cpu",
                          "--rounds", "0", *more]) == 0  # fmt: skip
    return json.loads((out / "classify.json").read_text())


def rows_by_label(results):
    return {row["label"]: row for row in results["rows"]}


# --- training -------------------------------------------------------------------------------------------------------


def test_trained_classifiers_are_saved_and_loaded(trained, images):
    (one, other) = classifiers.load(trained, torch.device("cpu"))
    assert (one.seed, other.seed) == (0, 1)
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    _, fresh = train.data(str(images), 32)
    right = torch.cat(train.correct(one.model, fresh, torch.device("cpu")))
    assert right.double().mean() > 0.5  # of six classes; augmentation makes the shades overlap


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


def test_key_depends_on_image_content(tmp_path):
    keys = set()
    for name, shade in (("a", 0), ("b", 0), ("c", 255)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "0.ppm"
        file.write_bytes(b"P6 1 1 255\n" + bytes([shade] * 3))
        keys.add(labelled.key_of([file], tmp_path / name))
    assert len(keys) == 2


def test_key_of_many_images_reads_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "READ", 30)
    files = [tmp_path / f"{i}.ppm" for i in range(9)]  # ten bytes each: every third file is read
    for file in files:
        file.write_bytes(b"0123456789")
    key = labelled.key_of(files, tmp_path)
    files[1].write_bytes(b"9876543210")
    assert labelled.key_of(files, tmp_path) == key
    files[3].write_bytes(b"9876543210")
    assert labelled.key_of(files, tmp_path) != key


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


def test_classifier_that_cannot_be_patched_prints_an_error(images, tmp_path, capsys):
    sizes = ["--data", str(images), *SMALL, "--clusters", "2,4", "--samples", "32", "--kind", "adaptivision"]
    assert train.main(["--out", str(tmp_path / "a"), *sizes]) == 0
    capsys.readouterr()
    options = ["--model", str(tmp_path / "a"), "--data", str(images / "val"), "--device", "cpu"]
    assert command.main([*options, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: --model ")
    assert "AdaptiVision has no blocks to merge tokens in" in message


def test_stress_works_with_one_layer(images, tmp_path):
    sizes = ["--data", str(images), *SMALL, "--depth", "1", "--coarse", "0", "--samples", "32"]
    assert train.main(["--out", str(tmp_path / "a"), *sizes]) == 0
    results = run(str(tmp_path / "a"), images, tmp_path / "out", "--stress", "--method", "tome", "--limit", "6")
    assert 0 <= results["rows"][1]["r"] <= 32


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


# --- images ---------------------------------------------------------------------------------------------------------


def test_scenes_are_cached_and_interleave_classes(tmp_path, monkeypatch):
    data = labelled.rendered(8, 2, 70, cache=tmp_path)
    assert len(data) == 2 * len(CLASSES)
    assert data.labels[:3] == [0, 1, 2]
    image, label = data.images[97]
    assert label == 1
    assert torch.allclose(image, render([CLASSES[1]], [70 + 97], 8)[0], atol=0.5 / 255 + 1e-6)
    monkeypatch.setattr(labelled.scenes, "render", None)  # must not be called again
    again = labelled.rendered(8, 2, 70, cache=tmp_path)
    assert torch.equal(again.images[97][0], image)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_folder_without_classes_raises(tmp_path):
    with pytest.raises(EvalError, match=r"'.*' holds no folder of images for each class"):
        labelled.folder(tmp_path, labelled.plain(8))


# --- methods --------------------------------------------------------------------------------------------------------


def test_noise_is_deterministic_with_its_standard_deviation(images):
    clear = labelled.folder(images / "val", labelled.plain(32))
    noisy = labelled.noisy(clear, 0.1)
    assert noisy.labels == clear.labels
    assert noisy.name == "val, noise 0.1"
    for i in (0, 5):
        assert torch.equal(noisy.images[i][0], noisy.images[i][0])
    assert not torch.equal(noisy.images[0][0] - clear.images[0][0], noisy.images[1][0] - clear.images[1][0])
    middle = [i for i in range(len(clear)) if clear.labels[i] == 2]  # a brightness at which no value is clipped
    apart = torch.stack([noisy.images[i][0] - clear.images[i][0] for i in middle])
    assert apart.std().item() == pytest.approx(0.1, rel=0.02)
    everything = torch.stack([labelled.noisy(clear, 9).images[i][0] for i in range(4)])
    assert everything.min() == 0
    assert everything.max() == 1


def test_noise_lowers_accuracy(trained, images, tmp_path):
    clear, noisy = (run(trained, images, tmp_path, "--method", "baseline", "--noise", sigma) for sigma in ("0", "0.5"))
    assert noisy["rows"][0]["accuracy"]["value"] < clear["rows"][0]["accuracy"]["value"]
    assert noisy["settings"]["data"] == "val, noise 0.5"


def test_parse_reads_methods():
    full, tofu, word, atm = reductions.parse("baseline,tofu@depth_split=3,PPPA,atm@beta=0.1", [4], 4)
    assert full is reductions.BASELINE
    assert tofu.reduction == TokenReduction(4, early=prune, late=mlerp, depth_split=3)
    assert word.reduction == TokenReduction(4, early=prune, late=mean, depth_split=3)
    assert atm.reduction == AdaptiveReduction(beta=0.1)
    assert [m.label for m in (full, tofu, word, atm)] == [
        "baseline", "tofu@depth_split=3, r = 4", "PPPA, r = 4", "atm@beta=0.1",
    ]  # fmt: skip
    assert len(reductions.parse("atm@alpha=0.98@beta=0.035@least=0.93", [4, 8], 4)) == 1  # as in ATM's table A2
    several = reductions.parse("baseline,tome", [2, 4], 4)
    assert [m.label for m in several] == ["baseline", "tome, r = 2", "tome, r = 4"]
    (all_average,) = reductions.parse("AAAA", [1], 4)
    assert {all_average.reduction.reduction_at(layer) for layer in range(4)} == {mean}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tomme", r"unknown method 'tomme' \(did you mean 'tome'\?\)"),
        ("PPPAA", "'PPPAA' has 5 letters; it must have one for each of the 4 layers"),
        ("PAPA", "unknown method 'PAPA'"),  # it has more than one split
        ("tofu@late=median", "method 'tofu@late=median': unknown reduction 'median'"),
        ("tofu@speed=2", "method 'tofu@speed=2': .*speed"),
        ("tofu@late", "'late' in method 'tofu@late' is not of the form option=value"),
    ],
)
def test_invalid_method_raises(name, message):
    with pytest.raises(EvalError, match=message):
        reductions.parse(name, [4], 4)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_table_has_the_accuracy_of_each_classifier(trained, images, tmp_path):
    results = run(trained, images, tmp_path, "--method", "tome,tofu,atm", "--r", "0,8")
    rows = rows_by_label(results)
    _, fresh = train.data(str(images), 32)
    each = [
        torch.cat(train.correct(one.model, fresh, torch.device("cpu"))).double().mean().item()
        for one in classifiers.load(trained, torch.device("cpu"))
    ]
    assert rows["baseline"]["accuracy"]["by_classifier"] == each
    assert rows["baseline"]["accuracy"]["value"] == pytest.approx(sum(each) / 2)
    assert rows["baseline"]["tokens"] == 64
    # nothing is merged: the same predictions at the same FLOPs
    for name in ("tome", "tofu"):
        assert rows[f"{name}, r = 0"]["accuracy"] == rows["baseline"]["accuracy"]
        assert rows[f"{name}, r = 0"]["flops"] == rows["baseline"]["flops"]
        assert rows[f"{name}, r = 8"]["tokens"] == 64 - 3 * 8
        assert rows[f"{name}, r = 8"]["flops"] < rows["baseline"]["flops"]
        assert rows[f"{name}, r = 0"]["feature_shift"]["value"] == pytest.approx(0, abs=1e-9)
        assert 0 < rows[f"{name}, r = 8"]["feature_shift"]["value"] < 1
    ahead = rows["tofu, r = 8"]["ahead_of_tome"]["value"]
    assert ahead == pytest.approx(rows["tofu, r = 8"]["accuracy"]["value"] - rows["tome, r = 8"]["accuracy"]["value"])


def test_feature_shift_is_the_cosine_distance_before_the_head(trained, images, tmp_path):
    one = classifiers.load(trained, torch.device("cpu"))[0]
    data = labelled.folder(images / "val", labelled.plain(32))
    bench = predictions.Evaluation(data, 6, 64, torch.device("cpu"), tmp_path)
    full, tome = (classify.MethodResult.of(bench, [one], m) for m in reductions.parse("baseline,tome", [12], 4))
    batch = torch.stack([data.images[i][0] for i in range(6)])
    with torch.no_grad():
        whole = one.model.forward_head(one.model.forward_features(batch), pre_logits=True)
        with tome.calibrated[0].apply(one.model):
            less = one.model.forward_head(one.model.forward_features(batch), pre_logits=True)
    expected = 1 - (whole * less).sum(-1) / (whole.norm(dim=-1) * less.norm(dim=-1))
    assert torch.allclose(tome.feature_shift(full).float(), expected, atol=1e-5)
    broken = next((tmp_path / "predictions").iterdir())
    broken.write_bytes(b"nothing")  # is evaluated again
    again = classify.MethodResult.of(bench, [one], tome.method)
    assert torch.equal(again.feature_shift(full), tome.feature_shift(full))


def test_given_thresholds_are_not_calibrated(trained, images, tmp_path):
    rows = rows_by_label(run(trained, images, tmp_path, "--method", "atm@alpha=0.9@beta=0.04@least=0.86", "--r", "2,4"))
    (settings,) = set(rows["atm@alpha=0.9@beta=0.04@least=0.86"]["settings"])
    assert "'alpha': 0.9, 'beta': 0.04, 'least': 0.86" in settings


def test_calibration_selects_the_curve_with_the_smallest_feature_shift(trained, images, tmp_path):
    one = classifiers.load(trained, torch.device("cpu"))[0]
    data = labelled.folder(images / "val", labelled.plain(32))
    bench = predictions.Evaluation(data, 24, 64, torch.device("cpu"), tmp_path)
    (method,) = reductions.parse("atm@class_only=False", [8], 4)
    calibrated = calibration.calibrate_thresholds(bench, one, method)
    held = bench.calibration_batches()
    full = predictions.predict(one.model, reductions.BASELINE, held).features

    def feature_shift(m):
        return calibration.cosine_distance(predictions.predict(one.model, m, held).features, full).mean().item()

    each = []
    for curve in calibration.CURVES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "CURVES", (curve,))
            each.append(feature_shift(calibration.calibrate_thresholds(bench, one, method)))
    assert len(set(each)) > 1
    assert feature_shift(calibrated) == min(each)
    assert 0 <= calibrated.reduction.threshold(0) <= 1  # above 1 nothing is merged


def test_calibration_rejects_curves_that_cannot_reach_the_flops(trained, images, tmp_path):
    """A curve that starts at 1 merges nothing in the first layer and cannot reach a large r in few layers."""
    one = classifiers.load(trained, torch.device("cpu"))[0]
    data = labelled.folder(images / "val", labelled.plain(32))
    bench = predictions.Evaluation(data, 24, 64, torch.device("cpu"), tmp_path)
    atm, tome = reductions.parse("atm@class_only=False,tome", [22], 4)

    def flops(method):
        return predictions.predict(one.model, method, bench.calibration_batches()).flops

    assert flops(calibration.calibrate_thresholds(bench, one, atm)) <= flops(tome)


def test_stress_gives_r_0_if_every_r_loses_accuracy(trained, images, tmp_path, monkeypatch, capsys):
    predict = predictions.predict

    def losing(model, method, *rest):
        results = predict(model, method, *rest)
        fuses = method.reduction is not None and method.r != 0
        return replace(results, correct=torch.zeros_like(results.correct)) if fuses else results

    for module in (predictions, calibration):
        monkeypatch.setattr(module, "predict", losing)
    monkeypatch.setattr(calibration, "CURVES", calibration.CURVES[:1])
    options = ["--limit", "6", "--stress", "--method", "atm@class_only=False,tome", "--r", "3,8"]
    full, *others = run(trained, images, tmp_path, *options)["rows"]
    assert [row["label"] for row in others] == ["atm@class_only=False, r = 0", "tome, r = 0"]
    assert all(row["flops"] == full["flops"] for row in others if "atm" in row["label"])
    assert "at least the baseline's; r of 0, 3, 8. ATM:" in " ".join(capsys.readouterr().out.split())


def test_calibration_images_are_not_evaluated(images):
    data = labelled.folder(images / "val", labelled.plain(32))

    def held(n, count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(predictions, "CALIBRATION", count)
            batches = predictions.Evaluation(data, n, 5, torch.device("cpu"), images).calibration_batches()
            return torch.cat([labels for _, labels in batches]), torch.cat([shown for shown, _ in batches])

    labels, shown = held(24, 12)
    evaluated = torch.stack([data.images[i][0] for i in range(24)])
    assert len(shown) == 12
    assert len(set(labels.tolist())) > 1
    assert not any(torch.equal(a, b) for a in shown for b in evaluated)
    assert len(held(48, 12)[0]) == 12  # all images are evaluated, so calibration uses them too
    assert len(held(48, 99)[0]) == 48


def test_calibrated_thresholds_match_tome_flops(trained, images, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "CALIBRATION", 64)  # with 16 images the FLOPs differ more on other images
    rows = rows_by_label(run(trained, images, tmp_path, "--method", "tome,atm@class_only=False", "--r", "4,12"))
    for r in (4, 12):
        share = rows[f"atm@class_only=False, r = {r}"]["flops"] / rows[f"tome, r = {r}"]["flops"]
        assert 0.9 < share <= 1.01  # token counts are integers, so FLOPs do not match exactly


def test_other_images_in_a_folder_of_the_same_name_are_evaluated_again(trained, images, tmp_path):
    """Predictions are cached by image content; with the folder's name as key, accuracy 0 % was reported as 100 %."""
    swapped = tmp_path / "other" / "val"
    shutil.copytree(images / "val", swapped)
    folders = sorted(swapped.iterdir())
    folders[0].rename(swapped / "aside")
    folders[1].rename(folders[0])
    (swapped / "aside").rename(folders[1])
    first = run(trained, images, tmp_path / "out", "--method", "baseline")
    second = run(trained, swapped.parent, tmp_path / "out", "--method", "baseline")
    lost = first["rows"][0]["accuracy"]["value"] - second["rows"][0]["accuracy"]["value"]
    assert lost > 0.1  # two of six classes have swapped labels


def test_any_prefix_of_a_folder_has_all_classes(images):
    data = labelled.folder(images / "val", labelled.plain(32))
    assert data.labels[:SHADES] == list(range(SHADES)) == data.labels[SHADES : 2 * SHADES]
    assert sorted(data.labels) == sorted(list(range(SHADES)) * 8)
    assert [data.images[i][1] for i in range(len(data))] == data.labels


def test_method_settings_hold_no_addresses():
    """Predictions are cached by it: the address of a function in it would never match again."""
    methods = reductions.parse("tome,tofu,atm", [4], 4)
    assert len({method.settings for method in methods}) == 3
    assert all("0x" not in method.settings for method in methods)


def test_label_of_a_layer_pattern_shows_its_r():
    (word,) = reductions.parse("PPPA@r=5", [2, 8], 4)
    assert word.label == "PPPA@r=5, r = 5"
    assert word.reduction.r == 5


def test_thresholds_at_r_0_merge_nothing(trained, images, tmp_path):
    options = ["--method", "atm@class_only=False", "--r", "0", "--limit", "6", "--maps", str(tmp_path / "maps.png")]
    full, none = run(trained, images, tmp_path, *options)["rows"]
    assert none["flops"] == full["flops"]
    assert (tmp_path / "maps.png").exists()


def test_predictions_are_cached(trained, images, tmp_path, monkeypatch):
    first = run(trained, images, tmp_path, "--method", "tome", "--r", "8")
    monkeypatch.setattr(predictions, "predict", None)  # must not be called
    assert run(trained, images, tmp_path, "--method", "tome", "--r", "8")["rows"] == first["rows"]


@pytest.mark.parametrize(
    ("loses", "most", "options"),
    [({4, 9, 32}, 8, ["--r", "4,8,9,32"]), (set(range(1, 99)), 0, ["--r", "4,32"]), (set(), 32, [])],
)
def test_stress_finds_the_largest_r_at_full_accuracy(trained, images, tmp_path, monkeypatch, loses, most, options):
    """Accuracy is not monotonic in r, so the search continues after the first loss. Without --r, all are tried."""
    predict = predictions.predict

    def losing(model, method, *rest):
        results = predict(model, method, *rest)
        return replace(results, correct=torch.zeros_like(results.correct)) if method.r in loses else results

    for module in (predictions, calibration):
        monkeypatch.setattr(module, "predict", losing)
    monkeypatch.setattr(calibration, "CURVES", calibration.CURVES[:1])
    monkeypatch.setattr(predictions, "_cached", lambda *_: None)  # thresholds can be the same at several r
    few = ["--method", "tome,tofu,atm", "--stress", "--limit", "24", *options]
    results = run(trained, images, tmp_path, *few)
    full, *others = results["rows"]
    rs = calibration.candidate_rs(classifiers.load(trained, torch.device("cpu"))[0].model)
    assert rs == [*range(23), 28, 32]  # 64 tokens, of which 22 can leave three of four layers
    assert results["settings"]["tried"] == sorted({0, *map(int, options[1].split(","))} if options else rs)
    assert [(row["method"], row["r"]) for row in others] == [("tome", most), ("tofu", most), ("atm", most)]
    for row in others:
        assert row["accuracy"]["value"] >= full["accuracy"]["value"]
        assert row["flops"] <= full["flops"]
        assert row["feature_shift"]["value"] >= 0


def test_half_precision_runs_and_is_reported(trained, images, tmp_path, capsys):
    options = ["--method", "tome", "--r", "16", "--limit", "24"]
    whole = run(trained, images, tmp_path, *options)
    assert "float32 on cpu" in capsys.readouterr().out
    half = run(trained, images, tmp_path, *options, "--dtype", "bfloat16")
    assert "bfloat16 on cpu" in capsys.readouterr().out
    straight = [torch.tensor(results["linearity"]) for results in (whole, half)]
    torch.testing.assert_close(*straight, atol=1e-3, rtol=0)  # weights are rounded, the steps are not
    moved = [results["rows"][1]["feature_shift"]["value"] for results in (whole, half)]
    assert moved[0] != moved[1] == pytest.approx(moved[0], rel=0.5)


def test_interleaved_timing_and_plots(trained, images, tmp_path):
    results = run(trained, images, tmp_path, "--method", "tome,atm", "--r", "4,8", "--rounds", "2", "--limit", "20",
                "--maps", str(tmp_path / "maps.png"), "--plot", str(tmp_path / "copy.svg"))  # fmt: skip
    for row in results["rows"]:
        assert row["images_per_second"]["median"] > 0
        assert row["speedup"]["p5"] <= row["speedup"]["median"] <= row["speedup"]["p95"]
    assert results["rows"][0]["speedup"] == {"median": 1, "p5": 1, "p95": 1}
    plot = (tmp_path / "plot.svg").read_text()
    assert plot == (tmp_path / "copy.svg").read_text()
    assert "images / s" in plot
    with Image.open(tmp_path / "maps.png") as page:
        assert page.height > 4 * 2 * 32  # the image and the groups of four methods


def test_narrow_terminal_shows_all_numbers(capsys):
    """Cells were truncated with an ellipsis."""
    results = tables.read(Path(__file__).parents[2] / "benchmarks" / "results" / "classify-demo")
    table.terminal_rows("", *tables.cells(results), [], Console(width=100))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "(0.00136" in shown
    assert "0.00223)" in shown


def test_outlined_shows_each_group_in_its_mean_colour():
    image = torch.zeros(3, 8, 8)
    image[:, :, 4:] = 1
    home = torch.tensor([[0, 0, 1, 1]] * 2 + [[0, 0, 2, 2]] * 2).flatten()  # patches of 2 pixels
    outlined = figures.outlined(image, home)
    assert set(outlined.unique().tolist()) == {0, 1}
    mixed = figures.outlined(image, torch.zeros(16, dtype=torch.long))
    assert torch.allclose(mixed, torch.full_like(mixed, 0.5))


def test_page_shows_the_table_of_a_folder(trained, images, tmp_path, capsys):
    run(trained, images, tmp_path, "--method", "tome", "--r", "8")
    capsys.readouterr()
    page = f"a\n<!-- python -m research.classifiers.classify --table {tmp_path} -->\nwhat stood there\n<!-- end -->\n"
    filled = pages.filled(page)
    assert "| tome, r = 8 | " in filled
    assert "2 classifiers of seeds 0, 1" in filled
    assert "what stood there" not in filled
    lines = pages.filled(
        f"<!-- python -m research.classifiers.classify --linearity {tmp_path} -->\n<!-- end -->\n"
    ).splitlines()
    assert [line.split(" | ")[0] for line in lines if line[:3] in ("| 0", "| 1", "| 2", "| 3")] == [
        "| 0", "| 1", "| 2", "| 3",
    ]  # fmt: skip
    capsys.readouterr()
    assert command.main(["--table", str(tmp_path), "--rows", "tome, r = 8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][1:] == ["| baseline", "| tome, r = 8"]
    assert command.main(["--table", str(tmp_path), "--rows", "tome, r = 9"]) == 2
    assert "no row 'tome, r = 9' (did you mean 'tome, r = 8'?)" in capsys.readouterr().err
    for what, axis in (("--table", "feature shift"), ("--linearity", "functional linearity")):
        assert command.main([what, str(tmp_path), "--plot", str(tmp_path / "drawn.svg")]) == 0
        assert axis in (tmp_path / "drawn.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "tofou"], "unknown method 'tofou' (did you mean 'tofu'?)"),
        (["--r", "many"], "argument --r: 'many' is not an integer, nor several"),
        (["--r", "33"], "r is 33; of 64 patch tokens at most 32 can be merged in a layer"),
        (["--data", "nowhere"], "there is no folder 'nowhere' of images"),
        (["--noise", "-1"], "argument --noise: '-1' is below 0"),
        (["--noise", "loud"], "argument --noise: 'loud' is not a finite number"),
        (["--model", "no_such_model_of_timms"], "called 'no_such_model_of_timms'"),
        (["--rows", "baseline"], "--rows needs --table"),
        (["--stress", "--method", "atm@beta=0.02"], "--stress searches thresholds itself, and 'atm@beta=0.02' sets it"),
        (["--stress", "--method", "tofu@r=5"], "--stress searches r itself, and 'tofu@r=5' sets it"),
        (["--stress", "--method", "PPPA@r=0"], "--stress searches r itself, and 'PPPA@r=0' sets it"),
        (["--stress", "--method", "tome", "--r", "8,33"], "r is 33; of 64 patch tokens at most 32 can be merged"),
        (["--method", "atm@class_only=False", "--r", "33"], "r is 33; of 64 patch tokens at most 32 can be merged"),
        (["--stress", "--plot", "a.svg"], "--plot draws methods at several r, and --stress finds one for each"),
        (["--method", "baseline@r=3"], "'baseline' takes no options, and 'baseline@r=3' sets some"),
        (["--method", "PPPA@early=mean"], "'PPPA' already sets early"),
    ],
)
def test_invalid_options_print_an_error_and_write_nothing(trained, images, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    before = ["--model", trained, "--data", str(images / "val"), "--out", str(out), "--device", "cpu"]
    assert command.main([*before, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", "nowhere"], "nowhere holds no results of research.classifiers.classify"),
        (["--table", "nowhere", "--limit", "3"], "--limit has no effect with --table"),
        (["--linearity", "nowhere", "--maps", "a.png"], "--maps has no effect with --linearity"),
        (["--linearity", "nowhere", "--rows", "baseline"], "--rows has no effect with --linearity"),
    ],
)
def test_table_rejects_options_without_effect(capsys, options, message):
    assert command.main(options) == 2
    assert message in capsys.readouterr().err


def test_classifier_with_other_classes_raises(trained, images, tmp_path, capsys):
    few = tmp_path / "few"
    shutil.copytree(images / "val" / "shade0", few / "shade0")
    assert command.main(["--model", trained, "--data", str(few), "--device", "cpu"]) == 2
    assert "'few' has 1 classes, and '0' has 6" in capsys.readouterr().err


def test_corrupt_weights_are_reported(trained, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(trained.split(",")[0], broken)
    (broken / classifiers.WEIGHTS).write_bytes(b"no weights")
    assert command.main(["--model", str(broken), "--device", "cpu"]) == 2
    assert "cannot read the weights of 'broken'" in capsys.readouterr().err
    (broken / classifiers.ABOUT).unlink()
    assert command.main(["--model", str(broken), "--device", "cpu"]) == 2
    assert "the folder 'broken' holds no classifier" in capsys.readouterr().err


def test_embedded_classifiers_match_their_page():
    """Three classifiers with their seeds. The page's accuracy on fresh scenes is checked here on a few scenes."""
    page = (classifiers.EMBEDDED.parent / "README.md").read_text()
    results = classifiers.load("demo", torch.device("cpu"))
    assert [one.seed for one in results] == [0, 1, 2]
    scenes = torch.stack([render([CLASSES[i]], [10_000_000 + i], 112)[0] for i in range(0, 96, 4)])
    for one in results:
        figures = json.loads((classifiers.EMBEDDED / f"seed-{one.seed}" / classifiers.ABOUT).read_text())["figures"]
        assert f"{100 * figures['accuracy']:.2f}" in page
        assert figures["n"] == 3840
        right = (one.model(scenes).argmax(-1) == torch.arange(0, 96, 4)).float().mean()
        assert right >= 22 / 24  # two may be hard; each classifier misses one in three hundred
