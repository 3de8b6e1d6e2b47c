"""A second run into a folder adds to its results; nothing is replaced or dropped without a word."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from eval_run import COMMAND, PROMPTS, ToyClassifier

from eval import run
from eval.common import files
from eval.evaluation import execute, prepare
from eval.images import output_dir
from eval.images.requests import Request
from eval.methods import registry
from eval.methods.method import OTHER_SEEDS
from eval.methods.registry import METHODS, parse
from eval.metrics import base
from eval.metrics import registry as metrics


@pytest.fixture(scope="module")
def made(tmp_path_factory, pipe):
    """The folder of a finished run of tofu, to be copied."""
    folder = tmp_path_factory.mktemp("config_hash")
    (folder / "own.txt").write_text("\n".join(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load_model", lambda *_: (pipe, ToyClassifier()))
        options = ["--prompts", str(folder / "own.txt"), "--metrics", "psnr", "--method", "tofu"]
        assert run.main([*COMMAND, *options, "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture
def finished(command, made):
    """The command of a run into a copy of that folder."""
    shutil.copytree(made, "out")
    return command


@pytest.fixture
def command(command):
    """A run of five prompts into the folder out."""
    return [*command, "--metrics", "psnr", "--out", "out"]


def results():
    return files.read_json(Path("out/results.json"))


def rows():
    return {row["key"]: row for row in results()["rows"]}


def written():
    """What a run leaves, by name."""
    return {name: Path("out", name).read_bytes() for name in ("results.json", "per_image.csv", "report.html")}


def refusal(capsys, *arguments):
    """The one line of a run that is refused; nothing in the folder has changed."""
    before, images = written(), sorted(Path("out").rglob("*.png"))
    capsys.readouterr()
    assert run.main(list(arguments)) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: --out out: ")
    assert output.count("\n") == 1
    assert (written(), sorted(Path("out").rglob("*.png"))) == (before, images)
    return output


def test_another_method_adds_a_row(command):
    assert run.main([*command, "--method", "tofu", "--seed-baseline"]) == 0
    before = rows()
    assert run.main([*command, "--method", "prune", "--ratio", "0.25"]) == 0
    after = rows()
    assert list(after) == ["baseline", "tofu-r50", "prune-r25", OTHER_SEEDS.slug]
    for key, row in before.items():
        assert after[key]["metrics"] == row["metrics"]
        assert after[key]["seconds"] == row["seconds"]
    page, table = Path("out/report.html").read_text(), Path("out/per_image.csv").read_text()
    for name in ("tofu 50%", "prune 25%"):
        assert name in page
    assert table.count("tofu-r50") == table.count("prune-r25") == 5


def test_baseline_compared_with_itself_is_kept(command):
    assert run.main([*command, "--method", "full,tofu"]) == 0
    assert run.main([*command, "--method", "prune"]) == 0
    assert rows()["baseline"]["metrics"]["PSNR"]["infinite"] == 5
    assert list(rows()) == ["baseline", "tofu-r50", "prune-r50"]


def test_metrics_only_keeps_the_rows(finished):
    assert run.main([*finished, "--method", "prune", "--generate-only"]) == 0
    assert list(rows()) == ["baseline", "tofu-r50"]  # the stage that measures nothing changes no figures
    assert run.main([*finished, "--method", "prune", "--metrics-only"]) == 0
    assert list(rows()) == ["baseline", "tofu-r50", "prune-r50"]


def test_methods_of_earlier_rows_are_parsed_again(command):
    names = "kv:tome+p,tofu@window=8,todo"
    if METHODS["deepcache"].unavailable_reason is None:
        names += ",deepcache,deepcache:tofu"
    assert run.main([*command, "--method", names, "--limit", "1"]) == 0
    before = list(rows())
    assert run.main([*command, "--method", "prune", "--limit", "1"]) == 0
    assert list(rows()) == [*before, "prune-r50"]


MATCHER = """
from tofu_sd.core.matching import bipartite_soft_matching, register_matcher

@register_matcher("NAME")
def match(tokens, grid, config):
    return bipartite_soft_matching(tokens, grid.parts, len(grid.num_merged))
"""


def test_method_of_a_file_says_how_its_row_is_kept(command, capsys, registries):
    """Rows do not name the file of their method."""
    for name in ("every_third", "every_fifth"):
        Path(f"{name}.py").write_text(MATCHER.replace("NAME", name))
    first, second = "every_third.py:every_third", "every_fifth.py:every_fifth"
    assert run.main([*command, "--method", first]) == 0
    message = refusal(capsys, *command, "--method", second)
    assert "its results have tofu-r50-every_third, and every_third is no method of this package" in message
    assert message.endswith("add FILE.py:every_third to --method, or give another --out\n")
    assert run.main([*command, "--method", f"{second},{first}"]) == 0
    assert list(rows()) == ["baseline", "tofu-r50-every_third", "tofu-r50-every_fifth"]


@pytest.mark.parametrize("fewer", [["--limit", "2"], ["--only", "0001,0003"]])
@pytest.mark.parametrize("method", ["tofu", "prune"])
@pytest.mark.parametrize("stage", [[], ["--metrics-only"], ["--dry-run"]])
def test_results_of_more_images_are_not_replaced(finished, capsys, fewer, method, stage):
    output = refusal(capsys, *finished, "--method", method, *fewer, *stage)
    assert "its results are of 5 images, and this run has 2, without 000" in output
    assert "give another --out" in output
    assert "--limit" in output


def test_more_images_are_added_for_all_methods_or_for_none(command, capsys):
    assert run.main([*command, "--method", "tofu", "--limit", "2"]) == 0
    output = refusal(capsys, *command, "--method", "prune")
    assert "its results have tofu-r50, of which 2 of 5 images exist" in output
    assert "add 'tofu' to --method to generate them, or give another --out" in output
    assert run.main([*command, "--method", "prune,tofu"]) == 0
    assert {key: row["n"] for key, row in rows().items()} == {"baseline": 5, "tofu-r50": 5, "prune-r50": 5}


def test_corrupt_image_of_an_earlier_method_is_named(command, capsys):
    assert run.main([*command, "--method", "tofu", "--seed-baseline"]) == 0
    Path("out/tofu-r50/0001.png").write_bytes(b"x")
    assert "tofu-r50, of which 4 of 5 images exist" in refusal(capsys, *command, "--method", "prune")
    assert run.main([*command, "--method", "tofu,prune"]) == 0
    Path(f"out/{OTHER_SEEDS.slug}/0001.png").unlink()
    assert "add --seed-baseline to generate them" in refusal(capsys, *command, "--method", "prune")


def test_earlier_method_that_is_unavailable_is_not_dropped(command, capsys, monkeypatch):
    assert run.main([*command, "--method", "tofu,tomesd"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(registry, "version", lambda name: None)
        output = refusal(capsys, *command, "--method", "prune")
        assert "tomesd-r50, which needs: pip install tomesd; install it or give another --out" in output
    found = results()
    found["rows"][1] |= {"method": "tofuu"}
    files.write_json(Path("out/results.json"), found)
    output = refusal(capsys, *command, "--method", "prune")
    assert "tofu-r50, and tofuu is no method of this package" in output
    found["rows"][1] |= {"method": "tofu@levles=2"}
    files.write_json(Path("out/results.json"), found)
    assert "tofu-r50, which this version does not know" in refusal(capsys, *command, "--method", "prune")


def test_metrics_are_added_and_lost_ones_reported(command, capsys, monkeypatch):
    pytest.importorskip("pytorch_msssim")
    assert run.main([*command, "--method", "tofu", "--metrics", "psnr,ssim,demo-classifier"]) == 0
    before = rows()["tofu-r50"]["metrics"]
    assert run.main([*command, "--method", "prune"]) == 0
    assert rows()["tofu-r50"]["metrics"] == before
    assert rows()["prune-r50"]["metrics"].keys() == before.keys()
    assert "was in the results" not in capsys.readouterr().err
    monkeypatch.setattr(metrics, "ssim", lambda size: base.Skipped("SSIM", "pip install pytorch-msssim"))
    assert run.main([*command, "--method", "prune"]) == 0
    assert "SSIM was in the results and is left out: pip install pytorch-msssim\n" in capsys.readouterr().err


def test_damaged_results_are_written_again(finished):
    Path("out/results.json").write_text("{")
    assert run.main([*finished, "--method", "tofu"]) == 0
    assert list(rows()) == ["baseline", "tofu-r50"]


# --- what is in the way of a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "said"),
    [
        ("baseline/0000.png", True, "baseline/0000.png is a folder; remove it, a file belongs there"),
        ("tofu-r50/0001.json", True, "tofu-r50/0001.json is a folder; remove it, a file belongs there"),
        ("report.html", True, "report.html: there is a folder of that name, and a file is written"),
        ("tofu-r50", False, "tofu-r50: there is a file of that name, and a folder is needed"),
        ("measured", False, "measured: there is a file of that name, and a folder is needed"),
    ],
)
@pytest.mark.parametrize("stage", [[], ["--dry-run"]])
def test_obstacles_are_reported_before_generating(finished, monkeypatch, capsys, name, folder, said, stage):
    path = Path("out", name)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir() if folder else path.write_text("")
    Path("out/results.json").unlink()  # as of a run that has not come to its figures
    monkeypatch.setattr(execute, "generate", lambda *_: pytest.fail("it went on"))
    assert run.main([*finished, "--method", "tofu", *stage]) == 2
    output = capsys.readouterr().err
    assert said in output
    assert output.count("\n") == 1
    assert "the same command resumes" not in output


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("link", "--out link: link is a link to 'nowhere/y', which does not exist"),
        ("file", "--out file: there is a file of that name, and a folder is needed"),
        ("file/out", "--out out: 'file' is a file, and no folder can be inside"),
        ("", "argument --out: '' is not a path; give the name of a file or folder"),
        (".", "--out here: the folder is not empty and holds no settings.json; give another"),
    ],
)
def test_invalid_out_is_refused_with_a_message(command, monkeypatch, capsys, out, said):
    Path("link").symlink_to("nowhere/y")
    Path("file").write_text("")
    if out != ".":  # that folder can be looked into after the model alone
        monkeypatch.setattr(prepare, "load_model", lambda *_: pytest.fail("it went on"))
    assert run.main([*command, "--out", out]) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"error: {said}")
    assert output.count("\n") == 1
    assert "the same command resumes" not in output
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["file", "link"]


def test_current_folder_can_be_out(command):
    assert run.main([*command, "--method", "tofu", "--limit", "1", "--out", "."]) == 0
    assert Path("results.json").exists()


@pytest.mark.parametrize(("number", "resumes"), [(28, True), (30, False), (13, False)])
def test_unwritable_disk_prints_one_line(command, monkeypatch, capsys, number, resumes):
    replace = os.replace

    def refuse(source, target):
        if Path(target).suffix == ".png":
            raise OSError(number, os.strerror(number), str(source))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    assert run.main([*command, "--method", "tofu"]) == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert output.startswith(f"error: [Errno {number}] ")
    assert "out/baseline/0000.png" in output
    assert ("the same command resumes" in output) == resumes
    assert not list(Path("out").rglob(".*"))


def test_checking_thousands_of_files_is_fast(tmp_path, monkeypatch):
    """A look costs one call of the system for each file, not one for each folder above."""
    calls = []
    exists = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: (calls.append(path), exists(path))[1])
    requests = [Request(f"{i:04}", "a fox", i) for i in range(500)]
    output_dir.check_no_obstacles(tmp_path, parse("tofu", [0.5]), requests)
    assert len(calls) < 100


def test_the_plan_of_a_dry_run_is_json(finished, capsys):
    capsys.readouterr()
    assert run.main([*finished, "--method", "prune", "--dry-run", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["methods"]
    assert [(method["key"], method["existing"]) for method in content] == [("baseline", 5), ("prune-r50", 0)]
