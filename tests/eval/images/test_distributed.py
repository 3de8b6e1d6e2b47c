"""Processes of one launch: their devices, metrics, progress and output."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from eval import EvalError
from eval import run as run_module
from eval.evaluation import execute, plan
from eval.images import distributed
from eval.images.distributed import Processes
from eval.metrics import base, pairwise


def test_inconsistent_world_size_is_refused(monkeypatch):
    """Each of them would generate everything, into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda **_: Namespace(num_processes=1, process_index=0))
    with pytest.raises(EvalError, match="WORLD_SIZE is 2, and accelerate finds 1"):
        distributed.launched_processes(cpu=False)


def test_process_group_is_destroyed_at_exit(monkeypatch):
    """A process group that is still open at the end of a process now and then aborts it (exit code -6)."""
    state = Namespace(num_processes=2, process_index=1, device=None, destroy_process_group=lambda: None)
    registered = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda **_: state)
    monkeypatch.setattr("atexit.register", registered.append)
    distributed.launched_processes(cpu=True)
    assert registered == [state.destroy_process_group]


def test_processes_without_accelerator_use_cpus(command, monkeypatch):
    seen = []
    monkeypatch.setattr(plan, "pick_device", lambda name: torch.device("cpu" if name == "auto" else name))
    monkeypatch.setattr(plan, "launched_processes", lambda cpu: seen.append(cpu) or Processes())
    for device in ("auto", "cpu", "meta"):
        assert run_module.main([*command, "--device", device, "--dry-run"]) == 0
    assert seen == [True, True, False]


def test_metric_unavailable_in_one_process_is_skipped_in_all():
    """Their figures are put together in the end, when everything is generated."""
    psnr, lacking = pairwise.psnr(), base.Skipped("LPIPS-alex", "no network on the other node")
    lpips = base.Pairwise("LPIPS-alex", "lpips", True, lambda a, b: a)

    class Two(Processes):
        def gather_object(self, value):
            return [value, [lacking]]

    assert execute.available_everywhere([psnr, lpips], Two(0, 2)) == [psnr, lacking]
    assert execute.available_everywhere([psnr, lacking], Processes()) == [psnr, lacking]


def test_progress_is_shown_by_every_shard_and_one_process_of_a_launch(command, monkeypatch, capsys):
    assert run_module.main([*command, "--shard", "2/2", "--out", "out"]) == 0
    assert "tofu-r50 (2 of 2)" in capsys.readouterr().err
    monkeypatch.setattr(plan, "launched_processes", lambda cpu: Processes(1, 2))
    monkeypatch.setattr(Processes, "wait_for_everyone", lambda self: None)
    monkeypatch.setattr(Processes, "gather_object", lambda self, value: [value, value])
    assert run_module.main([*command, "--generate-only", "--out", "other"]) == 0
    assert "tofu-r50" not in capsys.readouterr().err


def test_several_processes_refuse_shard_and_device_index(command, monkeypatch, capsys):
    monkeypatch.setattr(plan, "launched_processes", lambda cpu: execute.Processes(0, 2))
    assert run_module.main([*command, "--shard", "1/2"]) == 2
    assert "--shard is for processes that are started independently" in capsys.readouterr().err
    assert run_module.main([*command, "--device", "cudo"]) == 2
    assert "did you mean 'cuda'" in capsys.readouterr().err
    assert run_module.main([*command, "--device", "cpu:0"]) == 2
    assert "each of 2 processes uses its own device" in capsys.readouterr().err


def test_only_the_main_process_prints(command, capsys, monkeypatch):
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setattr(plan, "launched_processes", lambda cpu, rank=rank: Processes(rank, 2))
        monkeypatch.setattr(Processes, "wait_for_everyone", lambda self: None)
        monkeypatch.setattr(Processes, "gather_object", lambda self, value: [value, 3])
        for stage in ("--dry-run", "--generate-only"):
            assert run_module.main([*command, stage, "--json", "--device", "cpu", "--out", "out"]) == 0
            printed = capsys.readouterr().out
            assert printed.count('"out": "out"') == lines
    assert '"generated"' not in printed
