"""FLOPs agree with a count by hand and are kept with the images."""

from __future__ import annotations

from pathlib import Path

from eval_run import rows

from eval import run as run_module
from eval.common import files
from eval.images import flops, generate
from eval.images import requests as requests_module
from eval.methods import registry as methods


def test_flops_agree_with_a_count_by_hand(deep):
    """Merging saves attention and its projections on half of the tokens of 5 blocks, and costs the matching."""
    settings = generate.Settings("m", "p", "own", "h", 0, 128, 1, 1.0, 1, "cpu", "float32", "a", "t", "d", "tf")
    request = requests_module.Request("0000", "a fox", 0)
    full, tofu, tofu_windows, condense = (
        flops.count_batch(deep, method, settings, [request])
        for method in (generate.BASELINE, *methods.parse("tofu,tofu@window=4,condense", [0.5]))
    )
    N, K, C, blocks = 256, 128, 16, 5
    attention = 4 * C * (N * N - K * K)  # q kᵀ and its product with v
    projections = 4 * 2 * C * C * (N - K)
    matching = 2 * C * 192 * 64
    assert full - tofu == blocks * (attention + projections - matching)
    assert full - tofu_windows == blocks * (attention + projections - matching // 4)  # 4 windows of 48 and 16
    shares = 2 * C * 2 * 128 * 64  # 2 windows of 128 tokens and 64 centroids: to assign, to average, to unmerge
    assert full - condense == blocks * (attention + projections - 3 * shares)


def test_flops_under_a_threshold_are_the_mean_of_several_images(pipe, tmp_path, monkeypatch):
    """In the batches in which they are generated, for a batch decides together; what does not vary is counted once."""
    turns = []
    monkeypatch.setattr(
        flops, "count_batch", lambda pipe, method, settings, turn: turns.append(len(turn)) or 10 * len(turn)
    )
    settings = generate.Settings("m", "p", "own", "h", 0, 128, 1, 1.0, 2, "cpu", "float32", "a", "t", "d", "tf")
    requests = [requests_module.Request(f"{i:04}", "a fox", i) for i in range(11)]
    chosen = methods.parse("tofu,adaptive", [0.5])
    flops.count(tmp_path, pipe, chosen, settings, requests)
    assert turns == [1, 2, 2, 2, 2]
    assert [flops.load_count(tmp_path, settings, method) for method in chosen] == [10, 10]


def test_flops_and_merge_maps_are_kept(command):
    """Generating and measuring can be separate runs, and measuring can be repeated."""
    assert run_module.main([*command, "--method", "tofu", "--flops", "--maps", "--generate-only", "--out", "out"]) == 0
    for again in (["--metrics-only"], []):
        assert run_module.main([*command, "--method", "tofu", *again, "--out", "out"]) == 0
        found = rows(files.read_json(Path("out/results.json")))
        assert found["baseline"]["flops"] > found["tofu-r50"]["flops"] > 0
        assert found["tofu-r50"]["maps"]
        assert not found["baseline"]["maps"]
    content = files.read_json(Path("out/flops/tofu-r50.json"))
    files.write_json(Path("out/flops/tofu-r50.json"), {**content, "config_hash": "by other code"})
    assert run_module.main([*command, "--method", "tofu", "--metrics-only", "--out", "out"]) == 0
    assert rows(files.read_json(Path("out/results.json")))["tofu-r50"]["flops"] is None
