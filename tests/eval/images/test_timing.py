"""Times: repeats, warm-up, and the baseline beside each method."""

from __future__ import annotations

from pathlib import Path

from eval_run import rows

from eval import run as run_module
from eval.common import files
from eval.images import generate


def test_later_method_is_added_to_the_folder_and_timed_against_the_baseline(command, capsys, monkeypatch):
    assert run_module.main([*command, "--method", "tofu", "--out", "out"]) == 0
    assert run_module.main([*command, "--method", "tofu,prune", "--out", "out"]) == 0
    found = rows(files.read_json(Path("out/results.json")))
    assert found["tofu-r50"]["speedup"]["n"] == 2
    assert found["prune-r50"]["speedup"]["n"] == 2  # the baseline's denoiser ran beside it
    assert run_module.main([*command, "--method", "tofu,mlerp", "--timed", "0", "--out", "out"]) == 0
    found = rows(files.read_json(Path("out/results.json")))
    assert found["mlerp-r50"]["speedup"] is None  # no time is compared with another run's
    assert found["mlerp-r50"]["seconds"]["n"] == 2
    assert "mlerp 50%: no times, the baseline was not timed beside it" in capsys.readouterr().out


def test_fastest_repeat_of_a_batch_counts(command, monkeypatch):
    seconds = iter([9.0, 3.0, 1.0, 2.0] * 2)  # of each method: a warm-up and three repeats
    original = generate.generate_batch

    def timed(*args, **options):
        images, cost = original(*args, **options)
        return images, {**cost, "seconds": next(seconds)}

    monkeypatch.setattr(generate, "generate_batch", timed)
    assert run_module.main([*command, "--limit", "2", "--repeats", "3", "--out", "out"]) == 0
    for row in files.read_json(Path("out/results.json"))["rows"]:
        assert row["seconds"]["median"] == 1.0


def test_partially_complete_batch_is_timed(command):
    assert run_module.main([*command, "--method", "tofu", "--limit", "1", "--out", "out"]) == 0
    assert run_module.main([*command, "--method", "tofu", "--limit", "2", "--out", "out"]) == 0
    for row in files.read_json(Path("out/results.json"))["rows"]:
        assert row["seconds"]["n"] == row["speedup"]["n"] == 1


def test_images_of_other_batches_are_reported(command, capsys):
    """A longer list puts an image in another batch, where its last bits come out otherwise."""
    assert run_module.main([*command, "--method", "tofu", "--limit", "1", "--out", "out"]) == 0
    assert run_module.main([*command, "--method", "tofu,prune", "--limit", "2", "--out", "out"]) == 0
    found = rows(files.read_json(Path("out/results.json")))
    assert (found["tofu-r50"]["other_batch"], found["prune-r50"]["other_batch"]) == (0, 1)
    shown = capsys.readouterr().out
    assert "prune 50%: 1 of 2 images were generated in another batch than the baseline's" in shown
    assert "tofu 50%: 1 of 2" not in shown


def test_each_method_is_warmed_up_once_where_a_run_resumes(command, monkeypatch):
    assert run_module.main([*command, "--batch", "1", "--method", "tofu,prune", "--out", "out"]) == 0
    for missing in ("tofu-r50/0000.png", "prune-r50/0001.png", "tofu-r50/0002.png", "prune-r50/0003.png"):
        (Path("out") / missing).unlink()
    calls = []
    generate_batch = generate.generate_batch

    def recording(pipe, requests, method, settings, **options):
        calls.append((method.slug, requests[0].id))
        return generate_batch(pipe, requests, method, settings, **options)

    monkeypatch.setattr(generate, "generate_batch", recording)
    assert run_module.main([*command, "--batch", "1", "--method", "tofu,prune", "--out", "out"]) == 0
    warm_up = generate.WARM_UP
    assert calls == [
        *[("tofu-r50", "0000")] * (warm_up + 1), ("tofu-r50", "0002"),
        *[("prune-r50", "0001")] * (warm_up + 1), ("prune-r50", "0003"),
    ]  # fmt: skip
