"""eval.report refuses missing and damaged results in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import compare as compare_module
from eval import report as report_module
from eval import run as run_module
from eval.common import files
from eval.reporting import results as results_module


def test_a_folder_without_results_has_no_report(tmp_path, capsys):
    assert report_module.main([str(tmp_path)]) == 2
    assert "no results.json" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_named_as_typed(command, capsys):
    for program, arguments, said in (
        (report_module, ["runs/nosuch"], "runs/nosuch does not exist"),
        (report_module, ["runs/nosuch", "--markdown"], "runs/nosuch does not exist"),
        (compare_module, ["runs/nosuch", "runs/other"], "runs/nosuch does not exist"),
        (run_module, [*command, "--reference", "runs/nosuch"], "--reference runs/nosuch does not exist"),
        (run_module, [*command, "--metrics-only", "--out", "runs/nosuch"], "--out runs/nosuch does not exist"),
    ):
        assert program.main(arguments) == 2
        assert capsys.readouterr().err == f"error: {said}\n"


def test_results_of_a_run_killed_while_writing_are_refused(command, monkeypatch, capsys):
    assert run_module.main([*command, "--method", "tofu", "--metrics", "psnr", "--out", "out"]) == 0
    write = results_module.write

    def killed(path, content):
        if path.name == "results.json":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(results_module, "write", killed)
    assert run_module.main([*command, "--method", "tofu,prune", "--metrics", "psnr", "--out", "out"]) == 130
    monkeypatch.setattr(results_module, "write", write)
    capsys.readouterr()
    assert report_module.main(["out", "--markdown"]) == 2
    assert "results.json and per_image.csv are of two runs" in capsys.readouterr().err
    assert run_module.main([*command, "--method", "tofu,prune", "--metrics", "psnr", "--out", "out"]) == 0
    assert report_module.main(["out", "--markdown"]) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "its schema is None, this program reads 2: the same command"),
        ('{"schema": 9}', "its schema is 9, this program reads 2: the same command"),
        ('{"schema": 2}', "results.json is not as eval.run writes it: 'settings' is a required property"),
    ],
)
def test_invalid_results_print_one_line(tmp_path, capsys, content, said):
    (tmp_path / "results.json").write_text(content)
    assert report_module.main([str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_results_that_are_not_json_are_not_reported_as_missing(command, capsys):
    Path("out").mkdir()
    Path("out/results.json").write_text("{")
    assert report_module.main(["out"]) == 2
    assert "out/results.json holds no results of eval.run: " in (message := capsys.readouterr().err)
    assert "the same command of eval.run writes it again" in message


def test_results_without_a_figure_print_one_line(command, capsys):
    assert run_module.main([*command, "--metrics", "psnr", "--out", "out"]) == 0
    found = files.read_json(Path("out/results.json"))
    del found["rows"][1]["speedup"]
    files.write_json(Path("out/results.json"), found)
    for program in (lambda: report_module.main(["out", "--markdown"]), lambda: compare_module.main(["out", "out"])):
        capsys.readouterr()
        assert program() == 2
        assert capsys.readouterr().err.startswith(
            "error: out/results.json is not as eval.run writes it: in ['rows'][1] "
        )


def test_corrupt_image_of_a_report_is_named(command, capsys):
    assert run_module.main([*command, "--metrics", "psnr", "--out", "out"]) == 0
    Path("out/baseline/0000.png").write_bytes(b"no image")
    capsys.readouterr()
    assert report_module.main(["out"]) == 2
    assert "the image baseline/0000.png is damaged: the same command of eval.run" in capsys.readouterr().err
