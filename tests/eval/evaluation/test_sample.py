"""The first table: a small sample by default, method by method, and a partial table after Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import SHALLOW, sd15_pipe

from eval import run as run_module
from eval.common import files
from eval.evaluation import execute, options, plan, prepare
from eval.images import generate, settings
from tofu_sd.demo.models import SCENES

PROMPTS = ["a red fox", "a bee", "an old oak", "a kite", "a pond"]
TINY = ["--model", "tiny", "--steps", "1", "--size", "64", "--batch", "2", "--metrics", "psnr", "--out", "out"]
needs_weights = pytest.mark.skipif(not SCENES.is_available, reason="the embedded model has no weights here")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A command on a tiny pipeline, in an empty folder."""
    pipe = sd15_pipe(with_unet=SHALLOW)
    monkeypatch.setattr(prepare, "load_model", lambda *_: (pipe, None))
    (tmp_path / "own.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return [*TINY, "--prompts", str(tmp_path / "own.txt")]


def planned(*arguments: str) -> plan.RunPlan:
    return plan.plan(options.parse(arguments))


# --- how many images --------------------------------------------------------------------------------------------------


def test_the_embedded_model_has_a_small_sample_by_default() -> None:
    sample = planned("--method", "tofu")
    assert (len(sample.requests), sample.limit, sample.num_listed) == (8, 8, 96)
    assert sample.sample_hint is not None
    assert "8 of 96 images" in sample.sample_hint
    assert "--limit all" in sample.sample_hint
    assert len({request.prompt for request in sample.requests}) == 8  # classes enough for intervals


@pytest.mark.parametrize(
    ("arguments", "n", "limit"),
    [
        (["--limit", "all"], 96, None),
        (["--limit", "3"], 3, 3),
        (["--limit", "20"], 20, 20),
        (["--only", "0-9"], 10, None),
        (["--per-prompt", "2"], 16, 8),
    ],
)
def test_a_number_of_images_can_be_given(arguments: list[str], n: int, limit: int | None) -> None:
    found = planned(*arguments)
    assert (len(found.requests), found.limit) == (n, limit)
    assert (found.sample_hint is None) == (arguments[0] != "--per-prompt")


@pytest.mark.parametrize("wrong", ["0", "-1", "some", "1.5"])
def test_a_limit_that_is_no_number_is_one_line(
    command: list[str], capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    assert run_module.main([*command, "--limit", wrong]) == 2
    assert capsys.readouterr().err.startswith("error: argument --limit: ")


def test_other_models_and_lists_have_all_images_by_default(command: list[str]) -> None:
    found = planned(*command)
    assert len(found.requests) == len(PROMPTS)
    assert found.sample_hint is None


def test_a_folder_with_more_images_is_continued_with_these(tmp_path: Path) -> None:
    whole = planned("--limit", "all").requests
    for request in whole[:20]:
        files.write(tmp_path / "baseline" / f"{request.id}.png", b"")
    assert planned("--out", str(tmp_path)).requests == whole[:20]
    for request in whole[5:20]:
        (tmp_path / "baseline" / f"{request.id}.png").unlink()
    assert planned("--out", str(tmp_path)).requests == whole[:8]  # a sample that was interrupted
    assert planned("--out", str(tmp_path), "--metrics-only").requests == whole[:5]


@needs_weights
def test_the_sample_says_how_to_get_all_and_its_figures_have_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fast = ["--steps", "1", "--timed", "0", "--metrics", "psnr,ssim,ms-ssim,demo-classifier", "--method", "prune"]
    assert run_module.main(fast) == 0
    printed = capsys.readouterr()
    assert "8 images of 96" in printed.out
    assert printed.err.strip().splitlines()[-1].endswith("the same command with --limit all")
    (out,) = Path("runs").iterdir()
    rows = {row["key"]: row for row in files.read_json(out / "results.json")["rows"]}
    for name, figure in rows["prune-r50"]["metrics"].items():
        assert figure["low"] <= figure["value"] <= figure["high"], name
    assert run_module.main([*fast, "--dry-run"]) == 0
    assert "--limit all" in capsys.readouterr().err


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes Ctrl-C arrive when the last image of a method is saved."""
    save = generate._save

    def arm(slug: str) -> None:
        def stopping(out, settings, method, request, *rest):  # type: ignore[no-untyped-def]
            if method.slug == slug and request.id == f"{len(PROMPTS) - 1:04d}":
                monkeypatch.setattr(generate, "_save", save)
                raise KeyboardInterrupt
            save(out, settings, method, request, *rest)

        monkeypatch.setattr(generate, "_save", stopping)

    return arm


def test_after_ctrl_c_the_complete_methods_are_a_table_and_the_same_command_resumes(
    command: list[str], interrupt: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*command, "--method", "tofu,prune"]
    interrupt("prune-r50")
    assert run_module.main(command) == 130
    printed = capsys.readouterr()
    assert "tofu 50%" in printed.out
    assert "prune 50%" not in printed.out
    assert "interrupted; measuring what is complete: tofu-r50" in printed.err
    assert printed.err.endswith("\nstopped; the same command resumes\n")
    partial = files.read_json(Path("out/results.json"))
    assert [row["key"] for row in partial["rows"]] == ["baseline", "tofu-r50"]
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*.png")}
    assert run_module.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [row["key"] for row in files.read_json(Path("out/results.json"))["rows"]] == [
        "baseline", "tofu-r50", "prune-r50",
    ]  # fmt: skip


@pytest.mark.parametrize("slug", ["baseline", "tofu-r50"])
def test_after_ctrl_c_without_a_complete_method_nothing_is_measured(
    command: list[str],
    interrupt: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    slug: str,
) -> None:
    monkeypatch.setattr(execute, "measure", lambda *_: pytest.fail("there is nothing to compare"))
    interrupt(slug)
    assert run_module.main([*command, "--method", "tofu,prune"]) == 130
    assert capsys.readouterr().err.endswith("\nstopped; the same command resumes\n")
    assert not Path("out/results.json").exists()


def test_a_second_ctrl_c_skips_the_partial_table(
    command: list[str],
    interrupt: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "score", stop)
    interrupt("prune-r50")
    assert run_module.main([*command, "--method", "tofu,prune"]) == 130
    assert capsys.readouterr().out == ""
    assert not Path("out/results.json").exists()


def test_ctrl_c_in_a_stage_that_measures_nothing_only_stops(
    command: list[str], interrupt: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt("prune-r50")
    assert run_module.main([*command, "--method", "tofu,prune", "--generate-only"]) == 130
    assert "measuring" not in capsys.readouterr().err


# --- folders of schema 1 ----------------------------------------------------------------------------------------------


def test_images_of_a_folder_of_schema_1_are_not_generated_again(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_module.main([*command, "--method", "tofu"]) == 0
    old_names = {"config_hash": "made", "denoiser_seconds": "denoising", "batch_ids": "drawn_with",
                 "baseline_denoiser_seconds": "full_denoising"}  # fmt: skip
    Path("out/baseline").rename("out/full")
    for path in Path("out").glob("*/*.json"):
        record = files.read_json(path)
        files.write_json(path, {old_names.get(key, key): value for key, value in record.items()})
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*.png")}
    assert run_module.main([*command, "--method", "full,tofu"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*.png")} == before
    assert settings.image_dir(Path("out"), "baseline") == Path("out/full")
