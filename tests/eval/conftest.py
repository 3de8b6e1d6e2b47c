"""The tiny pipelines of the evaluation's tests, and a command that evaluates one in an empty folder."""

import pytest
from eval_run import COMMAND, PROMPTS, ToyClassifier
from tiny import SHALLOW, sd15_pipe

from eval.evaluation import prepare


@pytest.fixture(scope="module")
def pipe():
    return sd15_pipe(with_unet=SHALLOW)


@pytest.fixture(scope="module")
def deep():
    """A pipeline with as many blocks as Stable Diffusion 1.5."""
    return sd15_pipe()


@pytest.fixture
def command(monkeypatch, tmp_path, pipe):
    """Arguments of eval.run. Any --model is the tiny pipeline; the current folder is empty, the prompts lie outside."""
    monkeypatch.setattr(prepare, "load_model", lambda *_: (pipe, ToyClassifier()))
    (tmp_path / "own.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return [*COMMAND, "--prompts", str(tmp_path / "own.txt")]
