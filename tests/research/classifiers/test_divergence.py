"""A training that diverges stops at once with a one-line error, and no run resumes from its checkpoint."""

from __future__ import annotations

import errno
import itertools
import math
from pathlib import Path

import pytest
import torch

from eval import EvalError
from research.classifiers import divergence
from research.demo_training.fit import Schedule, fit

STATE = {"optimiser": {}, "step": 7, "spent": 1.0, "curve": []}


def weights(*values):
    return {"w": torch.tensor(values)}


def save_checkpoint(folder, value=1.0, **change):
    path = folder / "fine.ckpt"
    torch.save({**STATE, "model": weights(value), "averaged": weights(1.0), **change}, path)
    return path


@pytest.mark.parametrize(("values", "finite"), [((1.0, 2.0), True), ((1.0, math.nan), False), ((math.inf,), False)])
def test_is_finite_checks_every_value(values, finite):
    assert divergence.is_finite([torch.ones(3), torch.tensor(values), torch.arange(3)]) == finite


def test_resumed_at_returns_the_checkpoint_step(tmp_path):
    assert divergence.resumed_at(tmp_path / "fine.ckpt") == 0
    assert divergence.resumed_at(save_checkpoint(tmp_path)) == 7


@pytest.mark.parametrize("change", [{"model": weights(math.nan)}, {"averaged": weights(math.inf)}])
def test_checkpoint_that_is_not_finite_raises_and_is_removed(tmp_path, change):
    path = save_checkpoint(tmp_path, **change)
    with pytest.raises(EvalError, match=r"fine\.ckpt holds weights that are not finite; delete it"):
        divergence.resumed_at(path)
    assert "give a lower --rate than 0.5" in str(divergence.stopped(path, "the loss is nan", 0.5))
    assert not path.exists()


def test_finite_checkpoint_is_kept(tmp_path):
    path = save_checkpoint(tmp_path)
    assert str(divergence.stopped(path, "the loss is nan at step 8 of fine", 0.5)).count("\n") == 0
    assert path.exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 50])
def test_corrupt_checkpoint_raises_a_one_line_error(tmp_path, content):
    (tmp_path / "fine.ckpt").write_bytes(content)
    with pytest.raises(EvalError, match=r"^[^\n]*fine\.ckpt is damaged; delete it to train from the start$"):
        divergence.resumed_at(tmp_path / "fine.ckpt")


def test_checkpoint_of_another_format_raises(tmp_path):
    for content in ([1, 2], {"model": {}}):
        torch.save(content, tmp_path / "fine.ckpt")
        with pytest.raises(EvalError, match="is damaged"):
            divergence.resumed_at(tmp_path / "fine.ckpt")


def test_full_disk_while_saving_raises_enospc(tmp_path, monkeypatch):
    def full(state, path):
        Path(path).write_bytes(b"a part")
        raise RuntimeError("[enforce fail at inline_container.cc:861] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", full)
    model = torch.nn.Linear(1, 1)
    with (
        pytest.raises(OSError, match="the checkpoint cannot be written") as raised,
        divergence.explain_save_errors(tmp_path / "a.ckpt"),
    ):
        fit(
            "a",
            model,
            lambda g: model(torch.ones(1, 1)).sum(),
            Schedule(samples=1, batch=1, rate=0.1, seed=0),
            tmp_path,
        )
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_other_training_errors_are_raised_unchanged(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), divergence.explain_save_errors(tmp_path / "a.ckpt"):
        raise RuntimeError("a bug")


# --- the command ------------------------------------------------------------------------------------------------------

SIZES = ["--kind", "adaptivision", "--stem", "patches", "--side", "32", "--patch", "8", "--width", "32", "--depth", "1",
         "--heads", "2", "--clusters", "2,4", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def train(monkeypatch, tmp_path):
    """research.classifiers.train on a few noise images, in an empty folder."""
    pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
    from research.classifiers import datasets as labelled
    from research.classifiers import train

    class Noise(torch.utils.data.Dataset):
        targets = [0, 1] * 16

        def __len__(self):
            return 32

        def __getitem__(self, i):
            return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)), i % 2

    data = labelled.Labelled(Noise(), ("a", "b"), "noise", "key")
    monkeypatch.setattr(train, "data", lambda *_: (data, data))
    monkeypatch.chdir(tmp_path)
    return train


@pytest.mark.parametrize("often", [False, True])
def test_diverging_training_stops_at_once(train, monkeypatch, capsys, often):
    if often:  # a checkpoint after every step
        monkeypatch.setattr("research.demo_training.fit.CHECKPOINT_SECONDS", -1)
    steps = itertools.count()
    monkeypatch.setattr(train, "augmented", lambda images, g: (next(steps), images)[1])
    assert train.main(["--out", "out", "--rate", "1e9", "--samples", "3200", *SIZES]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: the training diverged: the loss is ")
    assert "of fine; give a lower --rate than 1e+09, and another --out, or delete out" in message
    assert next(steps) < 20
    assert {path.name for path in Path("out").iterdir()} <= {"recipe.json", "fine.ckpt"}
    if Path("out/fine.ckpt").exists():
        assert divergence.resumed_at(Path("out/fine.ckpt")) > 0


def test_malformed_recipe_file_raises(train, capsys):
    for content in ("[]", "{", "3"):
        Path("out").mkdir(exist_ok=True)
        Path("out/recipe.json").write_text(content)
        assert train.main(["--out", "out", "--samples", "32", *SIZES]) == 2
        assert capsys.readouterr().err == (
            "error: --out out: its recipe.json cannot be read; repair it or give another folder\n"
        )
        assert Path("out/recipe.json").read_text() == content
