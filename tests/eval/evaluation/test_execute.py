"""A run that is interrupted, full or out of memory says how to go on; black and NaN images are reported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from eval_run import rows

from eval import compare as compare_module
from eval import report as report_module
from eval import run as run_module
from eval.common import files
from eval.evaluation import execute
from eval.images import generate
from eval.methods import registry as methods


def test_method_that_is_not_installed_is_a_skipped_row(command, monkeypatch, capsys):
    monkeypatch.setattr(methods, "version", lambda name: None)
    assert run_module.main([*command, "--method", "tofu,tomesd", "--limit", "2"]) == 0
    assert "tomesd 50%: skipped: pip install tomesd" in capsys.readouterr().out


def test_interrupt_message_says_how_to_resume(command, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "generate", stop)
    assert run_module.main([*command]) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_full_disk_prints_one_line_and_the_run_resumes(command, monkeypatch, capsys):
    replace, room = os.replace, iter([True] * 6)

    def full_disk(source, target):
        if not next(room, False):
            raise OSError(28, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full_disk)
    assert run_module.main([*command, "--out", "out"]) == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert output.startswith("error: [Errno 28] No space left on device")
    assert output.endswith("the same command resumes")
    assert not list(Path("out").rglob(".*"))  # nothing half-written is left
    monkeypatch.setattr(files.os, "replace", replace)
    assert run_module.main([*command, "--out", "out"]) == 0


def test_black_images_are_counted_and_reported(command, monkeypatch, capsys, pipe):
    """A model in half precision generates them when its values are NaN."""
    original = generate.generate_batch

    def blackened(*args, **options):
        pixels, cost = original(*args, **options)
        if options.get("output") != "latent":
            pixels[0] = 0
        return pixels, cost

    monkeypatch.setattr(generate, "generate_batch", blackened)
    assert run_module.main([*command, "--limit", "2", "--method", "tofu", "--out", "out"]) == 0
    assert rows(files.read_json(Path("out/results.json")))["tofu-r50"]["flat"] == 1
    assert "tofu 50%: 1 of 2 images are one flat colour" in capsys.readouterr().out


@pytest.mark.parametrize(("part", "flat"), [(slice(None), 1), (slice(32), 0)])
def test_nan_images_are_reported_in_every_comparison(command, monkeypatch, capsys, pipe, part, flat):
    """Half of an image is enough; where both models' are black they are equal, and the score rises."""
    decode = pipe.vae.decode

    def broken(*args, **options):
        found = decode(*args, **options)
        (found[0] if isinstance(found, tuple) else found.sample)[0, :, part] = float("nan")
        return found

    assert run_module.main([*command, "--limit", "2", "--metrics", "psnr", "--strict", "--out", "whole"]) == 0
    monkeypatch.setattr(pipe.vae, "decode", broken)
    command = [*command, "--limit", "2", "--metrics", "psnr", "--method", "full,tofu,prune", "--flops", "--out", "out"]
    assert run_module.main(command) == 0
    message = "tofu 50%: 1 of 2 images hold NaN, saved as black"
    assert message in capsys.readouterr().out
    found = rows(files.read_json(Path("out/results.json")))["tofu-r50"]
    assert (found["nan"], found["flat"]) == (1, flat)
    for shown in (["--markdown"], ["--pareto"], ["--against", "prune 50%"]):
        assert report_module.main(["out", *shown]) == 0
        assert message in capsys.readouterr().out
    assert report_module.main(["out", "--markdown", "--rows", "prune 50%"]) == 0
    shown = capsys.readouterr().out
    assert "baseline: 1 of 2 images hold NaN" in shown  # with which the row is compared
    assert message not in shown
    assert "hold NaN" in Path("out/report.html").read_text()
    assert compare_module.main(["out", "out"]) == 0
    assert f"out: {message}" in capsys.readouterr().out
    assert run_module.main([*command, "--strict"]) == 1


def test_strict_exits_with_1_if_something_was_skipped(command):
    assert run_module.main([*command, "--strict", "--metrics", "psnr"]) == 0
    assert run_module.main([*command, "--strict", "--metrics", "psnr,ms-ssim"]) == 1  # 64 px are too few


def test_out_of_memory_while_generating_gives_advice(command, monkeypatch, capsys):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has 8 GiB.")

    monkeypatch.setattr(execute, "generate", full)
    assert run_module.main([*command, "--out", "out"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: CUDA out of memory. Tried to allocate 20 GiB: a smaller --batch takes less; it changes the last bits, "
        "so it needs a new folder"
    )


def test_out_of_memory_in_a_metric_gives_advice(command, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(execute, "score", full)
    assert run_module.main([*command, "--out", "out"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("--metrics-only --device cpu measures without the accelerator")
    )


def test_other_runtime_errors_are_not_reported_as_out_of_memory(command, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(execute, "score", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_module.main([*command, "--out", "out"])
