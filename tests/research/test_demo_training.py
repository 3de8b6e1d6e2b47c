"""The renderer and the training loop behind the embedded model."""

import json
from dataclasses import replace

import pytest
import torch

import tofu_sd
from research.demo_training import fit as fit_module
from research.demo_training import recipe, stages, train
from research.demo_training.fit import Schedule, fit
from research.demo_training.recipe import Recipe
from research.demo_training.scenes import draw_scene, nearness, noise_tiles, render
from tofu_sd.demo.scene_classes import CLASSES, SHAPES
from tofu_sd.demo.tokenizer import build_tokenizer

CPU = torch.device("cpu")


def test_there_are_96_classes_with_names_of_their_own():
    assert len({c.name for c in CLASSES}) == 96
    assert len({c.labels for c in CLASSES}) == 96
    assert CLASSES[33].prompt == f"A high-quality photograph of a {CLASSES[33].name}"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_picture_depends_on_class_seed_and_size_alone(shape):
    """The judge's accuracy and the training set can be had again only if a seed always draws the same scene."""
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


def test_the_object_is_in_the_picture():
    """Same seed, same setting, another object: what differs is the object and its shadow, not the whole picture."""
    sphere, cube = (next(c for c in CLASSES if c.shape == s and c.material == "brick") for s in ("sphere", "cube"))
    differs = (render([sphere], [3], 64) - render([cube], [3], 64)).abs().amax(1) > 0.02
    assert 0.02 < differs.float().mean() < 0.6


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_near_is_where_the_picture_shows_it(shape):
    """The object is as far as it stands, the sky endlessly far, and the ground comes nearer downwards."""
    kind = next(c for c in CLASSES if c.shape == shape)
    near = nearness([kind, kind], [3, 4], 64)
    assert near.shape == (2, 1, 64, 64)
    assert torch.equal(near, torch.cat([nearness([kind], [seed], 64) for seed in (3, 4)]))
    assert (near[:, :, 0] == 0).float().mean() > 0.9  # the top row is sky, but for what stands before it
    camera = [draw_scene(kind, seed).eye.norm() for seed in (3, 4)]
    for picture, distance in zip(near[:, 0], camera, strict=True):
        assert 1 / (distance + 1.5) < picture[20:44, 20:44].max() < 1 / (distance - 1.5)  # the object, at the origin
        corner = picture[:, 0]  # ground and sky alone
        assert (corner[40:].diff() >= -1e-6).all()


def test_texture_spectra_fall_like_those_of_natural_images():
    """Power falls as f^-2.5 (amplitude ~ 1/f^1.25), natural images lying between f^-2 and f^-3 (Field 1987)."""
    power = torch.fft.fft2(noise_tiles()).abs().square().mean(0)
    f = torch.fft.fftfreq(256)
    radius = (f[:, None] ** 2 + f[None, :] ** 2).sqrt()
    low, high = (power[(radius > a) & (radius < 2 * a)].mean().log2() for a in (0.02, 0.16))
    assert ((high - low) / 3).item() == pytest.approx(-2.5, abs=0.3)  # three octaves apart


def test_each_word_of_a_prompt_is_one_token_and_any_text_can_be_read():
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


def test_training_cut_off_and_resumed_ends_bit_for_bit_where_an_uninterrupted_run_ends(tmp_path, monkeypatch):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, _ = _regression(tmp_path / "whole")
    monkeypatch.setattr("research.demo_training.fit.CHECKPOINT_SECONDS", -1)  # a checkpoint after every step
    with pytest.raises(KeyboardInterrupt):
        _regression(tmp_path / "cut", stop_at=78)
    resumed, calls = _regression(tmp_path / "cut")
    assert calls == 200 - 77
    assert torch.equal(whole.weight, resumed.weight)


SMALL = Recipe(images=1, size=192, judge=48, vae=8, low=24, high=24)
FEW = CLASSES[::6]  # 16, which is how many are rendered at a time


def test_a_whole_training_goes_on_where_it_was_cut_and_keeps_to_its_recipe(tmp_path, monkeypatch):
    """From nothing to a model that loads; what is finished is not done again, another recipe's work is not taken."""
    work, out, done = tmp_path / "work", tmp_path / "out", []
    monkeypatch.setattr(recipe, "CLASSES", FEW)
    monkeypatch.setattr(stages, "classifier_accuracy", lambda *_, **__: 1.0)
    fit = fit_module.fit

    def cut(name, *args, **kwargs):
        done.append(name)
        if done == ["judge", "vae", "low"]:
            raise KeyboardInterrupt
        return fit(name, *args, **kwargs)

    monkeypatch.setattr(stages, "fit", cut)
    with pytest.raises(KeyboardInterrupt):
        train.train(SMALL, work, out, CPU)
    assert not out.exists()
    train.train(SMALL, work, out, CPU)
    assert done == ["judge", "vae", "low", "low", "high"]
    figures = json.loads((out / "figures.json").read_text())
    assert [figures[name]["samples"] for name in ("judge", "vae", "low", "high")] == [48, 8, 24, 24]
    assert not any(str(tmp_path) in file.read_text() for file in out.rglob("*.json"))
    monkeypatch.setattr("tofu_sd.demo.WEIGHTS", out)
    pipe = tofu_sd.demo.load()
    assert pipe.unet.dtype == torch.float32
    assert len(tofu_sd.summary(tofu_sd.apply_patch(pipe)).rows) == 5
    assert tofu_sd.demo.load_classifier().classify(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match="work holds results for images 1, not 2"):
        train.train(replace(SMALL, images=2), work, out, CPU)


@pytest.mark.parametrize(
    ("change", "said"), [({"size": 128}, "size is 128; .* at least 192"), ({"low": 0}, "low is 0")]
)
def test_a_recipe_that_cannot_be_followed_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**change)


def test_the_recipe_lists_every_class_equally_often():
    kinds = Recipe(images=3).kinds()
    assert torch.tensor(kinds).bincount().tolist() == [3] * 96
