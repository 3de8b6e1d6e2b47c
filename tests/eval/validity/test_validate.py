"""The command eval.validate: what it measures, writes and prints, on a tiny model."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from eval import validate
from eval.common.files import read_json
from eval.evaluation import prepare
from eval.reporting import results
from eval.validity import criteria, measurement, photographs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder of a finished run: five images of 176 px, one step."""
    out = tmp_path_factory.mktemp("validity") / "out"
    pipe = tiny.sd15_pipe()
    pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        for module in (prepare, measurement):
            patch.setattr(module, "load_model", lambda *_: (pipe, None))
        patch.setattr(measurement, "STRONG_STEPS", 2)
        patch.setattr(measurement, "TOKEN_IMAGES", 1)
        common = measurement._common
        patch.setattr(measurement, "_common", lambda *a: [*common(*a), "--steps", "1", "--size", "176", "--batch", "2"])
        strong = measurement._strong_run
        patch.setattr(measurement, "_strong_run", lambda *a: [*strong(*a), "--steps", "2"])
        assert validate.main(["--limit", "5", "--out", str(out), "--device", "cpu"]) == 0
    return out


def test_run_measures_every_criterion(finished):
    found = read_json(finished / "validity.json")
    assert len(found["rows"]) == len(criteria.GROWING) + 6
    assert found["settings"]["n"] == 5
    assert all(set(row) == {"name", "measured", "required", "holds"} for row in found["rows"])
    assert "nan" not in json.dumps(found["rows"])


def test_run_evaluates_the_methods_of_the_photographs(finished):
    report, _ = results.read(finished / "guidance-3")
    slugs = {measurement.parse_methods(one.method, [one.ratio])[0].slug for one in photographs.METHODS}
    assert slugs <= {row["key"] for row in report["rows"]}
    assert report["settings"]["guidance"] == 3
    strong, _ = results.read(finished / "guidance-7.5")
    assert (strong["settings"]["guidance"], [row["key"] for row in strong["rows"]]) == (
        7.5,
        ["baseline", "mean-r50", "no-attention"],
    )


def test_table_prints_a_finished_run(finished, capsys):
    assert validate.main(["--table", str(finished)]) == 0
    printed = capsys.readouterr().out
    found = read_json(finished / "validity.json")
    assert printed.count("\n| ") >= len(found["rows"])
    failed = sum(not row["holds"] for row in found["rows"])
    assert printed.count("**no**") == failed
    assert f"{len(found['rows']) - failed} of {len(found['rows'])} criteria hold" in printed


def test_table_of_a_missing_or_damaged_run_is_refused(tmp_path, capsys):
    assert validate.main(["--table", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    (tmp_path / "validity.json").write_text('{"schema": 2, "rows": []}')
    assert validate.main(["--table", str(tmp_path)]) == 2
    assert "is not as eval.validate writes it" in capsys.readouterr().err


def test_tokens_are_measured_in_every_block_of_the_highest_resolution():
    pipe = tiny.sd15_pipe()
    pipe.set_progress_bar_config(disable=True)
    from eval.images.requests import Request
    from eval.validity import token_similarity

    sampling = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64}
    found = token_similarity.measure(pipe, [Request("0", "a fox", 0)], **sampling)
    assert len(found) == len(photographs.TOKEN_COSINES)
    assert all(-1 <= value <= 1 for value in found.values())
    again = token_similarity.measure(pipe, [Request("0", "a fox", 0)], **sampling)
    assert found == again  # nothing stays attached
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())
    assert torch.is_grad_enabled()
