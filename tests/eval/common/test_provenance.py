"""Results name the code, machine and runs that they come from."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
from torch import nn

from eval import run as run_module
from eval.common import files, provenance
from eval.reporting import tables


def test_environments_of_generating_and_measuring_machines_are_recorded(command, monkeypatch):
    monkeypatch.setattr(provenance, "environment", lambda: "<machine one>")
    assert run_module.main([*command, "--limit", "2", "--generate-only", "--out", "out"]) == 0
    monkeypatch.setattr(provenance, "environment", lambda: "machine two")
    assert run_module.main([*command, "--out", "out"]) == 0
    metadata = files.read_json(Path("out/results.json"))["provenance"]
    first, second = (metadata["environments"][run["environment"]] for run in metadata["generated"])
    assert (first, second) == ("<machine one>", "machine two")
    assert metadata["environment"] == metadata["generated"][1]["environment"]
    page = Path("out/report.html").read_text()
    assert "<pre>machine two</pre>" in page
    assert "<pre>&lt;machine one&gt;</pre>" in page
    assert f"machine {metadata['generated'][0]['environment']}, " in page


def test_seconds_measured_under_two_drivers_are_reported(command, monkeypatch):
    """A driver is no setting of theirs: the folder goes on."""
    for driver, limit in (("1", "2"), ("2", "4")):
        monkeypatch.setattr(provenance, "runtime", lambda _, driver=driver: {"driver": driver})
        assert run_module.main([*command, "--limit", limit, "--out", "out"]) == 0
        footnotes = tables.footnotes(files.read_json(Path("out/results.json")))
        assert ("Seconds are of images generated under driver 1; and driver 2." in footnotes) == (driver == "2")


@pytest.mark.parametrize("error", [AttributeError("no pip"), OSError("no such program"), RuntimeError("CUDA is busy")])
def test_environment_report_has_no_volatile_values(monkeypatch, error):
    """torch asks many programs; a machine without one of them must not end a run."""
    message = "cuDNN: /usr/lib/own/libcudnn.so.9\nCPU MHz: 2100.5\nCPU(s): 2\n"
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: message)
    assert provenance.environment.__wrapped__() == "cuDNN: libcudnn.so.9\nCPU(s): 2"
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", Mock(side_effect=error))
    assert provenance.environment.__wrapped__() is None


def test_provenance_names_the_generating_runs(command):
    assert run_module.main([*command, "--method", "tofu", "--limit", "2", "--generate-only", "--out", "out"]) == 0
    assert run_module.main([*command, "--method", "tofu", "--repeats", "2", "--out", "out"]) == 0
    assert run_module.main([*command, "--method", "tofu", "--metrics-only", "--out", "out"]) == 0
    metadata = files.read_json(Path("out/results.json"))["provenance"]
    assert "--metrics-only" in metadata["command"]
    assert [run["images"] for run in metadata["generated"]] == [4, 6]
    assert "--generate-only" in metadata["generated"][0]["command"]
    assert "--repeats 2" in metadata["generated"][1]["command"]
    assert {"commit", "device", "runtime", "packages", "started"} <= metadata["generated"][0].keys()
    page = Path("out/report.html").read_text()
    assert page.index("--metrics-only") < page.index("4 images, from") < page.index("6 images, from")
    assert "--repeats 2" in page


def test_weights_hash_depends_on_the_weights():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert provenance.weights_hash(a) != provenance.weights_hash(b)
    b.load_state_dict(a.state_dict())
    assert provenance.weights_hash(a) == provenance.weights_hash(b)
