"""The demo model matches its README, and its images stay recognizable after merging."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tofu_sd
from eval.metrics.statistics import wilson
from research.demo_training.check import digests, generate, main
from research.demo_training.stages import classifier_accuracy
from tofu_sd.demo import GUIDANCE
from tofu_sd.demo.models import MODELS
from tofu_sd.demo.scene_classes import CLASSES

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
AVAILABLE = [pytest.param(model, id=model.name) for model in MODELS.values() if model.is_available]
CHECKS = {name: f"demo-{name}-check.json" for name in MODELS} | {"scenes": "demo-check.json"}  # in benchmarks/results


@pytest.fixture(scope="module")
def pipe():
    pipe = tofu_sd.demo.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_demo_pipeline_uses_stable_diffusion_classes(pipe):
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


@pytest.mark.parametrize("model", AVAILABLE)
def test_demo_weights_are_small_and_match_documented_hashes(model):
    files = [path for path in model.weights.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25 * 2**20
    page = (ROOT / "tofu_sd" / "demo" / "README.md").read_text()
    assert len(digests(model.weights)) == (5 if model.name == "sd3" else 4)  # it has a third text encoder
    for name, digest in digests(model.weights).items():
        assert f"{digest}  {name}" in page


@pytest.mark.parametrize("model", AVAILABLE)
def test_demo_check_results_belong_to_these_weights_and_pass(model):
    """Reads what `python -m research.demo_training.check --out benchmarks/results/demo-check.json` wrote."""
    figures = json.loads((ROOT / "benchmarks" / "results" / CHECKS[model.name]).read_text())
    assert figures["weights"] == digests(model.weights)
    assert (figures["n"], figures["steps"], figures["guidance"]) == (240, 20, GUIDANCE)
    assert figures["class_accuracy"] >= 0.9
    assert figures["classifier_on_fresh_renders"] >= 0.97


@pytest.mark.parametrize("model", AVAILABLE)
def test_demo_weights_load_in_transformers_4(model):
    """transformers 4 treats unknown weight names as missing and continues with random weights."""
    names = load_file(model.weights / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
    tokenizer = model.weights / "tokenizer"
    fast = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    assert json.loads((tokenizer / "vocab.json").read_text()) == fast["vocab"]
    merges = (tokenizer / "merges.txt").read_text().splitlines()[1:]
    assert [line.split(" ") for line in merges] == [list(pair) for pair in fast["merges"]]


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_first_classes_of_a_models_prompts_are_a_mixture(model):
    """The stride has no factor in common with the number of classes, and steps through the values of every label."""
    count = len(model.classes)
    order = [model.stride * i % count for i in range(count)]
    assert sorted(order) == list(range(count))
    for i, values in enumerate(model.labels.values()):
        assert {model.classes[n].labels[i] for n in order[: 2 * len(values)]} == set(range(len(values)))
    assert len(model.labels_of_prompts) == count


def test_demo_classifier_recognizes_new_renders():
    assert classifier_accuracy(tofu_sd.demo.load_classifier(), CPU, images=96, size=128) >= 0.97


def class_accuracy(images):
    classifier = tofu_sd.demo.load_classifier()
    labels = torch.tensor([CLASSES[i % 96].labels for i in range(len(images))])
    return (classifier.classify(images.float() / 255) == labels).all(1).float().mean().item()


def test_demo_images_show_the_prompted_class(pipe):
    """`python -m research.demo_training.check` classifies 240 images; 6 are enough here (90 % of 6 is 5.4)."""
    assert class_accuracy(generate(pipe, CLASSES, 6, steps=15, guidance=GUIDANCE, size=256, batch=6)) >= 0.8


def test_same_seed_generates_the_same_image_again(pipe):
    first = generate(pipe, CLASSES, 1, steps=3, guidance=3.0, size=256, batch=1)
    generate(pipe, CLASSES, 2, steps=2, guidance=3.0, size=256, batch=2)
    assert torch.equal(first, generate(pipe, CLASSES, 1, steps=3, guidance=3.0, size=256, batch=1))


def test_demo_generates_512_px(pipe):
    assert generate(pipe, CLASSES, 1, steps=1, guidance=1.0, size=512, batch=1).shape == (1, 3, 512, 512)


def test_proportional_attention_reduces_the_error_against_the_baseline(pipe):
    """`proportional` reduces the mean error of 3 images; without merging the error is zero."""
    options = {"steps": 6, "guidance": 1.0, "size": 256, "batch": 3}
    baseline = generate(pipe, CLASSES, 3, **options).double()
    error = {}
    for name in ("tome", "tome+p", "kv:tome+p"):
        with tofu_sd.patched(pipe, tofu_sd.recipes.named(name)):
            error[name] = (generate(pipe, CLASSES, 3, **options).double() - baseline).square().mean().item()
    assert 0 < error["tome+p"] < error["tome"]
    assert 0 < error["kv:tome+p"] < error["tome"]


def test_check_prints_results_with_settings_and_versions(capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    quick = ["--images", "2", "--steps", "1", "--batch", "2", "--renders", "8", "--device", "cpu"]
    main([*quick, "--sheet", str(sheet), "--out", str(tmp_path / "figures.json")])
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    assert {"class_accuracy", "interval_95", "n", "steps", "guidance", "seeds", "torch", "diffusers"} <= figures.keys()
    assert sheet.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--sheet", "no/such/sheet.png"], ["--sheet", "sheet"], ["--renders", "0"]])
def test_check_rejects_invalid_options_before_generating(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"{arguments[0]} is " in capsys.readouterr().err


def test_wilson_interval_ends_at_1_96_standard_deviations():
    """At both ends p, the proportion 9/10 is 1.96 standard deviations from p."""
    for p in wilson(9, 10):
        assert (0.9 - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / 10)
    assert wilson(9, 10)[0] < 0.9 < wilson(9, 10)[1]


def test_missing_weights_folder_raises(monkeypatch, tmp_path):
    monkeypatch.setattr("tofu_sd.demo.models.WEIGHTS", Path(tmp_path / "none"))
    for load in (tofu_sd.demo.load, tofu_sd.demo.load_classifier):
        with pytest.raises(FileNotFoundError, match=r"scenes: .*python -m research\.demo_training\.train"):
            load()


def test_missing_transformer_raises_with_the_command_that_trains_it(monkeypatch, tmp_path):
    monkeypatch.setattr("tofu_sd.demo.models.WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="--content textures --denoiser sd3"):
        tofu_sd.demo.load("sd3")


def test_unknown_embedded_model_raises_with_a_suggestion():
    for load in (tofu_sd.demo.load, tofu_sd.demo.load_classifier):
        with pytest.raises(ValueError, match=r"'texture' \(did you mean 'textures'\?\); known: scenes, textures"):
            load("texture")
