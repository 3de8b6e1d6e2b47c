"""The folder of a run belongs to one setting, and its images and records are whole or generated again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from eval_run import PROMPTS, rows

from eval import EvalError
from eval import run as run_module
from eval.common import files
from eval.images import generate, output_dir, records
from eval.images.requests import Request
from eval.methods import registry as methods
from eval.methods.method import BASELINE

SETTINGS = generate.Settings("tiny", "p", "own.txt", "h", 0, 64, 2, None, 2, "cpu", "float32", "a", "t", "d", "tf")
REQUESTS = [Request(f"{i:04d}", prompt, 10 + i) for i, prompt in enumerate(["a red fox", "a bee", "an old oak"])]
(TOFU,) = methods.parse("tofu", [0.5])


def run(pipe, out, chosen=(BASELINE, TOFU), settings=SETTINGS, requests=REQUESTS):
    return generate.generate(pipe, requests, list(chosen), settings, out)


def test_output_dir_refusal_names_the_differing_setting(tmp_path):
    output_dir.init_output_dir(tmp_path, SETTINGS)
    before = (tmp_path / "settings.json").read_bytes()
    output_dir.init_output_dir(tmp_path, SETTINGS)
    with pytest.raises(EvalError, match="steps 2, this run has 50"):
        output_dir.init_output_dir(tmp_path, replace(SETTINGS, steps=50))
    with pytest.raises(EvalError, match="dtype 'float32', this run has 'float16'"):  # not the hash that follows from it
        output_dir.init_output_dir(tmp_path, replace(SETTINGS, dtype="float16", pipeline="q"))
    with pytest.raises(EvalError, match="seed 0, this run has 5"):
        output_dir.init_output_dir(tmp_path, replace(SETTINGS, seed=5, prompts_hash="i"))
    with pytest.raises(EvalError, match="pipeline 'p', this run has 'q'"):
        output_dir.init_output_dir(tmp_path, replace(SETTINGS, pipeline="q"))
    assert (tmp_path / "settings.json").read_bytes() == before


def test_corrupt_run_metadata_is_ignored(tmp_path):
    for content in ("[1]", "{", '{"commit": "abc", "started": "1999"}'):
        files.write(tmp_path / generate.RUNS / f"{len(content)}.json", content)
    observed = records.generating_runs(tmp_path, [{"run": str(n)} for n in (3, 1, 36, 36)])
    assert [(run["run"], run["images"], run.get("commit")) for run in observed] == [
        ("3", 1, None), ("1", 1, None), ("36", 2, "abc"),
    ]  # fmt: skip


def test_output_dir_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(EvalError, match="not empty"):
        output_dir.init_output_dir(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_output_dir_with_other_settings_is_refused(command, capsys):
    assert run_module.main([*command, "--out", "out", "--limit", "1"]) == 0
    before = sorted(Path("out").rglob("*"))
    capsys.readouterr()
    assert run_module.main([*command, "--out", "out", "--limit", "1", "--guidance", "3"]) == 2
    assert "guidance None, this run has 3.0" in capsys.readouterr().err
    assert sorted(Path("out").rglob("*")) == before


def test_output_dir_below_a_file_is_refused(command, capsys):
    Path("file").write_text("")
    assert run_module.main([*command, "--out", "file/out"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_limited_run_has_its_own_default_folder(command):
    assert run_module.main(command) == 0
    assert run_module.main([*command, "--limit", "1"]) == 0
    long, short = sorted(Path("runs").iterdir(), key=lambda folder: "first" in folder.name)
    assert files.read_json(long / "results.json")["settings"]["n"] == len(PROMPTS)
    assert files.read_json(short / "results.json")["settings"]["n"] == 1


def test_corrupt_images_are_named_and_generated_again(command, capsys):
    assert run_module.main([*command, "--method", "tofu", "--out", "out"]) == 0
    (Path("out") / "tofu-r50" / "0003.png").write_bytes(b"")
    capsys.readouterr()
    assert run_module.main([*command, "--method", "tofu", "--out", "out"]) == 0
    assert "corrupt, generated again: tofu-r50/0003.png" in capsys.readouterr().err


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


def test_prompts_and_ids_may_have_any_characters(command, tmp_path):
    """Also those of files that stand in the folder for other things."""
    ids = ["flops", "settings", "results", "maps"]
    (tmp_path / "ids.jsonl").write_text("\n".join(json.dumps({"prompt": "a bee", "id": id}) for id in ids))
    arguments = [
        *command,
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


def test_settings_that_cannot_be_read_are_not_overwritten(command, capsys):
    assert run_module.main([*command, "--generate-only", "--out", "out"]) == 0
    Path("out/settings.json").write_text("{")
    for stage in ([], ["--metrics-only"]):
        assert run_module.main([*command, *stage, "--out", "out"]) == 2
        assert "its settings.json cannot be read" in capsys.readouterr().err
    assert Path("out/settings.json").read_text() == "{"
