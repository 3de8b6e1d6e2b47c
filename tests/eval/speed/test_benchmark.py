"""The benchmark: its models are the real ones' top level, its ideal is one, its rows say what was measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.testing import CompileCounter

import tofu_sd
import tofu_sd.patching.patch
from eval import bench as bench_module
from eval.methods import registry
from eval.methods import registry as methods
from eval.speed import benchmark as bench
from eval.speed import contender as contender_module
from eval.speed import model_shapes as shapes
from eval.speed import tables
from eval.speed.model_shapes import CASES, Case
from tofu_sd.core import matching

CPU = torch.device("cpu")
T = torch.tensor(500)
SMALL = {**shapes.SD15, "block_out_channels": (32,) * 4, "attention_head_dim": 2, "cross_attention_dim": 16}


@pytest.fixture(autouse=True)
def _small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "small-128", Case("small-128", SMALL, 128))


@pytest.mark.parametrize("case", [case for name, case in CASES.items() if name != "small-128"], ids=lambda c: c.name)
def test_top_level_matches_the_real_model(case: Case) -> None:
    """Same blocks at the same sizes, in the same order, of the same weights."""
    with torch.device("meta"):
        whole = UNet2DConditionModel(sample_size=case.latent, **case.shape)
        part = shapes.TopLevel(case, only_attention=False)
    real = tofu_sd.summary(tofu_sd.apply_patch(whole, 0.5)).rows
    ours = tofu_sd.summary(tofu_sd.apply_patch(part, 0.5), (case.latent // part.downsample,) * 2).rows
    assert [(r.before, r.after, r.reduction) for r in real] == [(r.before, r.after, r.reduction) for r in ours]
    for a, b in zip(real, ours, strict=True):
        theirs, mine = (
            {name: weight.shape for name, weight in model.get_submodule(row.name).named_parameters()}
            for model, row in ((whole, a), (part, b))
        )
        assert theirs == mine
        assert whole.get_submodule(a.name).attn1.heads == part.get_submodule(b.name).attn1.heads


def test_only_attention_leaves_only_self_attention() -> None:
    model, call = shapes.top_level(CASES["small-128"], 2, CPU, torch.float32, only_attention=True)
    names = {name.split(".")[-2] for name, _ in model.named_parameters()}
    assert names == {"norm1", "norm2", "to_q", "to_k", "to_v", "0"}  # to_out.0; norm2 is cross-attention's and unused
    before = call.sample
    assert model(call.sample, T, **call.more).shape == before.shape


def test_shared_weights_copy_shares_only_weights() -> None:
    model, call = shapes.top_level(CASES["small-128"], 2, CPU, torch.float32, only_attention=False)
    plain = model(call.sample, T, **call.more)
    shared_weights_copy = shapes.shared_weights_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), shared_weights_copy.parameters(), strict=True))
    tofu_sd.apply_patch(shared_weights_copy, 0.5)
    assert not torch.equal(shared_weights_copy(call.sample, T, **call.more), plain)
    assert torch.equal(model(call.sample, T, **call.more), plain)


@pytest.mark.parametrize("only_attention", [True, False])
def test_a_batch_is_that_of_guidance(only_attention: bool) -> None:
    """Its halves are the same latents, or `share_across_cfg` refuses them and is not measured."""
    model, call = shapes.top_level(CASES["small-128"], 4, CPU, torch.float32, only_attention=only_attention)
    tofu_sd.apply_patch(model, 0.5, share_across_cfg=True, min_tokens=0)
    assert model(call.sample, T, **call.more).shape == call.sample.shape
    assert not torch.equal(call.sample[0], call.sample[1])
    assert len(shapes.top_level(CASES["small-128"], 3, CPU, torch.float32, only_attention=True)[1].sample) == 3


def test_ideal_attends_to_the_first_tokens_only() -> None:
    model, call = shapes.top_level(CASES["small-128"], 2, CPU, torch.float32, only_attention=True)
    seen = []
    with bench.ideal(model, 0.5, 16):
        for block in (
            b for stage in (*model.down_blocks, *model.up_blocks) for t in stage for b in t.transformer_blocks
        ):
            block.attn1.to_q.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        model(call.sample, T, **call.more)
    assert seen == [(2, 128, 32)] * 5


def run(capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    assert bench_module.main(["--case", "small-128", "--device", "cpu", "--rounds", "3", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_benchmark_rows_describe_the_setup(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = run(capsys, "--method", "tofu,tomesd", "--scope", "attention,unet", "--out", str(tmp_path / "b.json"))
    assert [(r["scope"], r["method"]) for r in rows] == [
        (scope, method) for scope in ("attention", "unet") for method in ("baseline", "ideal", "tofu", "tomesd")
    ]
    for row in rows:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert len(row["samples"]) == 3
        assert row["scratch_bytes"] > 0
    full, ideal, tofu, _ = rows[:4]
    assert full["share"] is None
    assert ideal["share"] is None
    assert tofu["speedup"]["value"] == pytest.approx(full["p50"] / tofu["p50"])
    saved = json.loads((tmp_path / "b.json").read_text())
    assert saved["rows"] == rows
    assert saved["provenance"]["command"].startswith("python -m eval.bench --case small-128")


def test_benchmark_says_what_it_does_and_how_to_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    """For minutes nothing but "0/1 setup" stood there."""
    arguments = ["--case", "small-128", "--device", "cpu", "--scope", "attention", "--rounds", "2", "--method", "tofu"]
    assert bench_module.main(arguments) == 0
    output = capsys.readouterr()
    lines = output.err.replace("\r", "\n").splitlines()
    assert lines[0].startswith("timing baseline, ideal, tofu on cpu")
    assert lines[0].endswith("float32, random weights, 2 rounds")
    assert lines[1] == "small at 128 px, self-attention of the highest resolution"
    for phase in ("building the model", "preparing ideal", "preparing tofu", "timing"):
        assert phase in output.err
    assert "above 1×: faster than the baseline" in output.out.replace("\n", " ")
    assert CASES["sd15-512"].title == "Stable Diffusion 1.5 at 512 px"


def test_profiler_does_not_log() -> None:
    """With a torch for CUDA and without a driver, its library reports "ERROR ... gpuGetDeviceCount failed"."""
    code = "import torch; from eval.speed.contender import peak; peak(lambda: torch.ones(3) + 1, torch.device('cpu'))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not re.search(r"^[A-Z]+:\d{4}-\d\d-\d\d ", ended.stderr, flags=re.MULTILINE)


def test_failing_method_is_a_skipped_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> Any:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(bench.torch, "compile", refuse)
    rows = run(capsys, "--method", "tofu", "--scope", "attention", "--compile", "no,default")
    assert [row.get("skipped") for row in rows] == [None] * 3 + ["no kernel for this"] * 3


def test_setup_after_the_time_limit_is_a_skipped_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = iter(range(0, 600, 90))
    monkeypatch.setattr(bench.time, "monotonic", lambda: float(next(minutes)))
    rows = run(capsys, "--method", "tofu", "--scope", "attention,block", "--minutes", "2")
    assert [row["scope"] for row in rows if "skipped" not in row] == ["attention"] * 3
    assert [(row["scope"], row["method"]) for row in rows if "skipped" in row] == [("block", "all")]


def test_the_table_holds_speed_and_quality(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = run(capsys, "--method", "tofu,tome+p", "--scope", "attention", "--out", str(tmp_path / "b.json"))
    figures = {"tofu-r50": {"PSNR ↑": "36.65 (35.60–37.61)", "n": "96"}, "not-here": {"PSNR ↑": "1", "n": "7"}}
    text = tables.markdown(tables.read(tmp_path / "b.json"), figures)
    assert "PSNR, LPIPS: 96 images of the embedded model" in text  # a figure goes nowhere without its n
    line = next(line for line in text.splitlines() if line.startswith("| tofu "))
    assert f"{1000 * rows[2]['p50']:.1f} (" in line
    assert line.endswith("| 36.65 (35.60–37.61) |")
    assert next(line for line in text.splitlines() if line.startswith("| tome+p ")).endswith("| – |")
    assert "`python -m eval.bench --case small-128" in text
    assert bench_module.main(["--table", str(tmp_path / "b.json"), "--method", "tofu", "--scope", "attention"]) == 0
    printed = capsys.readouterr().out
    assert [line.split(" |")[0] for line in printed.splitlines() if line.startswith("| ")] == [
        "| method",  "| baseline", "| ideal", "| tofu"
    ]  # fmt: skip
    assert bench_module.main(["--table", str(tmp_path / "b.json"), "--method", "tofoo"]) == 2
    assert "unknown method 'tofoo' (did you mean 'tofu'?)" in capsys.readouterr().err
    assert bench_module.main(["--table", str(tmp_path / "none.json")]) == 2
    assert "none.json holds no results" in capsys.readouterr().err


def test_rounds_are_compared_pairwise(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Medians hide how often the order turns."""
    run(capsys, "--method", "tofu,tomesd", "--scope", "attention", "--out", str(tmp_path / "b.json"))
    found = tables.read(tmp_path / "b.json")
    rows = {row["method"]: row for row in found["rows"]}
    rows["tofu"]["samples"], rows["tomesd"]["samples"] = [1.0, 3.0, 1.0], [2.0, 2.0, 2.0]
    lines = [line.split(" | ") for line in tables.markdown(found, {}).splitlines() if line.startswith("| ")]
    at = lines[0].index("rounds ahead of tomesd |")
    observed = {line[0].strip("| "): line[at].strip("| ") for line in lines[1:]}
    assert (observed["tofu"], observed["tomesd"]) == ("2 of 3", "–")


def test_every_model_is_compiled(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its limit of graphs of one class, torch.compile runs eagerly with no more than a warning."""
    counted: list[Any] = []
    plain = torch.compile

    def counting(model: Any, **options: Any) -> Any:
        counted.append(CompileCounter())
        return plain(model, backend=counted[-1])

    monkeypatch.setattr(bench.torch, "compile", counting)
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    names = ",".join(f"tofu@depth_split={d}" for d in range(3))
    with config.patch({limit: 2}):  # of 8
        run(capsys, "--method", names, "--scope", "attention", "--compile", "default")
    assert len(counted) == 5
    assert all(counter.frame_count >= 1 for counter in counted)


def test_methods_that_need_whole_images_are_skipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "tofu@start=0.5,tofu@min_tokens=auto,tofu@merge_mlp=True,deepcache,tomesd"
    monkeypatch.setattr(registry, "version", lambda name: None if name == "tomesd" else "1")
    rows = run(capsys, "--method", names, "--scope", "attention")[2:]
    assert "depends on the step" in rows[0]["skipped"]
    assert "measured in whole UNets" in rows[1]["skipped"]
    assert "only self-attention" in rows[2]["skipped"]
    assert "a whole UNet" in rows[3]["skipped"]
    assert rows[4]["skipped"] == "pip install tomesd"


def test_the_default_is_timed_in_a_whole_unet(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the way to show that the default is never slower."""
    row = run(capsys, "--method", "tofu@min_tokens=auto", "--scope", "unet")[2]
    assert "skipped" not in row
    assert row["speedup"]["value"] > 0


def test_periodic_methods_are_timed_over_a_period(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step alone would show the step that costs all, or one that costs nothing."""
    matched: list[int] = []
    plain = matching._nearest
    monkeypatch.setattr(matching, "_nearest", lambda *args: matched.append(1) or plain(*args))
    steps: list[int] = []
    ran = bench.Contender.sample

    def sample(self: bench.Contender, device: torch.device) -> None:
        before = len(matched)
        ran(self, device)
        if self.method == "tofu@match_interval=3":
            steps.append(self.calls)
            assert len(matched) - before == 5 * self.calls / 3

    monkeypatch.setattr(bench.Contender, "sample", sample)
    run(capsys, "--method", "tofu@match_interval=3", "--scope", "attention")
    assert steps
    assert all(calls % 3 == 0 for calls in steps)


@pytest.mark.parametrize(("outer", "interval"), [("deepcache", 3), ("deepcache-2", 2)])
def test_deepcache_runs_one_step_of_its_interval_whole(outer: str, interval: int) -> None:
    pytest.importorskip("DeepCache")
    model, call = shapes.unet(CASES["small-128"], 2, CPU, torch.float32)
    before = {name: {*vars(module)} for name, module in model.named_modules()}
    count = {"deep": 0, "top": 0}
    for name, resnet in (("deep", model.mid_block.resnets[0]), ("top", model.up_blocks[-1].resnets[-1])):
        resnet.conv1.register_forward_pre_hook(lambda module, args, name=name: count.update({name: count[name] + 1}))
    [method] = methods.parse(f"{outer}:tofu", [0.5])
    assert (method.slug, method.period) == (f"{outer}-tofu-r50", interval)
    with method.apply(model):
        assert tofu_sd.summary(model).config is not None
        for t in 2 * [*range(500, 500 - interval, -1)]:
            model(call.sample, torch.tensor(t), **call.more)
    assert count == {"deep": 2, "top": 2 * interval}
    assert tofu_sd.summary(model).config is None
    assert {name: {*vars(module)} for name, module in model.named_modules()} == before


def test_share_is_none_without_an_ideal_saving() -> None:
    contender = bench.Contender("tofu", "tofu-r50", None, seconds=[1.0, 1.1, 0.9, 1.0])
    base = {"baseline": [1.0, 1.2, 0.8, 1.0], "ideal": [1.0, 0.9, 1.1, 1.0]}
    row = contender.row(base)
    assert row["share"] is None
    assert row["speedup"]["value"] == 1
    assert contender.row({"baseline": [2.0] * 4, "ideal": [0.5] * 4})["share"]["value"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("backend", ["math", "slicing"])
def test_attention_backends_are_used(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both hold scores that the default never holds whole."""
    usual, other = (
        run(capsys, "--method", "tofu", "--scope", "attention", "--backend", b) for b in ("default", backend)
    )
    assert other[0]["backend"] == backend
    assert other[0]["scratch_bytes"] > usual[0]["scratch_bytes"] + 256 * 256 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "sd15-513"], "unknown case 'sd15-513' (did you mean 'sd15-512'?)"),
        (["--scope", "unett"], "unknown scope 'unett' (did you mean 'unet'?)"),
        (["--backend", "flush"], "unknown backend 'flush' (did you mean 'flash'?)"),
        (["--compile", "yes"], "unknown mode of torch.compile 'yes'"),
        (["--ratio", "0.8"], "ratio is 0.8; it must be a number from 0 to 0.75"),
        (["--rounds", "1"], "'1' is not an integer from 2"),
        (["--method", "tofoo"], "unknown method 'tofoo' (did you mean 'tofu'?)"),
    ],
)
def test_invalid_benchmark_options_print_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_module.main(options) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_peak_memory_counts_short_allocations() -> None:
    def run() -> None:
        for _ in range(3):
            torch.ones(2**20).add_(1)

    assert 2**22 <= contender_module.peak(run, CPU) < 2**22 + 2**16
