"""Files that others saved, edited or damaged: they are read, or refused in one line, and a spreadsheet runs none."""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from eval_run import COMMAND, ToyClassifier
from tiny import SHALLOW, sd15_pipe

from eval import EvalError, run
from eval import bench as bench_module
from eval import compare as compare_module
from eval import report as report_module
from eval.common import files, formats
from eval.common.files import write_results
from eval.common.schema_changes import SCHEMA
from eval.evaluation import prepare
from eval.images import merge_maps, output_dir, records
from eval.images import requests as requests_module
from eval.methods import registry as methods
from eval.reporting import earlier_results, spreadsheet
from eval.reporting import results as results_module

ROOT = Path(__file__).parents[3]
FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-cat", "@SUM(A1)", "\t=1", "'=1+1", "''=1"]
PROMPTS = [*(text for text in FORMULAS if text[0] != "\t"), "a bee", 'an old, "quoted" oak', "-5"]
ODD = ["", "[]", "null", "1", '"x"', "{}", "{", "[" * 100_000, "NaN", '{"schema": 1}', '{"schema": 1, "rows": {}}',
       '{"schema": 1, "settings": [], "rows": [], "provenance": null, "metrics": 3}']  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of a run whose prompts begin as formulas do."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "own.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load_model", lambda *_: (sd15_pipe(with_unet=SHALLOW), ToyClassifier()))
        out = folder / "out"
        assert run.main([*COMMAND, "--metrics", "psnr", "--prompts", str(folder / "own.jsonl"), "--out", str(out)]) == 0
    return out


@pytest.fixture
def out(made, tmp_path, monkeypatch):
    """A copy of it in the current folder."""
    shutil.copytree(made, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return Path("out")


def refusal(capsys, program, *arguments):
    """The one line that a command ends with."""
    capsys.readouterr()
    assert program.main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


# --- spreadsheets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*FORMULAS, "\r=1", "a fox", "", "'tis", "'", "-0.5", "-1e-3", "-inf", "a\n=1", "–1"])
def test_csv_cells_round_trip(text):
    table = spreadsheet.to_csv(["a", "b"], [{"a": text, "b": -0.5}])
    assert spreadsheet.from_csv(table) == [{"a": text, "b": "-0.5"}]


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        *((text, True) for text in FORMULAS[:5]),
        ("\r=1", True),
        ("-5", False),
        ("-0.5e-3", False),
        ("-inf", False),
        ("a=1", False),
        ("'tis", False),
    ],
)
def test_csv_formulas_are_escaped(text, runs):  # fmt: skip
    assert spreadsheet.safe(text) == ("'" if runs else "") + text
    assert spreadsheet.safe(-5) == -5


def test_written_csv_has_no_formulas(made):
    with (made / "per_image.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    cells = [cell for row in rows for cell in row]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@", "\t", "\r")]
    assert {cell for cell in cells if cell.startswith("-")} == {"-5"}
    _, images = results_module.read(made)
    assert [image["prompt"] for image in images[: len(PROMPTS)]] == PROMPTS


def saved_elsewhere(path: Path) -> None:
    """As Windows' programs save it: a byte order mark and other line ends."""
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def test_files_saved_by_other_programs_are_read(out, capsys):
    assert report_module.main(["out", "--markdown"]) == 0
    before = capsys.readouterr().out
    for name in ("results.json", "per_image.csv", "settings.json"):
        saved_elsewhere(out / name)
    rows = list(csv.reader(io.StringIO((out / "per_image.csv").read_text(encoding="utf-8-sig"), newline="")))
    with (out / "per_image.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)  # as LibreOffice quotes
    assert report_module.main(["out", "--markdown"]) == 0
    assert capsys.readouterr().out == before
    assert output_dir.load_settings(out) is not None


def test_prompts_saved_by_other_programs_are_read(tmp_path):
    for ending, text in (("txt", "a fox\na bee\n"), ("jsonl", '{"prompt": "a fox"}\n{"prompt": "a bee"}\n')):
        file = tmp_path / f"own.{ending}"
        file.write_text(text)
        before = requests_module.load_requests(str(file))
        saved_elsewhere(file)
        assert requests_module.load_requests(str(file)) == before
        file.write_text(text, encoding="utf-16")
        with pytest.raises(
            EvalError, match=rf"cannot read the prompts 'own\.{ending}': it is UTF-16; save it as UTF-8"
        ):
            requests_module.load_requests(str(file))


@pytest.mark.parametrize("name", ["results.json", "per_image.csv"])
def test_other_encodings_are_refused_with_a_message(out, capsys, name):
    text = (out / name).read_text(encoding="utf-8")
    (out / name).write_text(text, encoding="utf-16")
    assert "it is UTF-16; save it as UTF-8" in refusal(capsys, report_module, "out", "--markdown")
    (out / name).write_bytes(text.encode().replace(b"a bee", b"a b\xe9e").replace(b"own", b"\xe9"))
    assert "it is not UTF-8" in refusal(capsys, report_module, "out", "--markdown")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace(",", ";"), "comma"),
        (lambda text: text + "more\n", "has 1 cells and the first row 7; save it with commas"),
        (lambda text: text.replace("a bee", "a wasp"), "are of two runs, or the table was edited"),
        (lambda text: '"', "it is no table of comma-separated values"),
        (lambda text: "", "it is no table of comma-separated values"),
    ],
)
def test_edited_per_image_csv_is_refused(out, capsys, change, said):
    table = out / "per_image.csv"
    table.write_text(change(table.read_text(encoding="utf-8")), encoding="utf-8")
    assert said in refusal(capsys, report_module, "out", "--markdown")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [row[:-1] for row in rows], "has no column 'PSNR'"),
        (lambda rows: [row[1:] for row in rows], "has no column 'method'"),
        (lambda rows: rows[:1], "has no rows"),
        (lambda rows: [*rows[:-1], [*rows[-1][:-1], "much"]], "PSNR is 'much', no number"),
        (lambda rows: rows[:-1], "lacks images of tofu-r50"),
    ],
)
def test_per_image_csv_without_a_hash_is_validated(out, capsys, change, said):
    """Older results do not name it."""
    content = files.read_json(out / "results.json")
    del content["per_image_sha256"]
    files.write_json(out / "results.json", content)
    rows = list(csv.reader(io.StringIO((out / "per_image.csv").read_text(encoding="utf-8"), newline="")))
    with (out / "per_image.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(change(rows))
    assert said in refusal(capsys, report_module, "out", "--markdown")


# --- JSON of another shape --------------------------------------------------------------------------------------------


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value has parts."""
    inside = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [place for key, part in inside for place in [(*at, key), *places(part, (*at, key))]]


def changed(value: Any, place: tuple[Any, ...], to: Any) -> Any:
    """A copy with another value there, or without one where that is None."""
    whole = part = copy.deepcopy(value)
    for key in place[:-1]:
        part = part[key]
    if to is None:
        del part[place[-1]]
    else:
        part[place[-1]] = to
    return whole


@pytest.mark.parametrize("to", [None, {}, "x", -1, 1e300])
def test_results_with_any_value_changed_are_read_or_refused(out, capsys, to):
    found = files.read_json(out / "results.json")
    seen = set()
    for place in places(found):
        (out / "results.json").write_text(json.dumps(changed(found, place, to)))
        capsys.readouterr()
        code = report_module.main(["out", "--markdown"])
        output = capsys.readouterr().err
        assert (code, output.count("\n")) in ((0, 0), (2, 1)), (place, output)
        seen.add(code)
    assert 2 in seen


@pytest.mark.parametrize("content", ODD)
def test_files_with_other_content_print_one_line(out, capsys, content):
    Path("odd.json").write_text(content)
    assert "odd.json" in refusal(capsys, bench_module, "--table", "odd.json")
    (out / "results.json").write_text(content)
    assert "out/results.json" in refusal(capsys, report_module, "out", "--markdown")
    assert "out/results.json" in refusal(capsys, compare_module, "out", "out")
    if content not in ("", "{"):
        Path("odd.jsonl").write_text(content)
        assert "odd.jsonl, line 1: " in refusal(capsys, run, "--prompts", "odd.jsonl")


@pytest.mark.parametrize("to", [None, {}, "x", -1, True])
def test_benchmark_with_any_value_changed_is_read_or_refused(tmp_path, monkeypatch, capsys, to):
    monkeypatch.chdir(tmp_path)
    found = files.read_json(ROOT / "benchmarks" / "results" / "bench-cpu-unet-options.json")
    found["rows"] = [{**row, **({"samples": row["samples"][:3]} if "samples" in row else {})} for row in found["rows"]]
    seen = set()
    for place in places({**found, "rows": found["rows"][:3]}):
        Path("odd.json").write_text(json.dumps(changed({**found, "rows": found["rows"][:3]}, place, to)))
        capsys.readouterr()
        code = bench_module.main(["--table", "odd.json"])
        assert (code, capsys.readouterr().err.count("\n")) in ((0, 0), (2, 1)), place
        seen.add(code)
    assert seen == {0, 2}


@pytest.mark.parametrize(
    ("folder", "name", "shape"),
    [("classify-demo", "classify.json", formats.CLASSIFY), ("condensation", "condensation.json", formats.CONDENSATION)],
)
def test_committed_results_match_their_schemas(tmp_path, folder, name, shape):
    path = ROOT / "benchmarks" / "results" / folder / name
    found = formats.read(path, shape, SCHEMA, "a program", folder)
    for place in [(key,) for key in shape["properties"]] + [("rows", 0, key) for key in ("accuracy", "flops")]:
        (tmp_path / name).write_text(json.dumps(changed(found, place, None)))
        with pytest.raises(EvalError, match=f"^odd is not as a program writes it: .*{place[-1]}"):
            formats.read(tmp_path / name, shape, SCHEMA, "a program", "odd")
    for content in ODD:
        (tmp_path / name).write_text(content)
        with pytest.raises(EvalError, match=r"^odd [^\n]*$"):
            formats.read(tmp_path / name, shape, SCHEMA, "a program", "odd")


@pytest.mark.parametrize("content", [*ODD[1:5], *ODD[6:9]])
def test_settings_with_another_shape_are_refused(out, capsys, content):
    (out / "settings.json").write_text(content)
    with pytest.raises(EvalError, match=r"--out out: its settings\.json cannot be read"):
        output_dir.load_settings(out)


@pytest.mark.parametrize(("name", "value"), [("size", "64"), ("size", True), ("guidance", "x"), ("model", 3)])
def test_settings_with_a_wrong_type_are_named(out, name, value):
    files.write_json(out / "settings.json", {**files.read_json(out / "settings.json"), name: value})
    with pytest.raises(EvalError, match=f"--out out: {name} in its settings.json is {value!r}; it must be"):
        output_dir.load_settings(out)


# --- records of images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        *({"seconds": value} for value in (0, 0.0, -1.0, "1", None, True, [1], 10**400)),
        *({"batch": value} for value in (0, True, "2", 1.5, None)),
        *({"run": value} for value in ("../../x", "", None, 3)),
        *({"timed": value} for value in (1, None, "yes")),
        *({"denoiser_seconds": value} for value in (0, "x", -1)),
        {"denoiser_seconds": None, "baseline_denoiser_seconds": 1.0},
        {"baseline_denoiser_seconds": "x"}, {"peak_bytes": -1}, {"peak_bytes": 1.5}, {"finite": 1},
        {"batch_ids": "0000"},
    ],
)  # fmt: skip
def test_record_with_an_invalid_value_is_corrupt(out, change):
    (request, *_), method = requests_module.load_requests("demo"), methods.parse("tofu", [0.5])[0]
    path = out / method.slug / f"{request.id}.json"
    record = files.read_json(path)
    assert not records.is_corrupt(out, method, request)
    path.write_text(json.dumps({**record, **change}))
    assert records.is_corrupt(out, method, request)


@pytest.mark.parametrize("content", [*ODD[:8], '{"seconds": NaN}'])
def test_record_with_other_content_is_corrupt(out, content):
    (request, *_), method = requests_module.load_requests("demo"), methods.parse("tofu", [0.5])[0]
    (out / method.slug / f"{request.id}.json").write_text(content)
    assert records.is_corrupt(out, method, request)


def test_corrupt_records_are_generated_again_with_equal_figures(out, made, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "load_model", lambda *_: (sd15_pipe(with_unet=SHALLOW), ToyClassifier()))
    command = [*COMMAND, "--metrics", "psnr", "--prompts", str(made.parent / "own.jsonl"), "--out", "out"]
    for name, change in (("0000", {"seconds": 0.0}), ("0001", {"seconds": math.nan}), ("0002", {"batch": "2"})):
        path = out / "tofu-r50" / f"{name}.json"
        path.write_text(json.dumps({**files.read_json(path), **change}))
    content = files.read_json(out / "results.json")["rows"][1]["metrics"]
    assert run.main([*command, "--metrics-only"]) == 2
    assert "0000.png, 0001.png, 0002.png are corrupt, or their records" in capsys.readouterr().err
    assert run.main(command) == 0
    assert "corrupt, generated again: tofu-r50/0000.png, tofu-r50/0001.png" in capsys.readouterr().err
    assert files.read_json(out / "results.json")["rows"][1]["metrics"] == content


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"runtime": [], "packages": {"x": 1}, "commit": 5, "environment": {}}']
)
def test_invalid_run_metadata_is_left_out(out, made, monkeypatch, content):
    monkeypatch.setattr(prepare, "load_model", lambda *_: (sd15_pipe(with_unet=SHALLOW), ToyClassifier()))
    for path in (out / "runs").iterdir():
        path.write_text(content)
    command = [*COMMAND, "--metrics", "psnr", "--prompts", str(made.parent / "own.jsonl"), "--out", "out"]
    assert run.main([*command, "--metrics-only"]) == 0
    (generated,) = files.read_json(out / "results.json")["provenance"]["generated"]
    assert generated.keys() == {"run", "images"}


def test_invalid_flops_are_counted_again(out):
    from eval.images import flops

    settings, method = output_dir.load_settings(out), methods.parse("tofu", [0.5])[0]
    assert settings is not None
    for observed, counted in ((7, 7), ("x", None), (True, None), (None, None)):
        files.write_json(out / "flops" / "tofu-r50.json", {**flops._version(settings, method), "flops": observed})
        assert flops.load_count(out, settings, method) == counted
    files.write_json(out / "maps" / "tofu-r50.json", [])
    assert not merge_maps.saved(out, settings, method)


def test_invalid_earlier_results_are_ignored(tmp_path):
    assert earlier_results.read(tmp_path) is None
    for content in ODD:
        (tmp_path / "results.json").write_text(content)
        found = earlier_results.read(tmp_path)
        assert found is None or (found.rows, found.metrics, found.ids) == ([], [], set())


def test_csv_digest_depends_on_content_only():
    table = spreadsheet.to_csv(["a"], [{"a": "x, y"}, {"a": "z"}])
    assert spreadsheet.digest(table) == hashlib.sha256(table.encode()).hexdigest()
    assert spreadsheet.digest('"a"\n"x, y"\n"z"\n') == spreadsheet.digest(table)
    assert spreadsheet.digest(table.replace("z", "w")) != spreadsheet.digest(table)


def test_different_earlier_results_are_kept_under_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run into one file, as of eval.bench, takes nothing away."""
    path = tmp_path / "bench.json"
    for value in (1, 2, 2, 3):
        write_results(path, {"value": value})
    held = {file.name: json.loads(file.read_text())["value"] for file in tmp_path.iterdir()}
    assert held == {"bench.json": 3, "bench.1.json": 1, "bench.2.json": 2}
    assert capsys.readouterr().err.splitlines() == [
        "bench.json held earlier results, which are kept in bench.1.json",
        "bench.json held earlier results, which are kept in bench.2.json",
    ]


# --- writing ----------------------------------------------------------------------------------------------------------


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


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    files.write(tmp_path / "a.json", "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
