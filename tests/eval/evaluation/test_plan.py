"""Invalid requests are refused, and missing parts reported, before anything is generated."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from eval import run as run_module
from eval.common.files import read_json
from eval.evaluation import execute, plan, prepare
from eval.methods import registry as methods
from eval.metrics import registry as metrics
from eval.metrics.base import Skipped


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "tofuu"], "unknown method 'tofuu' (did you mean 'tofu'?); known: baseline, tofu, tofu-fast"),
        (["--method", "tofu,tomsd"], "'tomsd' (did you mean 'tomesd'?)"),
        (["--method", "tofu@level=2"], "'level' (did you mean 'levels'?)"),
        (["--method", ""], "unknown method ''"),
        (["--ratio", "0.9"], "ratio is 0.9; it must be a number from 0 to 0.75"),
        (["--method", "tomesd", "--ratio", "0.9"], "ratio is 0.9"),
        (["--ratio", "half"], "--ratio is 'half'"),
        (["--prompts", "demos"], "unknown prompts 'demos' (did you mean 'demo'?)"),
        (["--prompts", "nowhere.txt"], "cannot read the prompts 'nowhere.txt'"),
        (["--dtype", "float61"], "unknown dtype 'float61' (did you mean 'float16'?)"),
        (["--device", "cudo"], "unknown device 'cudo' (did you mean 'cuda'?)"),
        (["--metrics", "psn"], "unknown metric 'psn' (did you mean 'psnr'?)"),
        (["--lpips-net", "squeezenet"], "unknown LPIPS net 'squeezenet' (did you mean 'squeeze'?)"),
        (["--steps", "0"], "'0' is not an integer from 1 to"),
        (["--seed", "1" + "0" * 20], "is not an integer from 0 to"),
        (["--guidance", "nan"], "'nan' is not a finite number"),
        (["--lpips-backbone", "no/where.pth"], "no file 'where.pth' of weights"),
        (["--size", "100"], "--size is 100; it must be a multiple of 8"),
        (["--metrics", "psnr", "--lpips-net", "vgg"], "--lpips-net is for lpips, which --metrics does not include"),
        (["--metrics", "psnr", "--dino-model", "x"], "--dino-model is for dino, which --metrics does not include"),
        (["--maps", "--map-step", "2"], "--map-step is 2; there are 1 steps"),
        (
            ["--maps", "--method", "todo"],
            "--maps shows what this package's methods merge, and --method has none of them",
        ),
        (
            ["--method", "hypertile", "--size", "72"],
            "hypertile cuts maps into 2 x 2 tiles, and this size gives one of 9 x 9",
        ),
        (["--sizes", "64"], "unrecognized arguments: --sizes 64"),
    ],
)
def test_invalid_arguments_print_one_line_and_write_nothing(command, capsys, arguments, said):
    assert run_module.main([*command, *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(Path.cwd().iterdir()) == []


def test_hypertile_refuses_indivisible_sizes_also_when_stacked(command, capsys):
    pytest.importorskip("DeepCache")
    assert run_module.main([*command, "--method", "deepcache:hypertile", "--size", "72"]) == 2
    assert "this size gives one of 9 x 9 tokens" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is needed to lack it")
def test_unavailable_device_is_refused(command, capsys):
    assert run_module.main([*command, "--device", "cuda"]) == 2
    assert "'cuda' is not available here" in capsys.readouterr().err


def test_too_small_images_for_a_metric_are_reported_before_generating(command, monkeypatch, capsys):
    assert run_module.main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().err == "MS-SSIM is skipped: needs images of at least 161 px, these have 64\n"
    monkeypatch.setattr(execute, "generate", lambda *_: pytest.fail(capsys.readouterr().err))
    with pytest.raises(pytest.fail.Exception, match="MS-SSIM is skipped"):
        run_module.main(command)
    assert run_module.main([*command, "--metrics", "psnr,ssim", "--dry-run"]) == 0
    assert capsys.readouterr().err == ""


def test_missing_weights_of_a_metric_are_reported_before_generating(command, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "inception", lambda *_: "no Inception weights")
    monkeypatch.setattr(execute, "generate", lambda *_: pytest.fail(capsys.readouterr().err))
    with pytest.raises(pytest.fail.Exception, match="FID will be skipped: no Inception weights"):
        run_module.main([*command, "--metrics", "psnr,fid"])


def test_missing_weights_of_a_metric_are_looked_for_once(command, monkeypatch, capsys):
    """A failed download was announced before the first image and again after the last."""
    tried = []
    monkeypatch.setattr(metrics, "inception", lambda *_: tried.append("inception") or "no Inception weights")
    monkeypatch.setattr(metrics, "lpips", lambda *_: tried.append("lpips") or Skipped("LPIPS-alex", "no network"))
    monkeypatch.setattr(metrics, "clip", lambda *_: tried.append("clip") or Skipped("CLIP score", "no network"))
    monkeypatch.setattr(metrics, "dino", lambda *_: tried.append("dino") or Skipped("DINO", "no network"))
    arguments = ["--metrics", "psnr,fid,kid,lpips,clip,dino", "--limit", "2", "--out", "out"]
    assert run_module.main([*command, *arguments]) == 0
    assert sorted(tried) == ["clip", "dino", "inception", "lpips"]
    assert capsys.readouterr().err.count("LPIPS-alex will be skipped: no network") == 1
    found = read_json(Path("out/results.json"))["metrics"]
    skipped = {metric["name"] for metric in found if "skipped" in metric}
    assert skipped == {"FID", "KID", "LPIPS-alex", "CLIP score", "DINO"}


def test_method_that_does_not_fit_the_model_is_reported_before_generating(command, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "load_model", lambda *_: (Namespace(transformer=torch.nn.Linear(2, 2)), None))
    arguments = [argument for argument in command if argument not in ("--size", "64")]
    assert run_module.main(arguments) == 2
    assert "method 'tofu' does not fit this model" in capsys.readouterr().err


def test_torchvision_for_another_torch_is_explained(command, monkeypatch, capsys):
    def broken():
        raise ImportError("torchvision 0.28.0 does not work with torch 2.13.0+cpu")

    monkeypatch.setattr(plan, "check_torchvision", broken)
    assert run_module.main([*command]) == 2
    assert "does not work with torch" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [["--dry-run"], ["--generate-only"], []])
def test_method_that_is_not_installed_is_reported_before_generating(command, monkeypatch, capsys, stage):
    monkeypatch.setattr(methods, "version", lambda name: None)
    arguments = [*command, "--method", "tofu,tomesd", "--limit", "1", "--metrics", "psnr", *stage, "--out", "out"]
    assert run_module.main(arguments) == 0
    assert capsys.readouterr().err.splitlines()[0] == "tomesd-r50 is skipped: pip install tomesd"
    assert run_module.main([*arguments, "--strict"]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metrics-only"], "name it by --out"),
        (["--metrics-only", "--out", "nowhere"], "--out nowhere does not exist"),
        (["--metrics-only", "--out", "out", "--seed", "1"], "are not those of --prompts and --seed"),
        (["--metrics-only", "--out", "out", "--repeats", "2"], "--metrics-only generates nothing"),
        (["--metrics-only", "--out", "out", "--timed", "0"], "--metrics-only generates nothing"),
        (["--shard", "3/2"], "'3/2' is not a part such as 1/4"),
        (["--shard", "1/2", "--generate-only"], "not allowed with argument"),
        (
            ["--suite", "papper"],
            "unknown suite 'papper' (did you mean 'paper'?); known: depth, embedded, ",
        ),
        (["--reference", "nowhere"], "--reference nowhere does not exist"),
    ],
)
def test_incompatible_stage_options_are_refused(command, capsys, arguments, said):
    if "out" in arguments:
        assert run_module.main([*command, "--generate-only", "--limit", "1", "--out", "out"]) == 0
        capsys.readouterr()
    assert run_module.main([*command, *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("option", ["min_tokens", "depth_split"])
def test_auto_options_that_vary_between_runs_are_refused(command, capsys, option):
    """A clock decides the one, a measurement whose last bits are the machine's the other."""
    assert run_module.main([*command, "--method", f"deepcache:tofu@{option}=auto", "--out", "out"]) == 2
    assert f"deepcache:tofu@{option}=auto: every process measures the value of {option}=auto" in capsys.readouterr().err
    assert not Path("out").exists()


def test_too_many_steps_are_refused_before_writing(command, capsys):
    assert run_module.main([*command, "--steps", "1001", "--out", "out"]) == 2
    assert re.search(r"error: --steps is 1001: .*1000", capsys.readouterr().err)
    assert not Path("out").exists()


INVALID = """
from tofu_sd.core.matching import bipartite_soft_matching, register_matcher
from tofu_sd.core.reductions import mean, register_reduction

@register_matcher("third_a")
def third_a(tokens, grid, config):
    map = bipartite_soft_matching(tokens, grid.parts, len(grid.num_merged))
    return map._replace(group_idx=map.group_idx[:, 1:])

@register_matcher("far")
def far(tokens, grid, config):
    map = bipartite_soft_matching(tokens, grid.parts, len(grid.num_merged))
    return map._replace(kept_idx=0 * map.kept_idx + 64)

@register_matcher("late")
def late(tokens, grid, config):
    map = bipartite_soft_matching(tokens, grid.parts, len(grid.num_merged))
    return map if len(tokens) < 4 else map._replace(group_idx=map.group_idx[:, 1:])

@register_reduction
def halves(x, map):
    return mean(x, map)[:, ::2]
"""


@pytest.fixture
def user_file(command, registries):
    Path("mine.py").write_text(INVALID)
    return "mine.py"


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("third_a", "matcher third_a returned group_idx [2, 63]; it must be [2, 64]"),
        ("far", "matcher far returned kept_idx from 64 to 64; it must be from 0 to 63"),
        ("halves", "reduction halves returned [2, 16, 16]; it must be [2, 32, 16]"),
    ],
)
def test_invalid_result_of_a_users_function_is_one_line_before_generating(command, capsys, user_file, name, said, dry):
    """A wrong shape skipped merging silently, and the table showed an infinite PSNR."""
    assert run_module.main([*command, "--guidance", "3", "--method", f"tofu,{user_file}:{name}", *dry]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert [path.name for path in Path.cwd().iterdir()] == [user_file]


def test_invalid_result_that_comes_later_is_one_line(command, capsys, user_file):
    arguments = [*command, "--guidance", "3", "--method", f"{user_file}:late", "--out", "out"]
    assert run_module.main(arguments) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1] == "error: matcher late returned group_idx [4, 63]; it must be [4, 64]"
    )
    assert not list(Path("out").glob("*late*/*"))


def test_a_suite_may_say_how_images_are_timed_and_its_images_be_measured_again(command, capsys):
    """The suite's option is for generating; only one that is typed contradicts --metrics-only."""
    assert run_module.main([*command, "--suite", "embedded-short", "--metrics-only", "--out", "nowhere"]) == 2
    assert "--out nowhere does not exist" in capsys.readouterr().err
