"""Results of earlier versions are read with unchanged figures, in the names of this version."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from eval import report
from eval.common import schema_changes
from eval.common.schema_changes import convert, convert_record
from eval.reporting import results
from eval.speed import tables

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/results.json"))
FILES = sorted(RESULTS.rglob("*.json"))
BENCHMARKS = sorted(RESULTS.glob("bench-*.json"))
OLD_KEYS = {"denoising", "beside", "of_one_run", "blank", "undefined", "drawn", "pictures", "classed as asked",
            "PD-judge", "FD-judge", "moved"}  # fmt: skip


def numbers(value: Any) -> list[Any]:
    """All numbers, booleans and nulls of a JSON value, in their order; not the schema's number."""
    if isinstance(value, dict):
        return [n for key, one in value.items() if key != "schema" for n in numbers(one)]
    if isinstance(value, list):
        return [n for one in value for n in numbers(one)]
    return [] if isinstance(value, str) else [value]


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_there_are_committed_results_of_every_kind() -> None:
    assert len(FOLDERS) >= 10
    assert len(BENCHMARKS) >= 9
    assert any(path.name == "classify.json" for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_no_figure_of_a_committed_file_is_changed(path: Path) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    before = copy.deepcopy(raw)
    assert numbers(convert(raw)) == numbers(before)
    assert raw == before
    assert convert(convert(raw)) == convert(raw)


def name_of(key: str) -> str:
    return schema_changes.BASELINE_NAMES.get(key, key)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_committed_run_is_read_with_its_figures_under_the_names_of_this_version(folder: Path) -> None:
    raw = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found, images = results.read(folder)  # it checks the schema
    assert found["schema"] == schema_changes.SCHEMA == results.SCHEMA
    assert not keys(found) & OLD_KEYS
    assert found["rows"][0]["key"] == found["rows"][0]["method"] == "baseline"
    raw_rows = {name_of(row["key"]): row for row in raw["rows"]}
    assert all(numbers(row) == numbers(raw_rows[row["key"]]) for row in found["rows"])
    assert {row["key"] for row in images} == {row["key"] for row in found["rows"] if "skipped" not in row}
    with (folder / "per_image.csv").open(encoding="utf-8", newline="") as file:
        raw_images = {(name_of(row["key"]), row["id"]): row for row in csv.DictReader(file)}
    for image in images:
        cells = raw_images[image["key"], image["id"]]
        for name in set(cells) - {"method", "key", "prompt"}:
            assert image[schema_changes.METRIC_NAMES.get(name, name)] == cells[name]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_committed_benchmark_is_read_with_its_figures(path: Path) -> None:
    found = tables.read(path)
    assert numbers(found) == numbers(json.loads(path.read_text(encoding="utf-8")))
    assert "baseline" in {row["method"] for row in found["rows"]}


def test_rows_figures_and_runs_have_the_names_of_this_version() -> None:
    old = {
        "schema": 1,
        "metrics": [{"name": "classed as asked"}],
        "rows": [
            {"method": "full", "key": "full", "denoising": {"median": 1}, "blank": 0, "undefined": 2,
             "metrics": {"classed as asked": {"value": 1, "undefined": 3}}},
            {"method": "full, other seeds", "key": "full-other-seeds", "beside": True, "of_one_run": False},
            {"method": "tofu@keys_only=True", "key": "tofu-r50"},
        ],
        "provenance": {"command": "python -m eval.run --method full --scale-row", "drawn": [{"pictures": 4}]},
    }  # fmt: skip
    assert convert(old) == {
        "schema": 2,
        "metrics": [{"name": "class accuracy"}],
        "rows": [
            {"method": "baseline", "key": "baseline", "denoiser_seconds": {"median": 1}, "flat": 0, "nan": 2,
             "metrics": {"class accuracy": {"value": 1, "nan": 3}}},
            {"method": "baseline, other seeds", "key": "baseline-other-seeds", "interleaved": True, "same_run": False},
            {"method": "tofu@kv_only=True", "key": "tofu-r50"},
        ],
        "provenance": {"command": "python -m eval.run --method full --seed-baseline", "generated": [{"images": 4}]},
    }  # fmt: skip


def test_results_of_this_version_keep_their_keys() -> None:
    own = {"schema": 2, "rows": [{"method": "tofu", "key": "tofu", "beside": 1}]}
    assert convert(own) == own


def test_results_of_classifiers_and_ablations_have_the_names_of_this_version() -> None:
    classify = {"schema": 1, "rows": [{"method": "full", "label": "full", "moved": None}]}
    assert convert(classify) == {
        "schema": 2,
        "rows": [{"method": "baseline", "label": "baseline", "feature_shift": None}],
    }
    ablations = {"schema": 1, "rows": [{"variant": "all patches", "flops": 1}]}
    assert convert(ablations) == {**ablations, "schema": 2}


@pytest.mark.parametrize(
    "value", [None, [], [1], {}, {"schema": 1}, {"schema": 1, "rows": 3}, {"schema": 1, "rows": [1]}]
)
def test_values_of_another_shape_are_unchanged(value: Any) -> None:
    assert convert(value) == value


def test_records_of_images_are_converted() -> None:
    old = {"made": "a", "denoising": 1, "full_denoising": 2, "drawn_with": ["0"], "seconds": 3}
    assert convert_record(old) == {
        "config_hash": "a", "denoiser_seconds": 1, "baseline_denoiser_seconds": 2, "batch_ids": ["0"], "seconds": 3,
    }  # fmt: skip
    assert convert_record(None) is None


def test_report_accepts_rows_and_columns_by_their_earlier_names(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(RESULTS / "demo-r50"), "--markdown"]
    assert report.main([*arguments, "--rows", "full", "--columns", "classed as asked"]) == 0
    earlier = capsys.readouterr().out
    assert report.main([*arguments, "--rows", "baseline", "--columns", "class accuracy"]) == 0
    assert capsys.readouterr().out == earlier
    assert "| baseline |" in earlier
    assert "| class accuracy ↑ |" in earlier.replace("| method ", "")
