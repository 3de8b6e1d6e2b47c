"""The main job from end to end on a tiny pipeline: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
import shlex
import time
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from eval_run import COMMAND, ToyClassifier
from PIL import Image, ImageFont
from rich.console import Console
from tiny import SHALLOW, sd15_pipe

from eval import EvalError, suites
from eval import compare as compare_module
from eval import report as report_module
from eval import run as run_module
from eval.common import files, provenance
from eval.common.schema_changes import convert
from eval.evaluation import execute, plan, prepare
from eval.evaluation import options as options_module
from eval.images import distributed, flops, generate, merge_maps, output_dir
from eval.images import requests as requests_module
from eval.images.distributed import Processes
from eval.methods import registry as methods
from eval.metrics import base, pairwise, score, statistics, summary
from eval.metrics import registry as metrics
from eval.reporting import html, tables
from eval.reporting import results as results_module
from tofu_sd import demo

PROMPTS = ['a <script>alert("x")</script> & co', "a bee", "an old oak", "a kite", "a pond"]


@pytest.fixture(scope="module")
def pipe():
    return sd15_pipe(with_unet=SHALLOW)


@pytest.fixture(scope="module")
def deep():
    """With as many blocks as Stable Diffusion 1.5 has."""
    return sd15_pipe()


@pytest.fixture
def tiny(monkeypatch, tmp_path, pipe):
    """Any --model is the tiny pipeline; the current folder is empty but for a list of prompts outside of it."""
    monkeypatch.setattr(prepare, "load_model", lambda *_: (pipe, ToyClassifier()))
    (tmp_path / "here").mkdir()
    (tmp_path / "own.txt").write_text("\n".join(PROMPTS))
    monkeypatch.chdir(tmp_path / "here")
    return [*COMMAND, "--prompts", str(tmp_path / "own.txt")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pipe):
    """(folder, results) of one run with all kinds of rows."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "own.txt").write_text("\n".join(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load_model", lambda *_: (pipe, ToyClassifier()))
        names = ["--method", "tofu,full,kv:tome+p,tomesd", "--seed-baseline"]
        code = run_module.main([*COMMAND, *names, "--prompts", str(folder / "own.txt"), "--out", str(folder / "out")])
    assert code == 0
    return folder / "out", files.read_json(folder / "out" / "results.json")


def rows(found):
    return {row["key"]: row for row in found["rows"]}


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_every_method_has_a_row_and_the_baseline_is_first(finished):
    _, found = finished
    assert found["schema"] == results_module.SCHEMA
    names = [row["method"] for row in found["rows"]]
    assert names == ["baseline", "tofu", "kv:tome+p", "tomesd", "baseline, other seeds"]


def test_baseline_compared_with_itself_is_perfect(finished):
    full = rows(finished[1])["baseline"]["metrics"]
    assert full["PSNR"] == {"value": None, "low": None, "high": None, "n": 0, "infinite": len(PROMPTS)}
    assert full["PD-demo"]["value"] == 0
    assert full["FD-demo"]["value"] < 1e-12  # float64 rounding


def test_seed_baseline_is_further_away_than_any_method(finished):
    found = rows(finished[1])
    scale = found.pop("baseline-other-seeds")["metrics"]["PD-demo"]["value"]
    assert all(row["metrics"]["PD-demo"]["value"] < scale for row in found.values())


def test_results_contain_settings_and_provenance(finished):
    _, found = finished
    assert {"model", "steps", "size", "guidance", "seed", "batch", "device", "dtype", "torch", "diffusers", "n", "of",
            "prompts_hash", "pipeline"} <= set(found["settings"])  # fmt: skip
    metadata = found["provenance"]
    assert {"command", "commit", "packages", "started", "ended", "runtime"} <= set(metadata)
    ((machine, report_of_it),) = metadata["environments"].items()  # one machine: it is metadata once
    assert [machine] == [metadata["environment"]] == [run["environment"] for run in metadata["generated"]]
    assert f"PyTorch version: {torch.__version__}" in report_of_it
    for metric in found["metrics"]:
        assert metric.get("implementation") or metric.get("skipped")
    tofu = rows(found)["tofu-r50"]
    assert tofu["n"] == len(PROMPTS)
    assert tofu["seconds"]["n"] == 2  # batches; the third has one image alone
    assert (
        tofu["metrics"]["PD-demo"]["low"] <= tofu["metrics"]["PD-demo"]["value"] <= tofu["metrics"]["PD-demo"]["high"]
    )


def test_results_match_the_json_schema(finished):
    jsonschema = pytest.importorskip("jsonschema")
    schema = files.read_json(Path(results_module.__file__).parent / "results.schema.json")
    assert schema["properties"]["schema"] == {"const": results_module.SCHEMA}
    checks = jsonschema.Draft202012Validator(schema)
    checks.validate(finished[1])
    committed = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*/results.json"))
    assert committed
    for path in committed:
        checks.validate(convert(files.read_json(path)))
    assert not checks.is_valid({**finished[1], "settings": {**finished[1]["settings"], "n": "5"}})
    assert not checks.is_valid({**finished[1], "more": 1})


def test_unavailable_metric_is_skipped_with_its_reason(finished):
    skipped = {m["name"]: m["skipped"] for m in finished[1]["metrics"] if "skipped" in m}
    assert skipped.keys() == {"MS-SSIM", "class accuracy"}
    assert "161" in skipped["MS-SSIM"]


def test_per_image_csv_has_a_line_for_each_image(finished):
    out, found = finished
    with (out / "per_image.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(PROMPTS) * len(found["rows"])
    tofu = [line for line in lines if line["key"] == "tofu-r50"]
    assert [line["prompt"] for line in tofu] == PROMPTS
    mean = sum(float(line["PSNR"]) for line in tofu) / len(PROMPTS)
    assert mean == pytest.approx(rows(found)["tofu-r50"]["metrics"]["PSNR"]["value"], abs=1e-9)


def test_html_report_is_self_contained_and_escapes_prompts(finished):
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1  # its own, that sorts the table
    assert "&lt;script&gt;" in page
    assert page.index("<table") < page.index("Quality against cost")
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert (
        page.count("data:image/jpeg") == 3 * len(PROMPTS) * 4
    )  # full, method, difference; of each pair; of each method


def test_written_files_contain_no_absolute_paths(finished):
    out, _ = finished
    for name in ("results.json", "per_image.csv", "report.html", "settings.json"):
        text = (out / name).read_text(encoding="utf-8")
        for path in (out.parent, Path.cwd(), Path.home(), Path(__file__).parent):
            assert f"{path}/" not in text, f"{path} in {name}"


def test_the_grid_has_a_column_for_each_method(finished):
    with Image.open(finished[0] / "grid.png") as grid:
        assert grid.width == 8 + 5 * (64 + 8)


def test_markdown_table_contains_figures_and_provenance(finished, capsys):
    out, found = finished
    assert report_module.main([str(out), "--markdown"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[: 2 + len(found["rows"])]}) == 1
    assert f"{rows(found)['tofu-r50']['metrics']['PSNR']['value']:.2f}" in text
    assert "1 steps, 64 px" in text
    assert "`python -m eval.run " in text


def test_rows_and_columns_of_the_table_can_be_selected(finished, capsys, tmp_path):
    out, _ = finished
    assert (
        report_module.main(
            [str(out), "--markdown", "--rows", "tomesd 50%", "tofu 50%", "--columns", "PSNR", "speed-up"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| method | PSNR ↑ | speed-up |"
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| tomesd 50%", "| tofu 50%", ""]
    assert not any("FD-demo" in line for line in lines)
    assert (
        report_module.main(
            [str(out), "--grid", str(tmp_path / "two.png"), "--rows", "baseline", "tofu 50%", "--first", "1"]
        )
        == 0
    )
    with Image.open(tmp_path / "two.png") as picture:
        assert picture.size == (8 + 2 * (64 + 8), 28 + 20 + 64 + 8)
    assert report_module.main([str(out), "--markdown", "--columns", "PNSR"]) == 2
    assert "no column 'PNSR' (did you mean 'PSNR'?)" in capsys.readouterr().err


def test_paired_differences_between_methods(finished, capsys):
    """PSNR of the image i is 20 + 10 i with one method and half a dB more with the other: the spread cancels out."""
    out, found = finished
    assert report_module.main([str(out), "--against", "tofu-r50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| kv:tome+p 50%", "| tomesd 50%"]
    gap = rows(found)["tomesd-r50"]["metrics"]["PSNR"]["value"] - rows(found)["tofu-r50"]["metrics"]["PSNR"]["value"]
    assert lines[3].split(" | ")[1].startswith(f"{gap:+.2f} (")

    def image(key, i, psnr):
        return {"key": key, "id": str(i), "prompt": str(i), "PSNR": str(psnr)}

    made = [image("tofu-r50", i, 20 + 10 * i) for i in range(5)]
    made += [image("tomesd-r50", i, 20.5 + 10 * i) for i in range(5)]
    metric = next(m for m in found["metrics"] if m["name"] == "PSNR")
    rows_of_both = [row for row in found["rows"] if row["key"] in ("tofu-r50", "tomesd-r50")]
    text = tables.markdown_against({**found, "metrics": [metric], "rows": rows_of_both}, made, "tofu-r50")
    assert "| tomesd 50% | +0.50 (+0.50 to +0.50) |" in text
    made[-1]["PSNR"] = "inf"  # an image equal to the baseline's has no PSNR to subtract from
    text = tables.markdown_against({**found, "metrics": [metric], "rows": rows_of_both}, made, "tofu 50%")
    assert "| tomesd 50% | +0.50, 4 of 5 images |" in text


def test_against_an_unknown_method_suggests_a_name(finished, capsys):
    assert report_module.main([str(finished[0]), "--against", "tofu 5%"]) == 2
    assert "did you mean 'tofu 50%'" in capsys.readouterr().err


def test_report_is_reproducible_from_the_files(finished, capsys):
    out, _ = finished
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert report_module.main([str(out)]) == 0
    assert (out / "report.html").read_text() == before


def test_pairs_are_sorted_worst_first():
    lower, higher = {"name": "D", "lower_is_better": True}, {"name": "D", "lower_is_better": False}
    images = [{"id": "a", "D": "0.1"}, {"id": "b", "D": "0.3"}, {"id": "c", "D": "0.2"}]
    assert [i["id"] for i in html.worst_first(images, lower)] == ["b", "c", "a"]
    assert [i["id"] for i in html.worst_first(images, higher)] == ["a", "c", "b"]


def test_later_method_is_added_to_the_folder_and_timed_against_the_baseline(tiny, capsys, monkeypatch):
    assert run_module.main([*tiny, "--method", "tofu", "--out", "out"]) == 0
    assert run_module.main([*tiny, "--method", "tofu,prune", "--out", "out"]) == 0
    found = rows(files.read_json(Path("out/results.json")))
    assert found["tofu-r50"]["speedup"]["n"] == 2
    assert found["prune-r50"]["speedup"]["n"] == 2  # the baseline's denoiser ran beside it
    monkeypatch.setattr(generate, "TIMED", 0)
    assert run_module.main([*tiny, "--method", "tofu,mlerp", "--out", "out"]) == 0
    found = rows(files.read_json(Path("out/results.json")))
    assert found["mlerp-r50"]["speedup"] is None  # no time is compared with another run's
    assert found["mlerp-r50"]["seconds"]["n"] == 2
    assert "mlerp 50%: no times, the baseline was not timed beside it" in capsys.readouterr().out


def test_class_accuracy_is_measured_for_demo_prompts(tiny, monkeypatch, pipe):
    from tofu_sd.demo.classifier import DemoClassifier

    monkeypatch.setattr(prepare, "load_model", lambda *_: (pipe, DemoClassifier().eval()))
    assert run_module.main([*tiny, "--prompts", "demo", "--limit", "2", "--method", "tofu", "--out", "out"]) == 0
    for row in files.read_json(Path("out/results.json"))["rows"]:
        assert row["metrics"]["class accuracy"]["n"] == 2


def test_limit_is_shown_with_the_results(tiny):
    assert run_module.main([*tiny, "--limit", "2", "--out", "out"]) == 0
    found = files.read_json(Path("out/results.json"))
    assert (found["settings"]["n"], found["settings"]["of"]) == (2, len(PROMPTS))
    assert "2 images of 5" in tables.run_header(found)


def test_json_keeps_stdout_for_the_results(tiny, capsys, monkeypatch):
    draw = results_module.write_report
    monkeypatch.setattr(results_module, "write_report", lambda out: (print("a library that talks"), draw(out)))
    assert run_module.main([*tiny, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"][1]["method"] == "tofu"
    assert "a library that talks" in printed.err
    (out,) = Path("runs").iterdir()  # the folder that is taken where none is given
    assert json.loads(printed.out) == files.read_json(out / "results.json")


@pytest.mark.skipif(not (demo.WEIGHTS / "model_index.json").exists(), reason="the embedded model has no weights here")
def test_embedded_model_is_measured_by_the_demo_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--limit", "2", "--steps", "3", "--metrics", "psnr,ms-ssim,demo-classifier", "--out", "out"]
    assert run_module.main([*arguments, "--method", "tofu"]) == 0
    found = rows(files.read_json(Path("out/results.json")))
    assert set(found["baseline"]["metrics"]) == {"class accuracy"}
    assert set(found["tofu-r50"]["metrics"]) == {"class accuracy", "PSNR", "MS-SSIM", "PD-demo", "FD-demo"}
    assert found["tofu-r50"]["metrics"]["PSNR"]["value"] > 20  # the same image, nearly; other seeds give about 10


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "tofuu"], "unknown method 'tofuu' (did you mean 'tofu'?); known: baseline, tofu, tofu-fast"),
        (["--method", "tofu,tomsd"], "'tomsd' (did you mean 'tomesd'?)"),
        (["--method", "tofu@level=2"], "'level' (did you mean 'levels'?)"),
        (["--method", ""], "unknown method ''"),
        (["--ratio", "0.9"], "ratio is 0.9; it must be a number from 0 to 0.75"),
        (["--method", "tomesd", "--ratio", "0.9"], "ratio is 0.9"),
        (["--ratio", "half"], "--ratio is 'half'"),
        (["--prompts", "demos"], "unknown prompts 'demos' (did you mean 'demo'?)"),
        (["--prompts", "nowhere.txt"], "cannot read the prompts 'nowhere.txt'"),
        (["--dtype", "float61"], "unknown dtype 'float61' (did you mean 'float16'?)"),
        (["--device", "cudo"], "unknown device 'cudo' (did you mean 'cuda'?)"),
        (["--metrics", "psn"], "unknown metric 'psn' (did you mean 'psnr'?)"),
        (["--lpips-net", "squeezenet"], "unknown LPIPS net 'squeezenet' (did you mean 'squeeze'?)"),
        (["--steps", "0"], "'0' is not an integer from 1 to"),
        (["--seed", "1" + "0" * 20], "is not an integer from 0 to"),
        (["--guidance", "nan"], "'nan' is not a finite number"),
        (["--lpips-backbone", "no/where.pth"], "no file 'where.pth' of weights"),
        (["--size", "100"], "--size is 100; it must be a multiple of 8"),
        (["--metrics", "psnr", "--lpips-net", "vgg"], "--lpips-net is for lpips, which --metrics does not include"),
        (["--metrics", "psnr", "--dino-model", "x"], "--dino-model is for dino, which --metrics does not include"),
        (["--maps", "--map-step", "2"], "--map-step is 2; there are 1 steps"),
        (
            ["--maps", "--method", "todo"],
            "--maps shows what this package's methods merge, and --method has none of them",
        ),
        (
            ["--method", "hypertile", "--size", "72"],
            "hypertile cuts maps into 2 x 2 tiles, and this size gives one of 9 x 9",
        ),
        (["--sizes", "64"], "unrecognized arguments: --sizes 64"),
    ],
)
def test_invalid_arguments_print_one_line_and_write_nothing(tiny, capsys, arguments, said):
    assert run_module.main([*tiny, *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(Path.cwd().iterdir()) == []


def test_hypertile_refuses_indivisible_sizes_also_when_stacked(tiny, capsys):
    pytest.importorskip("DeepCache")
    assert run_module.main([*tiny, "--method", "deepcache:hypertile", "--size", "72"]) == 2
    assert "this size gives one of 9 x 9 tokens" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is needed to lack it")
def test_unavailable_device_is_refused(tiny, capsys):
    assert run_module.main([*tiny, "--device", "cuda"]) == 2
    assert "'cuda' is not available here" in capsys.readouterr().err


def test_output_dir_with_other_settings_is_refused(tiny, capsys):
    assert run_module.main([*tiny, "--out", "out", "--limit", "1"]) == 0
    before = sorted(Path("out").rglob("*"))
    capsys.readouterr()
    assert run_module.main([*tiny, "--out", "out", "--limit", "1", "--guidance", "3"]) == 2
    assert "guidance None, this run has 3.0" in capsys.readouterr().err
    assert sorted(Path("out").rglob("*")) == before


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model_index.json", "{}", "a file of it is damaged, or of another version (KeyError: '_class_name')"),
        ("model_index.json", "[]", "a file of it is damaged, or of another version (TypeError: "),
        ("tokenizer/tokenizer.json", "{}", "a file of it is damaged, or of another version (KeyError: "),
        ("unet/config.json", "[]", ""),
    ],
)
def test_damaged_model_prints_one_line(tmp_path, monkeypatch, capsys, pipe, file, content, said):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("mine")
    Path("mine", file).write_text(content)
    assert run_module.main(["--model", "mine"]) == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert output.startswith(f"error: cannot load the model 'mine': {said}")
    assert "there is no such folder" not in output


def test_unloadable_model_prints_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert run_module.main(["--model", "empty"]) == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("error: cannot load the model 'empty'")
    assert str(tmp_path) not in printed


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            "nobody/nothing",
            "it is not on this machine, and huggingface.co is unreachable",
        ),
        ("./nowhere", "there is no such folder, and it is not a valid model id"),
    ],
)
def test_missing_model_and_damaged_model_have_different_messages(tmp_path, monkeypatch, capsys, model, said):
    """The tests run without the network."""
    monkeypatch.chdir(tmp_path)
    assert run_module.main(["--model", model]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: cannot load the model {model!r}: {said}"


def test_too_small_images_for_a_metric_are_reported_before_generating(tiny, monkeypatch, capsys):
    assert run_module.main([*tiny, "--dry-run"]) == 0
    assert capsys.readouterr().err == "MS-SSIM is skipped: needs images of at least 161 px, these have 64\n"
    monkeypatch.setattr(execute, "generate", lambda *_: pytest.fail(capsys.readouterr().err))
    with pytest.raises(pytest.fail.Exception, match="MS-SSIM is skipped"):
        run_module.main(tiny)
    assert run_module.main([*tiny, "--metrics", "psnr,ssim", "--dry-run"]) == 0
    assert capsys.readouterr().err == ""


def test_missing_weights_of_a_metric_are_reported_before_generating(tiny, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "inception", lambda *_: "no Inception weights")
    monkeypatch.setattr(execute, "generate", lambda *_: pytest.fail(capsys.readouterr().err))
    with pytest.raises(pytest.fail.Exception, match="FID will be skipped: no Inception weights"):
        run_module.main([*tiny, "--metrics", "psnr,fid"])


def test_only_selects_images_of_the_whole_list(tiny, capsys):
    assert run_module.main([*tiny, "--method", "tofu", "--only", "1-2", "--metrics", "psnr", "--out", "out"]) == 0
    assert {path.stem for path in Path("out/baseline").glob("*.png")} == {"0001", "0002"}
    content = files.read_json(Path("out/results.json"))
    assert (content["settings"]["n"], content["settings"]["of"]) == (2, 5)
    capsys.readouterr()
    assert run_module.main([*tiny, "--method", "tofu", "--dry-run", "--json", "--out", "out"]) == 0
    assert [method["existing"] for method in json.loads(capsys.readouterr().out)["methods"]] == [2, 2]
    again = [*tiny, "--method", "tofu", "--metrics", "psnr", "--out", "out"]
    # those that were there, and one of the repeated ones
    assert run_module.main([*again, "--per-prompt", "2", "--only", "0001,0002,0002_1"]) == 0
    assert {path.stem for path in Path("out/baseline").glob("*.png")} == {"0001", "0002", "0002_1"}
    content = files.read_json(Path("out/results.json"))
    assert (content["settings"]["n"], content["settings"]["of"]) == (3, 10)


def test_method_that_does_not_fit_the_model_is_reported_before_generating(tiny, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "load_model", lambda *_: (Namespace(transformer=torch.nn.Linear(2, 2)), None))
    arguments = [argument for argument in tiny if argument not in ("--size", "64")]
    assert run_module.main(arguments) == 2
    assert "method 'tofu' does not fit this model" in capsys.readouterr().err


def test_torchvision_for_another_torch_is_explained(tiny, monkeypatch, capsys):
    def broken():
        raise ImportError("torchvision 0.28.0 does not work with torch 2.13.0+cpu")

    monkeypatch.setattr(plan, "check_torchvision", broken)
    assert run_module.main([*tiny]) == 2
    assert "does not work with torch" in capsys.readouterr().err


def test_method_that_is_not_installed_is_a_skipped_row(tiny, monkeypatch, capsys):
    monkeypatch.setattr(methods, "version", lambda name: None)
    assert run_module.main([*tiny, "--method", "tofu,tomesd", "--limit", "2"]) == 0
    assert "tomesd 50%: skipped: pip install tomesd" in capsys.readouterr().out


def test_interrupt_message_says_how_to_resume(tiny, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "generate", stop)
    assert run_module.main([*tiny]) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_a_folder_without_results_has_no_report(tmp_path, capsys):
    assert report_module.main([str(tmp_path)]) == 2
    assert "no results.json" in capsys.readouterr().err


def test_full_disk_prints_one_line_and_the_run_resumes(tiny, monkeypatch, capsys):
    replace, room = os.replace, iter([True] * 6)

    def full_disk(source, target):
        if not next(room, False):
            raise OSError(28, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full_disk)
    assert run_module.main([*tiny, "--out", "out"]) == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert output.startswith("error: [Errno 28] No space left on device")
    assert output.endswith("the same command resumes")
    assert not list(Path("out").rglob(".*"))  # nothing half-written is left
    monkeypatch.setattr(files.os, "replace", replace)
    assert run_module.main([*tiny, "--out", "out"]) == 0


def test_black_images_are_counted_and_reported(tiny, monkeypatch, capsys, pipe):
    """As a model in half precision draws them when it has come to NaN."""
    original = generate.generate_batch

    def blackened(*args, **options):
        pixels, cost = original(*args, **options)
        if options.get("output") != "latent":
            pixels[0] = 0
        return pixels, cost

    monkeypatch.setattr(generate, "generate_batch", blackened)
    assert run_module.main([*tiny, "--limit", "2", "--method", "tofu", "--out", "out"]) == 0
    assert rows(files.read_json(Path("out/results.json")))["tofu-r50"]["flat"] == 1
    assert "tofu 50%: 1 of 2 images are one flat colour" in capsys.readouterr().out


@pytest.mark.parametrize(("part", "flat"), [(slice(None), 1), (slice(32), 0)])
def test_nan_images_are_reported_in_every_comparison(tiny, monkeypatch, capsys, pipe, part, flat):
    """Half of an image is enough; where both models' are black they are equal, and the score rises."""
    decode = pipe.vae.decode

    def broken(*args, **options):
        found = decode(*args, **options)
        (found[0] if isinstance(found, tuple) else found.sample)[0, :, part] = float("nan")
        return found

    assert run_module.main([*tiny, "--limit", "2", "--metrics", "psnr", "--strict", "--out", "whole"]) == 0
    monkeypatch.setattr(pipe.vae, "decode", broken)
    command = [*tiny, "--limit", "2", "--metrics", "psnr", "--method", "full,tofu,prune", "--flops", "--out", "out"]
    assert run_module.main(command) == 0
    message = "tofu 50%: 1 of 2 images hold NaN, saved as black"
    assert message in capsys.readouterr().out
    found = rows(files.read_json(Path("out/results.json")))["tofu-r50"]
    assert (found["nan"], found["flat"]) == (1, flat)
    for shown in (["--markdown"], ["--pareto"], ["--against", "prune 50%"]):
        assert report_module.main(["out", *shown]) == 0
        assert message in capsys.readouterr().out
    assert report_module.main(["out", "--markdown", "--rows", "prune 50%"]) == 0
    shown = capsys.readouterr().out
    assert "baseline: 1 of 2 images hold NaN" in shown  # with which the row is compared
    assert message not in shown
    assert "hold NaN" in Path("out/report.html").read_text()
    assert compare_module.main(["out", "out"]) == 0
    assert f"out: {message}" in capsys.readouterr().out
    assert run_module.main([*command, "--strict"]) == 1


def test_output_dir_below_a_file_is_refused(tiny, capsys):
    Path("file").write_text("")
    assert run_module.main([*tiny, "--out", "file/out"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_safety_checker_is_not_loaded(monkeypatch):
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options)
        raise OSError("that is all")

    monkeypatch.setattr("diffusers.AutoPipelineForText2Image.from_pretrained", from_pretrained)
    with pytest.raises(EvalError, match="that is all"):
        prepare.load_model("someone/model", torch.device("cpu"), torch.float32)
    assert asked["safety_checker"] is None
    assert asked["requires_safety_checker"] is False


def test_saved_pipeline_runs(tmp_path, monkeypatch, pipe):
    """The way any model but the embedded one comes."""
    pipe.save_pretrained(tmp_path / "own model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("a fox")
    arguments = [
        "--prompts",
        "own.txt",
        "--steps",
        "1",
        "--metrics",
        "psnr,demo-classifier",
        "--method",
        "tofu",
        "--out",
        "out",
    ]
    assert run_module.main(["--model", str(tmp_path / "own model"), *arguments]) == 0
    found = files.read_json(Path("out/results.json"))
    assert found["settings"]["size"] == 128  # a latent of 16, eightfold
    assert found["settings"]["model"] == "own model"
    assert "'own model'" in found["provenance"]["command"]
    assert [m["skipped"] for m in found["metrics"] if m["name"] == "PD-demo"] == [
        "it is measured in the demo model's classifier, and this is another model"
    ]


def test_hub_revision_is_recorded(tmp_path, monkeypatch, pipe):
    """A name alone is whatever the hub holds under it today."""
    revision, repository = "0123456789abcdef" * 2 + "01234567", tmp_path / "hub" / "models--some--model"
    pipe.save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("a fox")
    asked = ["--model", "some/model", "--prompts", "own.txt", "--steps", "1", "--metrics", "psnr", "--out", "out"]
    assert run_module.main(asked) == 0
    metadata = files.read_json(Path("out/results.json"))["provenance"]
    assert metadata["revision"] == metadata["generated"][0]["revision"] == revision
    assert f"<dd>{revision}</dd>" in Path("out/report.html").read_text()


def test_environments_of_generating_and_measuring_machines_are_recorded(tiny, monkeypatch):
    monkeypatch.setattr(provenance, "environment", lambda: "<machine one>")
    assert run_module.main([*tiny, "--limit", "2", "--generate-only", "--out", "out"]) == 0
    monkeypatch.setattr(provenance, "environment", lambda: "machine two")
    assert run_module.main([*tiny, "--out", "out"]) == 0
    metadata = files.read_json(Path("out/results.json"))["provenance"]
    first, second = (metadata["environments"][run["environment"]] for run in metadata["generated"])
    assert (first, second) == ("<machine one>", "machine two")
    assert metadata["environment"] == metadata["generated"][1]["environment"]
    page = Path("out/report.html").read_text()
    assert "<pre>machine two</pre>" in page
    assert "<pre>&lt;machine one&gt;</pre>" in page
    assert f"machine {metadata['generated'][0]['environment']}, " in page


def test_seconds_measured_under_two_drivers_are_reported(tiny, monkeypatch):
    """A driver is no setting of theirs: the folder goes on."""
    for driver, limit in (("1", "2"), ("2", "4")):
        monkeypatch.setattr(provenance, "runtime", lambda _, driver=driver: {"driver": driver})
        assert run_module.main([*tiny, "--limit", limit, "--out", "out"]) == 0
        footnotes = tables.footnotes(files.read_json(Path("out/results.json")))
        assert ("Seconds are of images generated under driver 1; and driver 2." in footnotes) == (driver == "2")


@pytest.mark.parametrize("error", [AttributeError("no pip"), OSError("no such program"), RuntimeError("CUDA is busy")])
def test_environment_report_has_no_volatile_values(monkeypatch, error):
    """torch asks many programs; a machine without one of them must not end a run."""
    message = "cuDNN: /usr/lib/own/libcudnn.so.9\nCPU MHz: 2100.5\nCPU(s): 2\n"
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: message)
    assert provenance.environment.__wrapped__() == "cuDNN: libcudnn.so.9\nCPU(s): 2"
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", Mock(side_effect=error))
    assert provenance.environment.__wrapped__() is None


def test_limited_run_has_its_own_default_folder(tiny):
    assert run_module.main(tiny) == 0
    assert run_module.main([*tiny, "--limit", "1"]) == 0
    long, short = sorted(Path("runs").iterdir(), key=lambda folder: "first" in folder.name)
    assert files.read_json(long / "results.json")["settings"]["n"] == len(PROMPTS)
    assert files.read_json(short / "results.json")["settings"]["n"] == 1


# --- stages -----------------------------------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_writes_nothing(tiny, capsys):
    assert run_module.main([*tiny, "--method", "tofu", "--dry-run", "--out", "out"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  baseline: 5 images, 0 of them generated before",
        "  tofu-r50: 5 images, 0 of them generated before",
    ]
    assert list(Path.cwd().iterdir()) == []


def test_dry_run_as_json(tiny, capsys):
    assert run_module.main([*tiny, "--method", "tofu", "--dry-run", "--json", "--out", "out"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["methods"][1] == {"key": "tofu-r50", "images": 5, "existing": 0}
    assert content["settings"]["steps"] == 1


@pytest.mark.parametrize("stage", [["--dry-run"], ["--generate-only"], []])
def test_method_that_is_not_installed_is_reported_before_generating(tiny, monkeypatch, capsys, stage):
    monkeypatch.setattr(methods, "version", lambda name: None)
    arguments = [*tiny, "--method", "tofu,tomesd", "--limit", "1", "--metrics", "psnr", *stage, "--out", "out"]
    assert run_module.main(arguments) == 0
    assert capsys.readouterr().err.splitlines()[0] == "tomesd-r50 is skipped: pip install tomesd"
    assert run_module.main([*arguments, "--strict"]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--steps", "50"], "--steps is 50; the images of out were generated with 1"),
        (["--size", "512"], "--size is 512; the images of out were generated with 64"),
        (["--guidance", "9"], "--guidance is 9.0; the images of out were generated with None"),
        (["--dtype", "float16"], "--dtype is float16; the images of out were generated with float32"),
        (["--model", "other"], "--model is other; the images of out were generated with tiny"),
        (["--suite", "paper"], "--size is 512"),  # what a suite asks for is asked for
        (["--flops"], "--metrics-only generates nothing, and --flops is"),
        (["--maps"], "--metrics-only generates nothing, and --maps is"),
        (["--map-step", "1"], "--map-step is 1; it needs --maps"),
        (["--map-block", "up"], "--map-block is up; it needs --maps"),
    ],
)
def test_metrics_only_refuses_other_settings(tiny, capsys, change, said):
    assert run_module.main([*tiny, "--method", "tofu", "--generate-only", "--out", "out"]) == 0
    capsys.readouterr()
    unsaid = [
        a for i, a in enumerate(tiny) if a not in ("--steps", "--size") and tiny[i - 1] not in ("--steps", "--size")
    ]
    said_before = unsaid if change[0] == "--suite" else tiny
    assert run_module.main([*said_before, "--method", "tofu", "--metrics-only", "--out", "out", *change]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_images_of_other_code_are_not_reported_as_missing(tiny, monkeypatch, capsys):
    assert run_module.main([*tiny, "--method", "tofu", "--generate-only", "--out", "out"]) == 0
    monkeypatch.setattr(methods, "source_hash", lambda: "newer")
    assert run_module.main([*tiny, "--method", "tofu", "--metrics-only", "--out", "out"]) == 2
    assert "tofu-r50: 0000.png, 0001.png, 0002.png" in (error := capsys.readouterr().err)
    assert "were generated by other code" in error


def test_provenance_names_the_generating_runs(tiny):
    assert run_module.main([*tiny, "--method", "tofu", "--limit", "2", "--generate-only", "--out", "out"]) == 0
    assert run_module.main([*tiny, "--method", "tofu", "--repeats", "2", "--out", "out"]) == 0
    assert run_module.main([*tiny, "--method", "tofu", "--metrics-only", "--out", "out"]) == 0
    metadata = files.read_json(Path("out/results.json"))["provenance"]
    assert "--metrics-only" in metadata["command"]
    assert [run["images"] for run in metadata["generated"]] == [4, 6]
    assert "--generate-only" in metadata["generated"][0]["command"]
    assert "--repeats 2" in metadata["generated"][1]["command"]
    assert {"commit", "device", "runtime", "packages", "started"} <= metadata["generated"][0].keys()
    page = Path("out/report.html").read_text()
    assert page.index("--metrics-only") < page.index("4 images, from") < page.index("6 images, from")
    assert "--repeats 2" in page


def test_generate_only_then_metrics_only(tiny, monkeypatch, capsys):
    assert run_module.main([*tiny, "--method", "tofu", "--generate-only", "--out", "out"]) == 0
    assert not Path("out/results.json").exists()
    monkeypatch.setattr(prepare, "load_model", lambda *_: pytest.fail("measuring needs no model"))
    own = [a for a in tiny if a not in ("psnr,ms-ssim,demo-classifier",)]
    own[own.index("--metrics") + 1 : own.index("--metrics") + 1] = ["psnr"]
    assert run_module.main([*own, "--method", "tofu", "--metrics-only", "--out", "out"]) == 0
    assert rows(files.read_json(Path("out/results.json")))["tofu-r50"]["metrics"]["PSNR"]["n"] == len(PROMPTS)
    capsys.readouterr()
    assert run_module.main([*own, "--method", "prune", "--metrics-only", "--out", "out"]) == 2
    assert "prune-r50 lacks 0000.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metrics-only"], "name it by --out"),
        (["--metrics-only", "--out", "nowhere"], "there is no settings.json"),
        (["--metrics-only", "--out", "out", "--seed", "1"], "are not those of --prompts and --seed"),
        (["--metrics-only", "--out", "out", "--repeats", "2"], "--metrics-only generates nothing"),
        (["--shard", "3/2"], "'3/2' is not a part such as 1/4"),
        (["--shard", "1/2", "--generate-only"], "not allowed with argument"),
        (["--suite", "papper"], "unknown suite 'papper' (did you mean 'paper'?); known: depth, modes, paper"),
        (["--reference", "nowhere"], "--reference nowhere: there is no folder 'baseline' in it"),
    ],
)
def test_incompatible_stage_options_are_refused(tiny, capsys, arguments, said):
    if "out" in arguments:
        assert run_module.main([*tiny, "--generate-only", "--limit", "1", "--out", "out"]) == 0
        capsys.readouterr()
    assert run_module.main([*tiny, *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_reference_images_are_copied_from_another_run(tiny, capsys):
    """Identified by content, not by path. Under other settings there are none to take, which hours of drawing
    would not tell."""
    assert run_module.main([*tiny, "--method", "tofu", "--out", "first"]) == 0
    assert run_module.main([*tiny, "--method", "prune", "--reference", "first", "--out", "second"]) == 0
    assert "5 of 5 images of the baseline are from first" in capsys.readouterr().err
    for id in ("0000", "0004"):
        for end in ("png", "json"):
            a, b = (Path(out) / "baseline" / f"{id}.{end}" for out in ("first", "second"))
            assert a.read_bytes() == b.read_bytes()
    found = rows(files.read_json(Path("second/results.json")))
    assert found["prune-r50"]["speedup"]["n"] == 2  # not by the time that is observed of the baseline's images
    assert run_module.main([*tiny, "--steps", "2", "--reference", "first", "--out", "third"]) == 2
    assert "--reference first: its images were generated with steps 1, this run has 2" in capsys.readouterr().err
    Path("first/settings.json").unlink()
    assert run_module.main([*tiny, "--reference", "first", "--out", "third"]) == 2
    assert "--reference first: there is no settings.json of this version" in capsys.readouterr().err
    Path("first/settings.json").write_text("{")
    assert run_module.main([*tiny, "--reference", "first", "--out", "third"]) == 2
    assert "--reference first: its settings.json cannot be read" in capsys.readouterr().err
    assert not Path("third").exists()


def test_corrupt_images_are_named_and_generated_again(tiny, capsys):
    assert run_module.main([*tiny, "--method", "tofu", "--out", "out"]) == 0
    (Path("out") / "tofu-r50" / "0003.png").write_bytes(b"")
    capsys.readouterr()
    assert run_module.main([*tiny, "--method", "tofu", "--out", "out"]) == 0
    assert "corrupt, generated again: tofu-r50/0003.png" in capsys.readouterr().err


def test_strict_exits_with_1_if_something_was_skipped(tiny):
    assert run_module.main([*tiny, "--strict", "--metrics", "psnr"]) == 0
    assert run_module.main([*tiny, "--strict", "--metrics", "psnr,ms-ssim"]) == 1  # 64 px are too few


@pytest.mark.parametrize("name", suites.NAMES)
def test_command_line_overrides_suite_options(name):
    options = options_module.parse(["--suite", name, "--steps", "3"])
    content = suites.load(name)
    assert options.steps == 3
    assert options.method == content["method"]
    methods.parse(options.method, [0.5])
    unknown = content.keys() - vars(options_module.parse([])).keys() - {"about"}
    assert not unknown
    metrics.parse_metric_names(options.metrics, metrics.Nets())
    assert len({m.slug for m in methods.parse(options.method, [0.5])}) == options.method.count(",") + 1


@pytest.mark.parametrize("name", ["depth", "modes"])
def test_all_methods_of_a_suite_generate_different_images(tiny, deep, monkeypatch, name):
    """Of as many blocks as Stable Diffusion has: two rows that draw the same would be one too many. (The paper's suite
    runs on a stand-in, in test_eval_standin.py.)"""
    monkeypatch.setattr(prepare, "load_model", lambda *_: (deep, None))
    assert run_module.main([*tiny, "--suite", name, "--limit", "2", "--out", "out"]) == 0
    found = rows(files.read_json(Path("out/results.json")))
    assert {"baseline", "baseline-other-seeds"} < found.keys()
    assert len(found) == 2 + suites.load(name)["method"].count(",")
    figures = [row["metrics"]["PSNR"]["value"] for row in found.values()]
    assert len(set(figures)) == len(found)


def test_fastest_repeat_of_a_batch_counts(tiny, monkeypatch):
    seconds = iter([9.0, 3.0, 1.0, 2.0] * 2)  # of each method: a warm-up and three repeats
    original = generate.generate_batch

    def timed(*args, **options):
        images, cost = original(*args, **options)
        return images, {**cost, "seconds": next(seconds)}

    monkeypatch.setattr(generate, "generate_batch", timed)
    assert run_module.main([*tiny, "--limit", "2", "--repeats", "3", "--out", "out"]) == 0
    for row in files.read_json(Path("out/results.json"))["rows"]:
        assert row["seconds"]["median"] == 1.0


def test_denoiser_seconds_are_reported(finished):
    for row in finished[1]["rows"]:
        assert 0 < row["denoiser_seconds"]["median"] < row["seconds"]["median"]


def test_flops_agree_with_a_count_by_hand(deep):
    """What fusing saves: attention and its projections on half of the tokens of 5 blocks; what it costs: matching."""
    settings = generate.Settings("m", "p", "own", "h", 0, 128, 1, 1.0, 1, "cpu", "float32", "a", "t", "d", "tf")
    request = requests_module.Request("0000", "a fox", 0)
    full, tofu, tofu_windows, condense = (
        flops.count_batch(deep, method, settings, [request])
        for method in (generate.BASELINE, *methods.parse("tofu,tofu@window=4,condense", [0.5]))
    )
    N, K, C, blocks = 256, 128, 16, 5
    attention = 4 * C * (N * N - K * K)  # q kᵀ and its product with v
    projections = 4 * 2 * C * C * (N - K)
    matching = 2 * C * 192 * 64
    assert full - tofu == blocks * (attention + projections - matching)
    assert full - tofu_windows == blocks * (attention + projections - matching // 4)  # 4 windows of 48 and 16
    shares = 2 * C * 2 * 128 * 64  # 2 windows of 128 tokens and 64 centroids: to assign, to average, to unmerge
    assert full - condense == blocks * (attention + projections - 3 * shares)


def test_flops_under_a_threshold_are_the_mean_of_several_images(pipe, tmp_path, monkeypatch):
    """In the batches in which they are generated, for a batch decides together; what does not vary is counted once."""
    turns = []
    monkeypatch.setattr(
        flops, "count_batch", lambda pipe, method, settings, turn: turns.append(len(turn)) or 10 * len(turn)
    )
    settings = generate.Settings("m", "p", "own", "h", 0, 128, 1, 1.0, 2, "cpu", "float32", "a", "t", "d", "tf")
    requests = [requests_module.Request(f"{i:04}", "a fox", i) for i in range(11)]
    chosen = methods.parse("tofu,adaptive", [0.5])
    flops.count(tmp_path, pipe, chosen, settings, requests)
    assert turns == [1, 2, 2, 2, 2]
    assert [flops.load_count(tmp_path, settings, method) for method in chosen] == [10, 10]


def test_report_shows_merge_maps(tiny, capsys):
    assert run_module.main([*tiny, "--method", "tofu,tomesd", "--maps", "--out", "out"]) == 0
    assert [path.name for path in Path("out/maps").glob("*.png")] == ["tofu-r50.png"]
    with Image.open("out/maps/tofu-r50.png") as picture:
        assert picture.size == (3 * 64 + 2 * merge_maps.GAP, 64 + merge_maps.CAPTION)
    assert Path("out/report.html").read_text().count('alt="Merged tokens"') == 1


def test_flops_and_merge_maps_are_kept(tiny):
    """Drawing and measuring can be parted, and measured again."""
    assert run_module.main([*tiny, "--method", "tofu", "--flops", "--maps", "--generate-only", "--out", "out"]) == 0
    for again in (["--metrics-only"], []):
        assert run_module.main([*tiny, "--method", "tofu", *again, "--out", "out"]) == 0
        found = rows(files.read_json(Path("out/results.json")))
        assert found["baseline"]["flops"] > found["tofu-r50"]["flops"] > 0
        assert found["tofu-r50"]["maps"]
        assert not found["baseline"]["maps"]
    content = files.read_json(Path("out/flops/tofu-r50.json"))
    files.write_json(Path("out/flops/tofu-r50.json"), {**content, "config_hash": "by other code"})
    assert run_module.main([*tiny, "--method", "tofu", "--metrics-only", "--out", "out"]) == 0
    assert rows(files.read_json(Path("out/results.json")))["tofu-r50"]["flops"] is None


@pytest.mark.parametrize(
    ("method", "step", "at"), [("tofu", 3, 3), ("tofu", None, 3), ("tofu@start=0.5", 1, 3), ("tofu@end=0.5", 4, 2)]
)
def test_merge_maps_of_the_requested_or_nearest_step(tiny, monkeypatch, method, step, at):
    captions = []
    monkeypatch.setattr(merge_maps, "fit", lambda text, *_: captions.append(text) or text)
    more = [] if step is None else ["--map-step", str(step)]
    options = ["--steps", "4", "--limit", "1", "--maps", *more]
    assert run_module.main([*tiny, "--method", method, *options, "--generate-only", "--out", "out"]) == 0
    assert [caption.partition(",")[0] for caption in captions if caption.startswith("step")] == [f"step {at}"] * 2


def test_merge_maps_of_the_requested_block(tiny, deep, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "load_model", lambda *_: (deep, None))
    captions = []
    monkeypatch.setattr(merge_maps, "fit", lambda text, *_: captions.append(text) or text)
    options = [*tiny, "--limit", "1", "--maps", "--generate-only", "--out", "out"]
    for asked, blocks in (
        ("down_blocks.0", ["down_blocks.0.attentions.0", "down_blocks.0.attentions.1"]),
        ("attentions.2", ["up_blocks.3.attentions.2"]),
    ):
        captions.clear()
        assert run_module.main([*options, "--method", "tofu", "--map-block", asked]) == 0
        shown = [caption.partition(", ")[2].removesuffix(".transformer_blocks.0") for caption in captions[1:]]
        assert shown == blocks
    assert run_module.main([*options, "--method", "tofu", "--map-block", "up_block.9"]) == 2
    assert "--map-block is 'up_block.9'; merged blocks: down_blocks.0.attentions.0" in capsys.readouterr().err


def test_partially_complete_batch_is_timed(tiny):
    assert run_module.main([*tiny, "--method", "tofu", "--limit", "1", "--out", "out"]) == 0
    assert run_module.main([*tiny, "--method", "tofu", "--limit", "2", "--out", "out"]) == 0
    for row in files.read_json(Path("out/results.json"))["rows"]:
        assert row["seconds"]["n"] == row["speedup"]["n"] == 1


def test_settings_written_concurrently_are_accepted(tmp_path, monkeypatch):
    """Between looking for them and looking around, another may have written them."""
    settings = generate.Settings("m", "p", "own", "h", 0, 64, 1, None, 1, "cpu", "float32", "a", "t", "d", "tf")
    look = Path.iterdir

    def late(folder):
        files.write_json(tmp_path / "out" / "settings.json", vars(settings))
        return look(folder)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "iterdir", late)
    output_dir.init_output_dir(tmp_path / "out", settings)
    assert files.read_json(tmp_path / "out" / "settings.json") == vars(settings)


def test_images_of_other_batches_are_reported(tiny, capsys):
    """A longer list puts an image in another batch, where its last bits come out otherwise."""
    assert run_module.main([*tiny, "--method", "tofu", "--limit", "1", "--out", "out"]) == 0
    assert run_module.main([*tiny, "--method", "tofu,prune", "--limit", "2", "--out", "out"]) == 0
    found = rows(files.read_json(Path("out/results.json")))
    assert (found["tofu-r50"]["other_batch"], found["prune-r50"]["other_batch"]) == (0, 1)
    shown = capsys.readouterr().out
    assert "prune 50%: 1 of 2 images were generated in another batch than the baseline's" in shown
    assert "tofu 50%: 1 of 2" not in shown


@pytest.mark.parametrize("option", ["min_tokens", "depth_split"])
def test_auto_options_that_vary_between_runs_are_refused(tiny, capsys, option):
    """A clock decides the one, a measurement whose last bits are the machine's the other."""
    assert run_module.main([*tiny, "--method", f"deepcache:tofu@{option}=auto", "--out", "out"]) == 2
    assert f"deepcache:tofu@{option}=auto: every process measures the value of {option}=auto" in capsys.readouterr().err
    assert not Path("out").exists()


def test_too_many_steps_are_refused_before_writing(tiny, capsys):
    assert run_module.main([*tiny, "--steps", "1001", "--out", "out"]) == 2
    assert re.search(r"error: --steps is 1001: .*1000", capsys.readouterr().err)
    assert not Path("out").exists()


def test_each_method_is_warmed_up_once_where_a_run_resumes(tiny, monkeypatch):
    assert run_module.main([*tiny, "--batch", "1", "--method", "tofu,prune", "--out", "out"]) == 0
    for missing in ("tofu-r50/0000.png", "prune-r50/0001.png", "tofu-r50/0002.png", "prune-r50/0003.png"):
        (Path("out") / missing).unlink()
    calls = []
    generate_batch = generate.generate_batch

    def recording(pipe, requests, method, settings, **options):
        calls.append((method.slug, requests[0].id))
        return generate_batch(pipe, requests, method, settings, **options)

    monkeypatch.setattr(generate, "generate_batch", recording)
    assert run_module.main([*tiny, "--batch", "1", "--method", "tofu,prune", "--out", "out"]) == 0
    warm_up = generate.WARM_UP
    assert calls == [
        *[("tofu-r50", "0000")] * (warm_up + 1), ("tofu-r50", "0002"),
        *[("prune-r50", "0001")] * (warm_up + 1), ("prune-r50", "0003"),
    ]  # fmt: skip


def test_a_folder_called_demo_is_not_the_embedded_model(tiny, monkeypatch):
    """Measured later, its images would be measured by the embedded model's classifier."""
    (Path("models") / "demo").mkdir(parents=True)
    monkeypatch.chdir("models")
    for model in ("demo/", "../models/demo", str(Path("demo").absolute())):
        assert prepare.model_name(model) == "demo, a folder"
    assert prepare.model_name("demo") == "demo"
    assert prepare.model_name("..") == Path.cwd().parent.name


def test_inconsistent_world_size_is_refused(monkeypatch):
    """Each of them would draw everything, into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda **_: Namespace(num_processes=1, process_index=0))
    with pytest.raises(EvalError, match="WORLD_SIZE is 2, and accelerate finds 1"):
        distributed.launched_processes(cpu=False)


def test_process_group_is_destroyed_at_exit(monkeypatch):
    """A process group that is still open at the end of a process now and then aborts it (exit code -6)."""
    state = Namespace(num_processes=2, process_index=1, device=None, destroy_process_group=lambda: None)
    registered = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda **_: state)
    monkeypatch.setattr("atexit.register", registered.append)
    distributed.launched_processes(cpu=True)
    assert registered == [state.destroy_process_group]


def test_processes_without_accelerator_use_cpus(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(plan, "pick_device", lambda name: torch.device("cpu" if name == "auto" else name))
    monkeypatch.setattr(plan, "launched_processes", lambda cpu: seen.append(cpu) or Processes())
    for device in ("auto", "cpu", "meta"):
        assert run_module.main([*tiny, "--device", device, "--dry-run"]) == 0
    assert seen == [True, True, False]


def test_metric_unavailable_in_one_process_is_skipped_in_all():
    """Their figures are put together in the end, when everything is generated."""
    psnr, lacking = pairwise.psnr(), base.Skipped("LPIPS-alex", "no network on the other node")
    lpips = base.Pairwise("LPIPS-alex", "lpips", True, lambda a, b: a)

    class Two(Processes):
        def gather_object(self, value):
            return [value, [lacking]]

    assert execute.available_everywhere([psnr, lpips], Two(0, 2)) == [psnr, lacking]
    assert execute.available_everywhere([psnr, lacking], Processes()) == [psnr, lacking]


def test_progress_is_shown_by_every_shard_and_one_process_of_a_launch(tiny, monkeypatch, capsys):
    assert run_module.main([*tiny, "--shard", "2/2", "--out", "out"]) == 0
    assert "tofu-r50 (2 of 2)" in capsys.readouterr().err
    monkeypatch.setattr(plan, "launched_processes", lambda cpu: Processes(1, 2))
    monkeypatch.setattr(Processes, "wait_for_everyone", lambda self: None)
    monkeypatch.setattr(Processes, "gather_object", lambda self, value: [value, value])
    assert run_module.main([*tiny, "--generate-only", "--out", "other"]) == 0
    assert "tofu-r50" not in capsys.readouterr().err


def test_several_processes_refuse_shard_and_device_index(tiny, monkeypatch, capsys):
    monkeypatch.setattr(plan, "launched_processes", lambda cpu: execute.Processes(0, 2))
    assert run_module.main([*tiny, "--shard", "1/2"]) == 2
    assert "--shard is for processes that are started independently" in capsys.readouterr().err
    assert run_module.main([*tiny, "--device", "cudo"]) == 2
    assert "did you mean 'cuda'" in capsys.readouterr().err
    assert run_module.main([*tiny, "--device", "cpu:0"]) == 2
    assert "each of 2 processes uses its own device" in capsys.readouterr().err


def test_out_of_memory_while_generating_gives_advice(tiny, monkeypatch, capsys):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has 8 GiB.")

    monkeypatch.setattr(execute, "generate", full)
    assert run_module.main([*tiny, "--out", "out"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: CUDA out of memory. Tried to allocate 20 GiB: a smaller --batch takes less; it changes the last bits, "
        "so it needs a new folder"
    )


def test_out_of_memory_in_a_metric_gives_advice(tiny, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(execute, "score", full)
    assert run_module.main([*tiny, "--out", "out"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("--metrics-only --device cpu measures without the accelerator")
    )


def test_other_runtime_errors_are_not_reported_as_out_of_memory(tiny, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(execute, "score", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_module.main([*tiny, "--out", "out"])


def test_footnotes_on_few_images_and_memory(finished):
    found = json.loads(json.dumps(finished[1]))
    output = "\n".join(tables.footnotes(found))
    assert f"FD-demo: from n={len(PROMPTS)} images in 3 dimensions. It is biased upwards" in output
    assert "n/a off CUDA" in output
    row = found["rows"][1]
    row |= {"peak_bytes": 3 * 2**20, "held_bytes": 5 * 2**20}
    row["metrics"]["KID"] = {**row["metrics"]["FD-demo"], "n": 999}
    found["metrics"].append({**next(m for m in found["metrics"] if m["name"] == "FD-demo"), "name": "KID"})
    output = "\n".join(tables.footnotes(found))
    assert "KID: from n=999 images; under 1,000" in output
    assert "beyond the 5 MiB that the model itself holds" in output
    row["metrics"]["KID"]["n"] = 1000
    assert "KID: from" not in "\n".join(tables.footnotes(found))


# --- two runs ---------------------------------------------------------------------------------------------------------


def test_compare_two_runs(tiny, capsys):
    assert run_module.main([*tiny, "--method", "tofu,prune", "--out", "a"]) == 0
    assert run_module.main([*tiny, "--method", "tofu", "--out", "b"]) == 0
    capsys.readouterr()
    assert compare_module.main(["a", "b", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["differences"] == {}
    psnr = next(row for row in content["rows"] if row["figure"] == "PSNR")
    assert psnr["method"] == "tofu 50%"
    assert psnr["a"] == psnr["b"]
    assert psnr["b - a"].startswith("+0.00 (")  # the same images
    assert {row["method"] for row in content["rows"]} == {"tofu 50%"}


def test_compare_refuses_other_images_of_the_same_number(tiny, capsys):
    assert run_module.main([*tiny, "--method", "tofu", "--limit", "2", "--per-prompt", "2", "--out", "a"]) == 0
    assert run_module.main([*tiny, "--method", "tofu", "--limit", "4", "--out", "b"]) == 0
    assert compare_module.main(["a", "b"]) == 2
    assert "a and b cannot be compared: b has no image 0000_1, 0001_1" in capsys.readouterr().err


def test_compare_ignores_times_under_another_driver(tiny, capsys):
    for out in ("a", "b"):
        assert run_module.main([*tiny, "--method", "tofu", "--limit", "2", "--out", out]) == 0
    found = files.read_json(Path("b/results.json"))
    (drawn,) = found["provenance"]["generated"]
    drawn["runtime"] = {"driver": "999.1"}  # measuring was done on the machine of `a`
    drawn["commit"], drawn["packages"]["tomesd"] = "abc", "9"
    files.write_json(Path("b/results.json"), found)
    capsys.readouterr()
    assert compare_module.main(["a", "b", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["differences"]["driver"] == [None, "999.1"]
    assert content["differences"]["commit"][1] == "abc"
    assert content["differences"]["tomesd"][1] == "9"
    for figure in ("speed-up", "s/image"):
        row = next(row for row in content["rows"] if row["figure"] == figure)
        assert re.fullmatch(r"\d+\.\d+×? \(\d+\.\d+–\d+\.\d+\)", row["a"])
        assert row["b"] == "n/a (other environment)"


def test_compare_ignores_times_without_the_baseline(tiny, capsys):
    assert run_module.main([*tiny, "--method", "tofu", "--limit", "2", "--out", "a"]) == 0
    found = files.read_json(Path("a/results.json"))

    def shown():
        files.write_json(Path("a/results.json"), found)
        capsys.readouterr()
        assert compare_module.main(["a", "a", "--json"]) == 0
        content = json.loads(capsys.readouterr().out)["rows"]
        return {row["figure"]: (row["a"], row["b"], row["b - a"]) for row in content}

    rows(found)["tofu-r50"]["same_run"] = False
    assert shown()["s/image"] == ("–", "–", "–")
    assert "×" in shown()["speed-up"][0]
    rows(found)["tofu-r50"]["speedup"] = None
    assert shown()["speed-up"] == shown()["s/image"] == ("–", "–", "–")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--steps", "2"], "a and b cannot be compared: steps is 1 in one, 2 in the other"),
        (["--limit", "3"], "a and b cannot be compared: n is 5 in one, 3 in the other"),
        (["--seed", "4"], "a and b cannot be compared: seed is 0 in one, 4 in the other"),
        (["--method", "prune"], "a and b have no method in common"),
    ],
)
def test_compare_refuses_other_settings(tiny, capsys, change, said):
    assert run_module.main([*tiny, "--method", "tofu", "--out", "a"]) == 0
    assert run_module.main([*tiny, "--method", "tofu", "--out", "b", *change]) == 0
    assert compare_module.main(["a", "b"]) == 2
    assert said in capsys.readouterr().err


def test_compare_names_another_dtype(tiny, capsys):
    """Other weights follow from it, and are not what to look for."""
    assert run_module.main([*tiny, "--method", "tofu", "--limit", "2", "--out", "a"]) == 0
    assert run_module.main([*tiny, "--method", "tofu", "--limit", "2", "--out", "b"]) == 0
    found = files.read_json(Path("b/results.json"))
    found["settings"] |= {"dtype": "float16", "pipeline": "another hash"}
    files.write_json(Path("b/results.json"), found)
    assert compare_module.main(["a", "b"]) == 2
    assert "cannot be compared: dtype is 'float32' in one, 'float16' in the other" in capsys.readouterr().err


def test_compare_names_other_versions_and_ignores_their_times(tiny, capsys):
    for out in ("a", "b"):
        assert run_module.main([*tiny, "--method", "tofu", "--out", out]) == 0
    found = files.read_json(Path("b/results.json"))
    found["settings"]["torch"] = "9.9"
    files.write_json(Path("b/results.json"), found)
    capsys.readouterr()
    assert compare_module.main(["a", "b"]) == 0
    printed = capsys.readouterr().out
    assert f"torch: {torch.__version__} in a, 9.9 in b" in printed
    assert "PSNR: float64, peak 255, dB" in printed
    assert "n/a (other environment)" in printed
    for row in found["rows"]:
        row["seconds"] = None
    files.write_json(Path("b/results.json"), {**found, "settings": files.read_json(Path("a/results.json"))["settings"]})
    assert compare_module.main(["b", "a"]) == 0
    capsys.readouterr()
    found["metrics"][0]["implementation"] = "by hand"
    files.write_json(Path("b/results.json"), found)
    assert compare_module.main(["a", "b"]) == 2
    assert "PSNR is measured by float64, peak 255, dB in one, by by hand in the other" in capsys.readouterr().err


# --- small laws -------------------------------------------------------------------------------------------------------


def test_missing_images_are_named(tiny):
    assert run_module.main([*tiny, "--out", "out"]) == 0
    settings = generate.Settings(**files.read_json(Path("out/settings.json")))
    requests = requests_module.load_requests(tiny[-1])
    for folder, id in (("tofu-r50", "0002"), ("baseline", "0001")):
        (Path("out") / folder / f"{id}.png").unlink()
        with pytest.raises(EvalError, match=rf"{folder} lacks {id}\.png"):
            score.score(Path("out"), settings, requests, methods.parse("tofu", [0.5]), [])


def test_cached_metrics_need_no_images(tiny, monkeypatch):
    assert run_module.main([*tiny, "--out", "out"]) == 0
    found = Path("out/results.json").read_text()
    read = []
    monkeypatch.setattr(score, "load", lambda *what: read.append(what))
    assert run_module.main([*tiny, "--out", "out"]) == 0
    again = Path("out/results.json").read_text()
    assert json.loads(again)["rows"] == json.loads(found)["rows"]
    assert read == []


@pytest.mark.parametrize("groups", ["abcde", "aabbccddee"])
def test_wilson_interval_of_five_ones_is_not_a_point(groups):
    """A bootstrap of ones is 1 to 1; Wilson's interval knows how few they are, and that two of a class are not two."""
    figure = summary.proportion_ci(torch.ones(len(groups)), list(groups))
    assert (figure["value"], figure["n"]) == (1, len(groups))
    assert figure["low"] == pytest.approx(5 / (5 + 1.96**2))  # its closed form where all are ones
    assert figure["high"] == pytest.approx(1)


def test_few_classes_have_no_interval():
    """Seven right of ten images of one prompt say nothing of what other prompts would give."""
    values = torch.tensor([1.0] * 7 + [0.0] * 3)
    assert summary.proportion_ci(values, ["a"] * 10) == {
        "value": pytest.approx(0.7),
        "low": None,
        "high": None,
        "n": 10,
    }


def test_nan_is_not_counted_as_equal():
    figure = summary.mean_ci(torch.tensor([30.0, math.inf, math.nan]).double(), ["a", "b", "c"])
    assert (figure["value"], figure["infinite"], figure["nan"]) == (30, 1, 1)
    assert tables.short(figure, 1) == "30.0 (1 equal, 1 NaN)"


def test_prompts_and_ids_may_have_any_characters(tiny, tmp_path):
    """Also those of files that stand in the folder for other things."""
    ids = ["flops", "settings", "results", "maps"]
    (tmp_path / "ids.jsonl").write_text("\n".join(json.dumps({"prompt": "a bee", "id": id}) for id in ids))
    arguments = [
        *tiny,
        "--prompts",
        str(tmp_path / "ids.jsonl"),
        "--method",
        "tofu",
        "--flops",
        "--maps",
        "--out",
        "out",
    ]
    assert run_module.main(arguments) == 0
    assert run_module.main(arguments) == 0
    assert rows(files.read_json(Path("out/results.json")))["tofu-r50"]["flops"] > 0


# --- files that do not belong together --------------------------------------------------------------------------------


def test_only_abandoned_temp_files_are_removed(tmp_path):
    """The file of a writer that is at work in another process, and files of other people, stay."""
    (tmp_path / "baseline").mkdir()
    names = {"baseline/.00001-0.png.0a1b2c3d": True, "baseline/.00002-0.png.0a1b2c3e": False,
             "baseline/00001-0.png": False,
             ".gitignore": False, "baseline/.notes.txt": False}  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("x")
        age = 0 if "00002" in name else 2 * files.ABANDONED
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "baseline" / ".00003-0.png.0a1b2c3f").symlink_to("renamed meanwhile")  # found, and gone when looked at
    assert files.remove_temp_files(tmp_path) == 1
    assert {name: not (tmp_path / name).exists() for name in names} == names


def test_results_of_a_run_killed_while_writing_are_refused(tiny, monkeypatch, capsys):
    assert run_module.main([*tiny, "--method", "tofu", "--metrics", "psnr", "--out", "out"]) == 0
    write = results_module.write

    def killed(path, content):
        if path.name == "results.json":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(results_module, "write", killed)
    assert run_module.main([*tiny, "--method", "tofu,prune", "--metrics", "psnr", "--out", "out"]) == 130
    monkeypatch.setattr(results_module, "write", write)
    capsys.readouterr()
    assert report_module.main(["out", "--markdown"]) == 2
    assert "results.json and per_image.csv are of two runs" in capsys.readouterr().err
    assert run_module.main([*tiny, "--method", "tofu,prune", "--metrics", "psnr", "--out", "out"]) == 0
    assert report_module.main(["out", "--markdown"]) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "has schema None"),
        ('{"schema": 9}', "has schema 9"),
        ('{"schema": 2}', "results.json is damaged: 'settings' is a required property"),
    ],
)
def test_invalid_results_print_one_line(tmp_path, capsys, content, said):
    (tmp_path / "results.json").write_text(content)
    assert report_module.main([str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_results_that_are_not_json_are_not_reported_as_missing(tiny, capsys):
    Path("out").mkdir()
    Path("out/results.json").write_text("{")
    assert report_module.main(["out"]) == 2
    assert "out/results.json is damaged: it holds no JSON: the same command" in capsys.readouterr().err


def test_results_without_a_figure_print_one_line(tiny, capsys):
    assert run_module.main([*tiny, "--metrics", "psnr", "--out", "out"]) == 0
    found = files.read_json(Path("out/results.json"))
    del found["rows"][1]["speedup"]
    files.write_json(Path("out/results.json"), found)
    for program in (lambda: report_module.main(["out", "--markdown"]), lambda: compare_module.main(["out", "out"])):
        capsys.readouterr()
        assert program() == 2
        assert capsys.readouterr().err.startswith("error: out/results.json is damaged: in ['rows'][1] ")


def test_dry_run_refuses_the_same_as_a_run(tiny, capsys):
    assert run_module.main([*tiny, "--generate-only", "--out", "out"]) == 0
    before = Path("out/settings.json").read_text()
    capsys.readouterr()
    assert run_module.main([*tiny, "--batch", "1", "--dry-run", "--out", "out"]) == 2
    assert "its images were generated with batch" in capsys.readouterr().err
    assert Path("out/settings.json").read_text() == before
    assert run_module.main([*tiny, "--dry-run", "--reference", "nowhere"]) == 2
    assert "--reference nowhere: there is no folder 'baseline' in it" in capsys.readouterr().err
    assert run_module.main([*tiny, "--dry-run", "--maps", "--map-block", "nothing"]) == 2
    assert "--map-block is 'nothing'" in capsys.readouterr().err
    assert (
        run_module.main([*tiny, "--dry-run", "--reference", "out", "--json"]) == 0
    )  # what would be taken is not generated
    content = {m["key"]: (m["existing"], m["images"]) for m in json.loads(capsys.readouterr().out)["methods"]}
    assert content == {"baseline": (5, 5), "tofu-r50": (0, 5)}


def test_corrupt_record_is_not_reported_as_other_code(tiny, capsys):
    assert run_module.main([*tiny, "--generate-only", "--out", "out"]) == 0
    Path("out/baseline/0002.json").write_text('{"id": "00')
    capsys.readouterr()
    assert run_module.main([*tiny, "--metrics-only", "--out", "out"]) == 2
    assert "baseline: 0002.png are corrupt, or their records; without --metrics-only" in capsys.readouterr().err


def test_corrupt_image_of_a_report_is_named(tiny, capsys):
    assert run_module.main([*tiny, "--metrics", "psnr", "--out", "out"]) == 0
    Path("out/baseline/0000.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert report_module.main(["out"]) == 2
    assert "the image baseline/0000.png is damaged: the same command of eval.run" in capsys.readouterr().err


def test_generate_only_as_json(tiny, capsys, monkeypatch):
    assert run_module.main([*tiny, "--method", "tofu", "--generate-only", "--json", "--out", "out"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": "out", "generated": 10}


def test_only_the_main_process_prints(tiny, capsys, monkeypatch):
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setattr(plan, "launched_processes", lambda cpu, rank=rank: Processes(rank, 2))
        monkeypatch.setattr(Processes, "wait_for_everyone", lambda self: None)
        monkeypatch.setattr(Processes, "gather_object", lambda self, value: [value, 3])
        for stage in ("--dry-run", "--generate-only"):
            assert run_module.main([*tiny, stage, "--json", "--device", "cpu", "--out", "out"]) == 0
            printed = capsys.readouterr().out
            assert printed.count('"out": "out"') == lines
    assert '"generated"' not in printed


def test_metric_cache_of_the_reference_is_used(tiny, monkeypatch):
    assert run_module.main([*tiny, "--method", "baseline", "--metrics", "psnr", "--out", "first"]) == 0
    seen = []
    load = score.load
    monkeypatch.setattr(score, "load", lambda folder, requests: seen.append(folder.name) or load(folder, requests))
    asked = ["--method", "baseline", "--metrics", "psnr", "--reference", "first", "--out", "second"]
    assert run_module.main([*tiny, *asked]) == 0
    assert seen == []


def test_settings_that_cannot_be_read_are_not_overwritten(tiny, capsys):
    assert run_module.main([*tiny, "--generate-only", "--out", "out"]) == 0
    Path("out/settings.json").write_text("{")
    for stage in ([], ["--metrics-only"]):
        assert run_module.main([*tiny, *stage, "--out", "out"]) == 2
        assert "its settings.json cannot be read" in capsys.readouterr().err
    assert Path("out/settings.json").read_text() == "{"


def test_few_images_have_no_interval():
    figure = summary.mean_ci(torch.tensor([30.0, 40.0]).double(), ["a", "b"])
    assert (figure["value"], figure["low"], figure["high"]) == (35, None, None)


def test_intervals_resample_classes(tiny):
    """Three images of a prompt are generated together: by images, the interval would be another."""
    assert run_module.main([*tiny, "--method", "tofu", "--per-prompt", "3", "--metrics", "psnr", "--out", "out"]) == 0
    with Path("out/per_image.csv").open(encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["key"] == "tofu-r50"]
    values = torch.tensor([float(line["PSNR"]) for line in lines], dtype=torch.float64)
    figure = rows(files.read_json(Path("out/results.json")))["tofu-r50"]["metrics"]["PSNR"]
    assert (figure["low"], figure["high"]) == statistics.bootstrap(values, [line["prompt"] for line in lines])
    assert (figure["low"], figure["high"]) != statistics.bootstrap(values, [line["id"] for line in lines])


def test_progress_is_shown(tiny, capsys):
    assert run_module.main([*tiny, "--method", "tofu", "--out", "out"]) == 0
    output = capsys.readouterr().err
    assert re.search(r"10/10 \[\d+:\d+<00:00, .*(img/s|s/img)\]", output)  # done, of, time, what is left, rate


PROGRAMS = [
    "eval.run",
    "eval.sweep",
    "eval.report",
    "eval.compare",
    "eval.bench",
    "eval.prompts",
    "eval.reporting.pages",
    "eval.speed.stand_in",
    "research.classifiers.classify",
    "research.classifiers.train",
    "research.adaptivision.ablations",
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_examples_of_help_can_be_parsed(name, capsys):
    try:
        program = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert "default: []" not in output
    examples = re.findall(rf"^  (?:python|accelerate .*) -m {re.escape(name)}( .*)?$", output, re.MULTILINE)
    assert examples
    parser = options_module.parser if name == "eval.run" else program.parser
    for example in examples:
        _, rest = parser().parse_known_args(shlex.split(example))
        options_module.parser().parse_args(rest if name == "eval.sweep" else [])  # its options are eval.run's
        assert name == "eval.sweep" or not rest


def test_every_command_has_examples():
    root = Path(__file__).parents[2]
    files = [path for folder in ("eval", "research") for path in (root / folder).rglob("*.py")]
    programs = {path for path in files if "__main__" in path.read_text() and "common.cli import" in path.read_text()}
    assert {".".join(path.relative_to(root).with_suffix("").parts) for path in programs} == set(PROGRAMS)


def test_infinite_values_are_counted_not_averaged():
    figure = summary.mean_ci(torch.tensor([30.0, float("inf"), 40.0]).double(), ["a", "b", "c"])
    assert (figure["value"], figure["n"], figure["infinite"]) == (35, 2, 1)


def test_speedup_is_a_ratio_of_interleaved_times():
    """A machine that slows down by half during the run changes the seconds, not the ratio."""

    def record(seconds, run="one", timed=True, batch=2):
        return {"seconds": seconds, "run": run, "timed": timed, "batch": batch, "peak_bytes": None}

    full = {"a": record(2.0), "b": record(4.0), "c": record(9.0), "d": record(9.0, timed=False)}
    full["e"] = record(9.0, batch=1)
    own = {"a": record(1.0), "b": record(2.0), "c": record(1.0, run="two"), "d": record(1.0, timed=False)}
    own["e"] = record(1.0, batch=1)  # a rest, which costs more an image
    speed = summary.timing_summary(full, own)
    assert speed["speedup"] == {"median": 2.0, "mean": 2.0, "p5": 2.0, "p95": 2.0, "n": 2}
    assert (speed["seconds"]["mean"], speed["seconds"]["n"]) == (1.5, 2)  # of the same batches
    alone = summary.timing_summary(full, {"c": own["c"]})
    assert (alone["speedup"], alone["seconds"]["n"]) == (None, 1)
    own["c"] |= {
        "denoiser_seconds": 0.75,
        "baseline_denoiser_seconds": 1.25,
    }  # of one second: a quarter is decoding and text
    own["b"] |= {"denoiser_seconds": 1.5, "baseline_denoiser_seconds": None}
    speed = summary.timing_summary(full, own)  # what ran beside it is a better measure than any other turn
    assert (speed["speedup"]["n"], speed["speedup"]["mean"]) == (1, 1.5)
    assert (speed["seconds"]["n"], speed["denoiser_seconds"]["mean"]) == (1, 0.75)
    assert summary.percentiles([1.0, 1.0, 4.0]) == pytest.approx({"median": 1, "mean": 2, "p5": 1, "p95": 3.7, "n": 3})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--out /home/me/runs/x --ratio 0.5", "--out x --ratio 0.5"),
        ("No such file: '/data/w/alex.pth'", "No such file: 'alex.pth'"),
        (r"C:\Users\me\model", "model"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("s/image and/or kv", "s/image and/or kv"),
        ("runs/out", "runs/out"),
    ],
)
def test_only_absolute_paths_are_cut(text, shown):
    assert files.without_paths(text) == shown


def test_written_files_have_default_permissions(tmp_path):
    """A report is for colleagues and web servers too."""
    files.write(tmp_path / "plain", "x")
    (tmp_path / "usual").write_text("x")
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "usual"]


@pytest.mark.parametrize("width", [120, 130])
def test_a_terminal_shows_every_figure(capsys, width):
    """The last column was cropped: 1.000 stood there as 1.0."""
    found, _ = results_module.read(Path(__file__).parents[2] / "benchmarks" / "results" / "demo-sweep")
    columns, rows = tables.table(tables.with_rows(found, ["tofu 50%", "baseline, other seeds"]))
    assert len(columns) > 8
    tables.terminal(tables.with_rows(found, ["tofu 50%", "baseline, other seeds"]), Console(width=width))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    for _, cells in rows:
        for cell in cells:
            assert {cell.value, *cell.interval.split("–")} <= {*shown.split(), ""}


def test_caption_narrower_than_a_letter_terminates():
    assert merge_maps.fit("baseline", ImageFont.load_default(15), 2) == "…"


def test_row_is_labelled_with_its_effective_ratio():
    (method,) = methods.parse("tofu@ratio=0.3", [0.5])
    assert (method.slug, method.ratio) == ("tofu-r30", 0.3)


def test_only_code_that_decides_images_changes_their_hash(monkeypatch, tmp_path):
    """A new file elsewhere in the package, such as another host's, must not make all images again."""
    package = tmp_path / "demo" / "tofu_sd"
    for folder in ("core", "kernels", "patching", "hosts", "demo"):
        (package / folder).mkdir(parents=True)
    (package / "config.py").write_text("a = 1")
    (package / "core" / "matching.py").write_text("a = 1")
    monkeypatch.setattr(methods.tofu_sd, "__file__", str(package / "__init__.py"))
    before = methods.source_hash.__wrapped__()
    for other in ("demo/classes.py", "hosts/webui.py", "recipes.py"):
        (package / other).write_text("a = 1")
    assert methods.source_hash.__wrapped__() == before
    for own in ("core/matching.py", "config.py", "hosts/diffusers_unet.py"):
        (package / own).write_text(own)
        after = methods.source_hash.__wrapped__()
        assert after != before
        before = after
