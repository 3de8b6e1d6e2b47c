"""Models are loaded from a folder or the hub, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval import EvalError
from eval import run as run_module
from eval.common import files
from eval.evaluation import prepare


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
            "no-owner/no-model",
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


def test_a_folder_called_demo_is_not_the_embedded_model(command, monkeypatch):
    """Measured later, its images would be measured by the embedded model's classifier."""
    (Path("models") / "demo").mkdir(parents=True)
    monkeypatch.chdir("models")
    for model in ("demo/", "../models/demo", str(Path("demo").absolute())):
        assert prepare.model_name(model) == "demo, a folder"
    assert prepare.model_name("demo") == "demo"
    assert prepare.model_name("..") == Path.cwd().parent.name
