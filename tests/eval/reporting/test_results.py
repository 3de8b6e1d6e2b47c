"""What one run writes and reports: results.json, per_image.csv, the report, grid and tables."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from eval_run import COMMAND, PROMPTS, ToyClassifier, rows
from PIL import Image
from rich.console import Console

from eval import report as report_module
from eval import run as run_module
from eval.common import files
from eval.common.schema_changes import convert
from eval.evaluation import prepare
from eval.reporting import results as results_module
from eval.reporting import tables
from eval.reporting.drawings import pictures


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
    committed = sorted((Path(__file__).parents[3] / "benchmarks" / "results").glob("*/results.json"))
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
    with Image.open(tmp_path / "two.png") as image:
        assert image.size == (8 + 2 * (64 + 8), 28 + 20 + 64 + 8)
    assert report_module.main([str(out), "--markdown", "--columns", "PNSR"]) == 2
    assert "no column 'PNSR' (did you mean 'PSNR'?)" in capsys.readouterr().err


def test_rows_that_share_a_label_are_labelled_by_their_keys(finished, capsys, tmp_path):
    """A matcher named like a method gave a second row of that label, and one of the two was dropped."""
    shutil.copytree(finished[0], tmp_path / "out")
    found = files.read_json(tmp_path / "out" / "results.json")
    rows(found)["tomesd-r50"]["method"] = "tofu"
    files.write_json(tmp_path / "out" / "results.json", found)
    assert report_module.main([str(tmp_path / "out"), "--markdown"]) == 0
    names = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines()[2:7]]
    assert names == ["baseline", "tofu-r50", "kv:tome+p 50%", "tomesd-r50", "baseline, other seeds"]
    assert report_module.main([str(tmp_path / "out"), "--markdown", "--rows", "tomesd-r50"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("| tomesd-r50 | ")
    assert report_module.main([str(tmp_path / "out"), "--markdown", "--rows", "tofu 50%"]) == 2
    assert "no row 'tofu 50%'" in capsys.readouterr().err
    tables.terminal(found, Console(width=120))
    shown = capsys.readouterr().out
    assert "tofu-r50" in shown
    assert "tomesd-r50" in shown


def test_report_shows_paired_differences_between_methods(finished, capsys):
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
    assert [i["id"] for i in pictures.worst_first(images, lower)] == ["b", "c", "a"]
    assert [i["id"] for i in pictures.worst_first(images, higher)] == ["a", "c", "b"]


def test_denoiser_seconds_are_reported(finished):
    for row in finished[1]["rows"]:
        assert 0 < row["denoiser_seconds"]["median"] < row["seconds"]["median"]


def test_footnotes_explain_few_images_and_memory(finished):
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


@pytest.mark.parametrize("width", [120, 130])
def test_a_terminal_shows_every_figure(capsys, width):
    """The last column was cropped: 1.000 stood there as 1.0."""
    found, _ = results_module.read(Path(__file__).parents[3] / "benchmarks" / "results" / "demo-sweep")
    columns, rows = tables.table(tables.with_rows(found, ["tofu 50%", "baseline, other seeds"]))
    assert len(columns) > 8
    tables.terminal(tables.with_rows(found, ["tofu 50%", "baseline, other seeds"]), Console(width=width))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    for column in columns:  # a heading breaks between words only: "denoisin/g" and "TFLOP/im/age" stood there
        assert set(re.split(r"(?<=[/-])(?=\w)| ", column.title)) <= set(re.split(r"(?<=[/-])(?=\w)|\s+", shown))
    for _, cells in rows:
        for cell in cells:
            assert {cell.value, *cell.interval.split("–")} <= {*shown.split(), ""}


def test_disagreement_is_written_for_two_rows_alone(finished, capsys, tmp_path):
    """One step of a random model: whether its metrics disagree is left open, a file without a sentence is not."""
    out, _ = finished
    pair = tmp_path / "pair.png"
    code = report_module.main([str(out), "--disagreement", str(pair), "--rows", "tofu 50%", "kv:tome+p 50%"])
    printed = capsys.readouterr()
    assert (code == 0) == pair.exists() == ("prefer different methods on" in printed.out)
    assert code == 0 or "agree on each of" in printed.err
    assert report_module.main([str(out), "--disagreement", str(pair), "--rows", "tofu 50%"]) == 2
    assert "--rows names 1" in capsys.readouterr().err
    assert report_module.main([str(out), "--disagreement", str(tmp_path / "none" / "pair.png"), "--rows", "a"]) == 2
