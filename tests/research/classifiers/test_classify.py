"""Evaluation of two trained classifiers: accuracy, feature shift, calibrated thresholds, tables and refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from classifier_run import SMALL, run
from PIL import Image

pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")

from eval.reporting import pages
from research.classifiers import calibration, predictions, train
from research.classifiers import classify as command
from research.classifiers import datasets as labelled
from research.classifiers import evaluate as classify
from research.classifiers import methods as reductions
from research.classifiers import models as classifiers


@pytest.fixture(autouse=True)
def _few_calibration_images(monkeypatch):
    """Limits the calibration images, as thresholds are calibrated in many tests."""
    for module in (classify, predictions):
        monkeypatch.setattr(module, "CALIBRATION", 16)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Trains two classifiers that differ in their seed."""
    root = tmp_path_factory.mktemp("trained")
    for seed in "01":
        out = ["--out", str(root / seed), "--seed", seed, "--data", str(images)]
        assert train.main([*out, *SMALL, "--coarse", "1280", "--samples", "1280"]) == 0
    return f"{root / '0'},{root / '1'}"


def rows_by_label(results):
    return {row["label"]: row for row in results["rows"]}


def test_trained_classifiers_are_saved_and_loaded(trained, images):
    (one, other) = classifiers.load(trained, torch.device("cpu"))
    assert (one.seed, other.seed) == (0, 1)
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    _, fresh = train.data(str(images), 32)
    right = torch.cat(train.correct(one.model, fresh, torch.device("cpu")))
    assert right.double().mean() > 0.5  # of six classes; augmentation makes the shades overlap


def test_noise_lowers_accuracy(trained, images, tmp_path):
    clear, noisy = (run(trained, images, tmp_path, "--method", "baseline", "--noise", sigma) for sigma in ("0", "0.5"))
    assert noisy["rows"][0]["accuracy"]["value"] < clear["rows"][0]["accuracy"]["value"]
    assert noisy["settings"]["data"] == "val, noise 0.5"


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


def test_stress_gives_r_0_if_every_r_loses_accuracy(trained, images, tmp_path, monkeypatch, capsys):
    predict = predictions.predict

    def losing(model, method, *rest):
        results = predict(model, method, *rest)
        merges = method.reduction is not None and method.r != 0
        return replace(results, correct=torch.zeros_like(results.correct)) if merges else results

    for module in (predictions, calibration):
        monkeypatch.setattr(module, "predict", losing)
    monkeypatch.setattr(calibration, "CURVES", calibration.CURVES[:1])
    options = ["--limit", "6", "--stress", "--method", "atm@class_only=False,tome", "--r", "3,8"]
    full, *others = run(trained, images, tmp_path, *options)["rows"]
    assert [row["label"] for row in others] == ["atm@class_only=False, r = 0", "tome, r = 0"]
    assert all(row["flops"] == full["flops"] for row in others if "atm" in row["label"])
    assert "at least the baseline's; r of 0, 3, 8. ATM:" in " ".join(capsys.readouterr().out.split())


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
    folders[0].rename(swapped / "swap")
    folders[1].rename(folders[0])
    (swapped / "swap").rename(folders[1])
    first = run(trained, images, tmp_path / "out", "--method", "baseline")
    second = run(trained, swapped.parent, tmp_path / "out", "--method", "baseline")
    lost = first["rows"][0]["accuracy"]["value"] - second["rows"][0]["accuracy"]["value"]
    assert lost > 0.1  # two of six classes have swapped labels


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


def test_timing_is_interleaved_and_plots_are_written(trained, images, tmp_path):
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
        assert command.main([what, str(tmp_path), "--plot", str(tmp_path / "own.svg")]) == 0
        assert axis in (tmp_path / "own.svg").read_text()


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
