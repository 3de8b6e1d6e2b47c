"""What stops a command line from outside: Ctrl-C at any moment, a missing package, disks that are full or read-only."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval import EvalError
from eval import prompts as prompts_module
from eval.common import files
from eval.common.cli import as_path, command
from research.classifiers import datasets as labelled
from tofu_sd import interrupts

ROOT = Path(__file__).parents[3]
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("eval", "tofu_sd")
    for path in (ROOT / folder).rglob("*.py")
    if "if __name__ ==" in path.read_text(encoding="utf-8")
)
# in torch's place: Ctrl-C in the middle of an import, which a library hides
INTERRUPTED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
except BaseException:
    pass
raise RuntimeError("it went on")
"""


def in_the_foreground() -> None:
    """Takes Ctrl-C, which these tests ignore where a shell runs them in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(name: str, tmp_path: Path, stub: str) -> subprocess.CompletedProcess[str]:
    """A command line with a torch that is this text."""
    (tmp_path / "torch.py").write_text(stub)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-m", name],
        env=environment, cwd=tmp_path, capture_output=True, text=True, preexec_fn=in_the_foreground,
    )  # fmt: skip


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_ctrl_c_during_imports_is_one_line(name, tmp_path):
    done = start(name, tmp_path, INTERRUPTED)
    if "is not installed" in done.stderr:  # a package that is imported before torch
        pytest.skip(done.stderr)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("name", ["eval.run", "eval.prompts", "tofu_sd.linearity"])
def test_missing_package_prints_one_line(name, tmp_path):
    done = start(name, tmp_path, 'raise ModuleNotFoundError("No module named \'numpy\'", name="numpy")')
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the package ")
    assert done.stderr.endswith("is not installed: pip install 'tofu-sd[eval]'\n")
    assert done.stderr.count("\n") == 1


def test_a_bug_in_an_import_is_not_hidden(tmp_path):
    done = start("eval.report", tmp_path, 'raise RuntimeError("a bug")')
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: a bug\n")


def test_ctrl_c_while_the_real_packages_are_imported(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.run", "--out", "out"],
        env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=in_the_foreground,
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    for _ in range(400):
        if not maps.exists() or "libtorch" in maps.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "stopped\n")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def guarded(monkeypatch):
    """As in a process that a command line has started."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.guard()
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("resumes", [True, False])
def test_ctrl_c_during_the_work_can_be_caught_and_ends_the_process_again_afterwards(guarded, capsys, resumes):
    outside = signal.getsignal(signal.SIGINT)

    @command(resumes=resumes)
    def inner(argv):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return 0

    @command(resumes=resumes)
    def program(argv):
        assert inner([]) == 0
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        return 0

    assert program([]) == interrupts.STOPPED
    assert signal.getsignal(signal.SIGINT) is outside
    assert capsys.readouterr().err == "\nstopped" + "; the same command resumes" * resumes + "\n"


def test_sigint_handler_is_kept_outside_of_commands():
    before = signal.getsignal(signal.SIGINT)
    assert not interrupts.is_command()
    with interrupts.interruptible():
        assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_ctrl_c_stays_ignored(guarded):
    """As a shell has it for what runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts.guard()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_library_error_caused_by_ctrl_c_is_an_interrupt(capsys):
    @command(resumes=False)
    def program(argv):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as stop:
            raise EvalError("cannot load the model") from stop

    assert program([]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "resumes", "advice"),
    [
        (errno.ENOSPC, True, "free some space on that disk"),
        (errno.EDQUOT, True, "free some space"),
        (errno.EROFS, False, "nothing can be written on that disk"),
        (errno.EACCES, False, "change the permissions"),
        (errno.ENOTDIR, False, "a part of that path is a file"),
        (errno.EISDIR, False, "a folder is in the place of that file"),
        (errno.ENOENT, False, "cannot be made"),
        (errno.ELOOP, False, "lead in a circle"),
        (errno.ENAMETOOLONG, False, "a shorter path"),
    ],
)
def test_only_temporary_errors_promise_to_resume(number, resumes, advice, capsys):
    @command(resumes=True)
    def program(argv):
        raise OSError(number, os.strerror(number), "some/file.png")

    assert program([]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert "some/file.png" in output
    assert advice in output
    assert ("the same command resumes" in output) == resumes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_failed_write_names_the_file_and_leaves_no_temp_file(tmp_path, monkeypatch, number):
    (tmp_path / "out.json").write_text("before")

    def refuse(path, content):
        path.touch()  # a part of it is there
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match=r"out\.json'$") as raised:
        files.write(tmp_path / "out.json", "after")
    assert raised.value.errno == number
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert (tmp_path / "out.json").read_text() == "before"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", [["demo"], ["--help"]])
def test_full_disk_under_stdout_prints_one_line(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "eval.prompts", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.stderr.count("\n") <= 1  # argparse takes an unwritten --help for read
    assert done.returncode == (0 if arguments == ["--help"] else 2)


def test_full_disk_while_rendering_scenes_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        labelled.rendered(16, 1, 0, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_scenes_are_refused(tmp_path):
    labelled.rendered(16, 1, 0, tmp_path)
    (file,) = tmp_path.iterdir()
    os.truncate(file, 200)
    with pytest.raises(EvalError, match=r"is damaged; delete it"):
        labelled.rendered(16, 1, 0, tmp_path)


# --- places that cannot be written to ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "folder", "said"),
    [
        ("link", True, "link is a link to 'nowhere/y', which does not exist"),
        ("link/out", True, "link is a link to 'nowhere/y', which does not exist"),
        ("link", False, "link is a link to 'nowhere/y', which does not exist"),
        ("file", True, "there is a file of that name, and a folder is needed"),
        ("file/a/b", True, "'file' is a file, and no folder can be inside"),
        ("file/a", False, "'file' is a file, and no folder can be inside"),
        ("there", False, "there is a folder of that name, and a file is written"),
    ],
)
def test_unwritable_path_is_known_before(tmp_path, monkeypatch, place, folder, said):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nowhere/y")
    Path("file").write_text("")
    Path("there").mkdir()
    with pytest.raises(EvalError, match=f"^--out .*{said}; give another path$"):
        files.check_place(Path(place), "--out", folder=folder)


def test_read_only_path_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(EvalError, match="cannot be written to; change the permissions"):
        files.check_place(tmp_path / "a" / "b", "--out", folder=True)


def test_writable_path_is_accepted(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").write_text("")
    for place, folder in (("real", True), ("new/er", True), ("link", True), ("file", False), ("link/file", False)):
        files.check_place(tmp_path / place, "--out", folder=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "real"]


def test_as_path_gives_every_path_a_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert as_path(".").name == "mine"
    assert as_path("a/b") == Path("a/b")
    for text in ("", "  "):
        with pytest.raises(Exception, match="is not a path; give the name of a file or folder"):
            as_path(text)


def test_argument_that_is_not_utf8_prints_one_line(capsys):
    assert prompts_module.main(["a\udcff.txt"]) == 2
    assert capsys.readouterr().err == "error: the argument 'a\\udcff.txt' is not UTF-8; give another name\n"
