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
        (OSError(28, "No space left on device", "/a/private/place/image.png"), 2, "error: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "\nstopped"),
    ],
)
def test_eval_error_is_one_line_and_exit_code_2(raised, code, said, resumes, capsys):
    """A refusal is never taken up by the same command, whatever was begun is; and no path of the machine is shown."""
    assert ending(raised, resumes) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(said)
    assert output.err.strip().count("\n") == 0
    assert "private" not in output.err
    assert ("the same command resumes" in output.err) == (resumes and not isinstance(raised, EvalError))


def test_bugs_are_not_hidden():
    with pytest.raises(ValueError, match="a bug"):
        ending(ValueError("a bug"), True)


def test_arguments_default_to_sys_argv(monkeypatch):
    assert ending(None, False) == 3
    monkeypatch.setattr(sys, "argv", ["program", "one"])

    @command(resumes=False)
    def program(argv):
        """What it does."""
        return len(argv)

    assert program() == 1
    assert (program.__name__, program.__doc__) == ("program", "What it does.")


def test_unavailable_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(EvalError, match="there is no device 'cuda:2': the last one of cuda is 1"):
        pick_device("cuda:2")
