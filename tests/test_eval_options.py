"""What every program of eval ends with."""

import sys

import pytest
import torch

from eval import EvalError
from eval.common.cli import command
from eval.common.devices import pick_device


def ending(raised: BaseException | None, resumes: bool) -> int:
    @command(resumes=resumes)
    def program(argv):
        if raised is not None:
            raise raised
        return len(argv)

    return program(["a", "b", "c"])


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (EvalError("no such method"), 2, "error: no such method\n"),
        (OSError(28, "No space left on device", "/a/private/place/picture.png"), 2, "error: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "\nstopped"),
    ],
)
def test_what_cannot_be_is_one_line_and_a_code(raised, code, said, resumes, capsys):
    """A refusal is never taken up by the same command, whatever was begun is; and no path of the machine is shown."""
    assert ending(raised, resumes) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(said)
    assert told.err.strip().count("\n") == 0
    assert "private" not in told.err
    assert ("the same command resumes" in told.err) == (resumes and not isinstance(raised, EvalError))


def test_what_is_wrong_with_a_program_itself_is_not_hidden():
    with pytest.raises(ValueError, match="a bug"):
        ending(ValueError("a bug"), True)


def test_arguments_are_those_typed_where_none_are_given(monkeypatch):
    assert ending(None, False) == 3
    monkeypatch.setattr(sys, "argv", ["program", "one"])

    @command(resumes=False)
    def program(argv):
        """What it does."""
        return len(argv)

    assert program() == 1
    assert (program.__name__, program.__doc__) == ("program", "What it does.")


def test_a_device_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(EvalError, match="there is no device 'cuda:2' here: those of cuda end with 1"):
        pick_device("cuda:2")
