"""Several processes, and processes that die: the files and figures of one that ran through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import SHALLOW, sd15_pipe

from eval import run as run_module

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = ["a red fox", "a bee", "an old oak", "a kite", "a pond", "a boat", "a hill"]
METHODS = ["baseline-other-seeds", "baseline", "tofu-r50"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline as any model comes, and its prompts."""
    folder = tmp_path_factory.mktemp("processes")
    sd15_pipe(with_unet=SHALLOW).save_pretrained(folder / "model")
    (folder / "own.txt").write_text("\n".join(PROMPTS))
    return folder


def options(folder: Path, out: str, more: tuple[str, ...]) -> list[str]:
    asked = ["--model", str(folder / "model"), "--prompts", str(folder / "own.txt"), "--steps", "2", "--size", "176"]
    asked += [
        "--batch",
        "2",
        "--metrics",
        "psnr,ms-ssim",
        "--seed-baseline",
        "--method",
        "tofu,full",
        "--device",
        "cpu",
    ]
    return [*asked, "--out", str(folder / out), *more]


def here(folder: Path, out: str, *more: str) -> None:
    """The run in this process, which has read its libraries already."""
    assert run_module.main(options(folder, out, more)) == 0


def command(folder: Path, out: str, *more: str, launcher: tuple[str, ...] = ("-m",)) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "eval.run", *options(folder, out, more)],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# its name for "several processes on one machine", which the --device cpu of the job makes CPU ones
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m")


def ran(process: subprocess.Popen[str]) -> tuple[str, str]:
    printed, output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return printed, output


def content(folder: Path, out: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder / out)): path.read_bytes() for path in (folder / out).glob("*/*.png")}


def figures(folder: Path, out: str) -> list[dict[str, object]]:
    rows = json.loads((folder / out / "results.json").read_text())["rows"]
    return [{name: row[name] for name in ("method", "key", "n", "flat", "metrics")} for row in rows]


@pytest.fixture(scope="module")
def alone(folder: Path) -> str:
    here(folder, "alone")
    assert len(content(folder, "alone")) == len(METHODS) * len(PROMPTS)
    return "alone"


def complete_images(folder: Path, out: str) -> dict[Path, int]:
    """Finished images and when they were written."""
    number = (path.with_suffix(".png") for path in (folder / out).glob("*/*.json"))  # a record says it is whole
    return {path: path.stat().st_mtime_ns for path in number if path.exists()}


def kill_once(process: subprocess.Popen[str], folder: Path, out: str, number: int) -> dict[Path, int]:
    """Kills the process and its children when so many images are finished; which those are."""
    wait_for(process, folder, out, number)
    for each in (process.pid, *workers(process.pid)):  # a launch's workers are in sessions of their own
        os.kill(each, signal.SIGKILL)
    process.communicate()
    return complete_images(folder, out)


def wait_for(process: subprocess.Popen[str], folder: Path, out: str, number: int) -> None:
    while len(complete_images(folder, out)) < number:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def workers(launcher: int) -> list[int]:
    """The processes of a launch that do the work."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent == launcher and b"eval.run" in path.with_name("cmdline").read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def test_killed_run_resumes_without_losing_or_repeating_images(folder: Path, alone: str) -> None:
    out, before = "killed", dict[Path, int]()
    for number in (1, 8, 21):  # in the midst of a batch of two, and when all are generated and none is measured
        after = kill_once(command(folder, out), folder, out, number)
        assert {path: after[path] for path in before} == before
        assert not (folder / out / "results.json").exists()
        before = after
    here(folder, out)
    after = complete_images(folder, out)
    assert {path: after[path] for path in before} == before
    assert content(folder, out) == content(folder, alone)
    assert figures(folder, out) == figures(folder, alone)


def test_two_processes_give_the_results_of_one(folder: Path) -> None:
    """Each also reads features of its own share of the images, which must meet again in their order."""
    own = (
        "--model",
        "demo",
        "--prompts",
        "demo",
        "--limit",
        "7",
        "--steps",
        "1",
        "--metrics",
        "psnr,ms-ssim,demo-classifier",
    )
    here(folder, "one", *own)
    printed, output = ran(command(folder, "two", *own, "--json", "--device", "auto", launcher=LAUNCH))
    assert content(folder, "two") == content(folder, "one")
    found = figures(folder, "two")
    assert found == figures(folder, "one")
    assert found[1]["metrics"]["FD-demo"]["value"] > 0  # type: ignore[index]
    assert json.loads(printed)["rows"][0]["method"] == "baseline"  # one of them prints
    runs = json.loads(printed)["provenance"]["generated"]
    assert [run["images"] for run in runs] in ([12, 9], [9, 12]), output


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a process's children are found in /proc")
def test_killed_processes_resume(folder: Path, alone: str) -> None:
    """Where one is killed, the other ends: it does not wait for the dead one."""
    before = kill_once(command(folder, "half", launcher=LAUNCH), folder, "half", 5)
    assert len(before) < 12  # of 21: there is work left to be killed in
    process = command(folder, "half", launcher=LAUNCH)
    wait_for(process, folder, "half", len(before) + 2)
    os.kill(max(workers(process.pid)), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (folder / "half" / "results.json").exists()
    between = complete_images(folder, "half")
    assert {path: between[path] for path in before} == before
    ran(command(folder, "half", launcher=LAUNCH))
    after = complete_images(folder, "half")
    assert {path: after[path] for path in between} == between
    assert content(folder, "half") == content(folder, alone)
    assert figures(folder, "half") == figures(folder, alone)


def test_shards_give_the_results_of_one_run(folder: Path, alone: str) -> None:
    shards = [command(folder, "shards", "--shard", f"{i}/2") for i in (1, 2)]  # at once, as a scheduler would
    for shard in shards:
        ran(shard)
    assert not (folder / "shards" / "results.json").exists()
    before = complete_images(folder, "shards")
    here(folder, "shards")
    assert complete_images(folder, "shards") == before
    assert content(folder, "shards") == content(folder, alone)
    assert figures(folder, "shards") == figures(folder, alone)
