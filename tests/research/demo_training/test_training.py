"""The renderer and the training loop behind the embedded model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import tofu_sd
from research.demo_training import fit as fit_module
from research.demo_training import recipe, stages, train
from research.demo_training.denoisers.base import Denoiser
from research.demo_training.fit import Schedule, fit
from research.demo_training.recipe import Recipe
from research.demo_training.renders.scene_materials import noise_tiles
from research.demo_training.renders.scenes import draw_scene, nearness, render
from tofu_sd.demo.models import MODELS, SCENES
from tofu_sd.demo.scene_classes import CLASSES, SHAPES
from tofu_sd.demo.tokenizer import build_tokenizer

CPU = torch.device("cpu")


def test_96_classes_have_unique_names():
    assert len({c.name for c in CLASSES}) == 96
    assert len({c.labels for c in CLASSES}) == 96
    assert CLASSES[33].prompt == f"A high-quality photograph of a {CLASSES[33].name}"


@pytest.mark.parametrize("shape", SHAPES)
def test_image_depends_only_on_class_seed_and_size(shape):
    """The classifier's accuracy and the training set are reproducible only if a seed always renders the same scene."""
    kinds = [c for c in CLASSES if c.shape == shape][:3]
    state = torch.get_rng_state()
    together = render(kinds, [5, 6, 7], size=48)
    assert torch.equal(torch.get_rng_state(), state)
    assert together.shape == (3, 3, 48, 48)
    assert together.isfinite().all()
    assert 0 <= together.min() < together.max() <= 1
    # vector units may round a longer batch differently in the last place; one grey level is 4e-3
    assert torch.allclose(render(kinds[1:2], [6], size=48)[0], together[1], atol=1e-3)
    assert (render(kinds[1:2], [7], size=48)[0] - together[1]).abs().mean() > 0.02  # another seed, another scene


def test_image_shows_the_object():
    """With the same seed and another object, only the object and its shadow differ."""
    sphere, cube = (next(c for c in CLASSES if c.shape == s and c.material == "brick") for s in ("sphere", "cube"))
    differs = (render([sphere], [3], 64) - render([cube], [3], 64)).abs().amax(1) > 0.02
    assert 0.02 < differs.float().mean() < 0.6


@pytest.mark.parametrize("shape", SHAPES)
def test_nearness_map_matches_the_image(shape):
    """The object has its distance, the sky is infinitely far, and the ground gets nearer downwards."""
    kind = next(c for c in CLASSES if c.shape == shape)
    near = nearness([kind, kind], [3, 4], 64)
    assert near.shape == (2, 1, 64, 64)
    assert torch.equal(near, torch.cat([nearness([kind], [seed], 64) for seed in (3, 4)]))
    assert (near[:, :, 0] == 0).float().mean() > 0.9  # the top row is sky, except for objects in front of it
    camera = [draw_scene(kind, seed).eye.norm() for seed in (3, 4)]
    for image, distance in zip(near[:, 0], camera, strict=True):
        assert 1 / (distance + 1.5) < image[20:44, 20:44].max() < 1 / (distance - 1.5)  # the object, at the origin
        corner = image[:, 0]  # only ground and sky
        assert (corner[40:].diff() >= -1e-6).all()


def test_texture_spectra_fall_like_those_of_natural_images():
    """Power falls as f^-2.5 (amplitude ~ 1/f^1.25); natural images lie between f^-2 and f^-3 (Field 1987)."""
    power = torch.fft.fft2(noise_tiles()).abs().square().mean(0)
    f = torch.fft.fftfreq(256)
    radius = (f[:, None] ** 2 + f[None, :] ** 2).sqrt()
    low, high = (power[(radius > a) & (radius < 2 * a)].mean().log2() for a in (0.02, 0.16))
    assert ((high - low) / 3).item() == pytest.approx(-2.5, abs=0.3)  # three octaves apart


def test_tokenizer_has_one_token_per_prompt_word_and_reads_any_text():
    tokenizer = build_tokenizer(c.prompt for c in CLASSES)
    for c in CLASSES:
        words = c.prompt.lower().replace("-", " - ").split()
        assert tokenizer.tokenize(c.prompt) == [word + "</w>" for word in words]
    ids = tokenizer("Zürich, 3 o'clock: ein Fuchs!").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]


def _regression(work, stop_at=None):
    torch.manual_seed(0)
    model, calls = torch.nn.Linear(4, 1), 0
    target = torch.tensor([[1.0, -2.0, 0.5, 3.0]])

    def loss(g):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=g)
        return (model(x) - x @ target.T).square().mean()

    fit("line", model, loss, Schedule(samples=8 * 200, batch=8, rate=0.05, seed=1, horizon=20), work)
    return model, calls


def test_resumed_training_is_bit_equal_to_an_uninterrupted_one(tmp_path, monkeypatch):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, _ = _regression(tmp_path / "whole")
    monkeypatch.setattr("research.demo_training.fit.CHECKPOINT_SECONDS", -1)  # a checkpoint after every step
    with pytest.raises(KeyboardInterrupt):
        _regression(tmp_path / "cut", stop_at=78)
    resumed, calls = _regression(tmp_path / "cut")
    assert calls == 200 - 77
    assert torch.equal(whole.weight, resumed.weight)


def test_diverged_training_stops_and_keeps_its_last_checkpoint(tmp_path, monkeypatch):
    """The checkpoint has the weights before the step, so that a training with another rate may start from it."""
    monkeypatch.setattr("research.demo_training.fit.CHECKPOINT_SECONDS", -1)
    model = torch.nn.Linear(2, 1)
    values = iter([1.0, 1.0, float("nan")])
    with pytest.raises(FloatingPointError, match="line diverged: the loss is nan at step 2; lower its rate"):
        fit("line", model, lambda _: model.weight.sum() * next(values), Schedule(80, 8, 0.1, 0), tmp_path)
    state = torch.load(tmp_path / "line.ckpt", weights_only=True)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("name", ["scenes", "textures"])
def test_recipe_is_that_of_the_shipped_weights(name):
    """The README's command trains an embedded model again without further options."""
    trained = json.loads((MODELS[name].weights / "figures.json").read_text())["recipe"]
    assert Recipe(**trained) == recipe.RECIPES[name]


SMALL = Recipe(images=1, size=192, classifier=48, vae=8, low=24, high=24)
FEW = CLASSES[::6]  # 16, the number that is rendered at a time


def test_interrupted_training_resumes_and_keeps_its_recipe(tmp_path, monkeypatch):
    """From random weights to a model that loads. Finished stages are kept; another recipe's work is rejected."""
    work, out, done = tmp_path / "work", tmp_path / "scenes", []
    few = replace(recipe.CONTENTS["scenes"], model=replace(SCENES, classes=FEW))
    monkeypatch.setitem(recipe.CONTENTS, "scenes", few)
    monkeypatch.setattr(stages, "classifier_accuracy", lambda *_, **__: 1.0)
    fit = fit_module.fit

    def cut(name, *args, **kwargs):
        done.append(name)
        if done == ["classifier", "vae", "low"]:
            raise KeyboardInterrupt
        return fit(name, *args, **kwargs)

    monkeypatch.setattr(stages, "fit", cut)
    with pytest.raises(KeyboardInterrupt):
        train.train(SMALL, work, out, CPU)
    assert not out.exists()
    train.train(SMALL, work, out, CPU)
    assert done == ["classifier", "vae", "low", "low", "high"]
    figures = json.loads((out / "figures.json").read_text())
    assert [figures[name]["samples"] for name in ("classifier", "vae", "low", "high")] == [48, 8, 24, 24]
    assert not any(str(tmp_path) in file.read_text() for file in out.rglob("*.json"))
    monkeypatch.setattr("tofu_sd.demo.models.WEIGHTS", tmp_path)
    pipe = tofu_sd.demo.load()
    assert pipe.unet.dtype == torch.float32
    assert len(tofu_sd.summary(tofu_sd.apply_patch(pipe)).rows) == 5
    assert tofu_sd.demo.load_classifier().classify(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match="work holds results for images 1, not 2"):
        train.train(replace(SMALL, images=2), work, out, CPU)
    with pytest.raises(ValueError, match="work holds results for low 24, not 48"):
        train.train(replace(SMALL, low=48), work, out, CPU)


class ClassDenoiser(Denoiser):
    """Accepts latents whose values are the class of their image, and the texts of that class only."""

    def __init__(self, content):
        super().__init__(content)
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def loss(self, clean, text, g):
        self.seen.append(clean.shape[-1])
        for kind, row in zip(clean[:, 0, 0, 0].int().tolist(), text.tolist(), strict=True):
            assert self.texts[row] in (FEW[kind].prompt, FEW[kind].name, "")
        return self.weight * 0

    def pipeline(self, vae):
        pytest.fail("nothing is exported here")


def test_a_stage_of_two_sizes_trains_on_a_batch_of_each_in_every_step(tmp_path, monkeypatch):
    """Weights that last saw large latents alone forget the smaller ones. Captions are those of the rows' classes."""
    content = replace(recipe.CONTENTS["scenes"], model=replace(SCENES, classes=FEW))
    monkeypatch.setitem(recipe.CONTENTS, "scenes", content)
    for size, images in ((4, 3), (2, 5)):  # mirror images are the second half
        kinds = np.repeat(np.arange(len(FEW)), images)
        latents = np.zeros((2 * len(kinds), 4, size, size), np.float16) + np.r_[kinds, kinds][:, None, None, None]
        np.save(tmp_path / f"latents-{size}.npy", latents)
    model = ClassDenoiser(content)
    figures = stages.train_denoiser("large", model, SMALL, tmp_path, CPU, sizes=(4, 2), samples=48, rate=1e-4)
    assert model.seen == [4, 2, 4, 2]
    assert figures["samples"] == 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 128}, "size is 128; .* at least 192"),
        ({"low": 0}, "low is 0"),
        ({"denoiser": "flux", "size": 208}, "size is 208; flux packs .* multiple of 32"),
        ({"denoiser": "sd3", "large": 8}, "largest images have 512 pixels; sd3 has positions for at most 384"),
        ({"denoiser": "dit"}, "denoiser is 'dit'; it must be one of unet, sd3, flux"),
    ],
)
def test_invalid_recipe_raises(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_recipe_has_every_class_equally_often():
    kinds = Recipe(images=3).kinds()
    assert torch.tensor(kinds).bincount().tolist() == [3] * 96
