"""The embedded model: it is what the README says it is, and fusing its tokens leaves its pictures recognisable."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tofu_sd
from eval.metrics.statistics import wilson
from research.demo_training.check import digests, generate, main
from research.demo_training.stages import classifier_accuracy
from tofu_sd.demo import GUIDANCE, WEIGHTS
from tofu_sd.demo.scene_classes import CLASSES

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pipe():
    pipe = tofu_sd.demo.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_made_of_stable_diffusions_own_classes(pipe):
    parts = {name: type(part).__name__ for name, part in pipe.components.items() if part is not None}
    assert parts == {
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "scheduler": "DDIMScheduler",
    }
    assert pipe.vae_scale_factor == 8
    summary = tofu_sd.summary(pipe)
    assert summary.latent == (32, 32)
    assert summary.blocks == 11


def test_it_stays_small_and_its_weights_are_the_documented_ones():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25 * 2**20
    page = (WEIGHTS.parent / "README.md").read_text()
    assert len(digests()) == 4
    for name, digest in digests().items():
        assert f"{digest}  {name}" in page


def test_its_figures_are_those_of_these_weights_and_good_enough():
    """What `python -m research.demo_training.check --out benchmarks/results/demo-check.json` wrote, in some minutes."""
    figures = json.loads((ROOT / "benchmarks" / "results" / "demo-check.json").read_text())
    assert figures["weights"] == digests()
    assert (figures["n"], figures["steps"], figures["guidance"]) == (240, 20, GUIDANCE)
    assert figures["as_asked"] >= 0.9
    assert figures["judge_on_fresh_renders"] >= 0.97


def test_transformers_4_can_read_it_too():
    """It takes names of weights that it does not know for missing ones, and goes on with random weights."""
    names = load_file(WEIGHTS / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    tokenizer = WEIGHTS / "tokenizer"
    fast = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    assert json.loads((tokenizer / "vocab.json").read_text()) == fast["vocab"]
    merges = (tokenizer / "merges.txt").read_text().splitlines()[1:]
    assert [line.split(" ") for line in merges] == [list(pair) for pair in fast["merges"]]


def test_the_judge_knows_fresh_renders():
    assert classifier_accuracy(tofu_sd.demo.load_classifier(), CPU, images=96, size=128) >= 0.97


def judged(pictures):
    judge = tofu_sd.demo.load_classifier()
    asked = torch.tensor([CLASSES[i % 96].labels for i in range(len(pictures))])
    return (judge.classify(pictures.float() / 255) == asked).all(1).float().mean().item()


def test_it_draws_what_is_asked_for(pipe):
    """`python -m research.demo_training.check` judges 240 images; 6 of them here, of which 90 % would be 5.4."""
    assert judged(generate(pipe, 6, steps=15, guidance=GUIDANCE, size=256, batch=6)) >= 0.8


def test_the_same_seed_draws_the_same_picture_after_another_one(pipe):
    first = generate(pipe, 1, steps=3, guidance=3.0, size=256, batch=1)
    generate(pipe, 2, steps=2, guidance=3.0, size=256, batch=2)
    assert torch.equal(first, generate(pipe, 1, steps=3, guidance=3.0, size=256, batch=1))


def test_it_draws_512_pixels(pipe):
    assert generate(pipe, 1, steps=1, guidance=1.0, size=512, batch=1).shape == (1, 3, 512, 512)


def test_weighting_fused_tokens_by_size_brings_the_picture_nearer(pipe):
    """The law behind `proportional`: on 3 pictures the mean error falls; without fusion there is none."""
    options = {"steps": 6, "guidance": 1.0, "size": 256, "batch": 3}
    full = generate(pipe, 3, **options).double()
    error = {}
    for name in ("tome", "tome+p", "kv:tome+p"):
        with tofu_sd.patched(pipe, tofu_sd.recipes.named(name)):
            error[name] = (generate(pipe, 3, **options).double() - full).square().mean().item()
    assert 0 < error["tome+p"] < error["tome"]
    assert 0 < error["kv:tome+p"] < error["tome"]


def test_the_check_prints_its_figures_with_their_circumstances(capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    quick = ["--images", "2", "--steps", "1", "--batch", "2", "--renders", "8", "--device", "cpu"]
    main([*quick, "--sheet", str(sheet), "--out", str(tmp_path / "figures.json")])
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    assert {"as_asked", "interval_95", "n", "steps", "guidance", "seeds", "torch", "diffusers"} <= figures.keys()
    assert sheet.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--sheet", "no/such/sheet.png"], ["--sheet", "sheet"], ["--renders", "0"]])
def test_the_check_refuses_before_it_draws(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"{arguments[0]} is " in capsys.readouterr().err


def test_wilsons_interval_ends_where_the_share_is_just_possible():
    """Its ends are the shares p at which 9 of 10 lies 1.96 standard deviations off."""
    for p in wilson(9, 10):
        assert (0.9 - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / 10)
    assert wilson(9, 10)[0] < 0.9 < wilson(9, 10)[1]


def test_a_missing_weights_folder_is_not_silent(monkeypatch, tmp_path):
    monkeypatch.setattr("tofu_sd.demo.WEIGHTS", Path(tmp_path / "none"))
    for missing in (tofu_sd.demo.load, tofu_sd.demo.load_classifier):
        with pytest.raises(FileNotFoundError, match=r"none: .*python -m research\.demo_training\.train"):
            missing()
