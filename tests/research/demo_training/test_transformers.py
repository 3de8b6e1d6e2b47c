"""The training of the embedded diffusion transformers."""

import json
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch

import tofu_sd
from research.demo_training import fit as fit_module
from research.demo_training import recipe, stages, train
from research.demo_training.denoisers import DENOISERS, flow, flux, sd3
from research.demo_training.denoisers.t5 import build_t5_tokenizer
from research.demo_training.recipe import RECIPES
from tofu_sd.demo.models import MODELS, TEXTURES
from tofu_sd.demo.pipelines import TEXT_LENGTHS

CPU = torch.device("cpu")
CLASSES = TEXTURES.classes[::19]
CONTENT = replace(recipe.CONTENTS["textures"], model=replace(TEXTURES, classes=CLASSES))
NAMES = ("sd3", "flux")


def from_config(kind, config):
    transformer = kind.from_config(config)
    flow.zero_modulation(transformer)
    return transformer


@pytest.fixture
def small(monkeypatch):
    """Transformers of one block of each kind and one head, so that a step takes milliseconds."""
    one = {"num_layers": 1, "num_attention_heads": 1}
    for module, build, change in (
        (sd3, "build_sd3_transformer", {"caption_projection_dim": 64}),
        (flux, "build_flux_transformer", {"num_single_layers": 1}),
    ):
        transformer = getattr(module, build)()
        config = {**transformer.config, **one, **change}

        monkeypatch.setattr(module, build, partial(from_config, type(transformer), config))
    monkeypatch.setitem(recipe.CONTENTS, "textures", CONTENT)


@pytest.fixture(scope="module")
def vae():
    return tofu_sd.demo.load("textures").vae


def random_weights(model):
    """Gives the weights that start at 0 random values; otherwise nothing depends on the input."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_transformer_has_6_to_8_million_parameters_and_weights_of_at_most_16_mb(name):
    with torch.device("meta"):
        transformer = {"sd3": sd3.build_sd3_transformer, "flux": flux.build_flux_transformer}[name]()
    assert 6e6 <= sum(p.numel() for p in transformer.parameters()) <= 8e6
    assert 2 * sum(value.numel() for value in transformer.state_dict().values()) <= 16 * 2**20  # float16


@pytest.mark.parametrize("name", NAMES)
def test_conditioning_is_that_of_the_pipeline(name, small, vae):
    """Weights trained on other text states than the pipeline's would be useless in it."""
    model = DENOISERS[name](CONTENT).eval()
    pipe, text = model.pipeline(vae), torch.tensor([3, 4, len(model.texts) - 1, 3])  # a prompt, a name, no prompt
    prompts = [model.texts[i] for i in text]
    arguments = (prompts, prompts, prompts) if name == "sd3" else (prompts, prompts)
    options = {"do_classifier_free_guidance": False} if name == "sd3" else {}
    for length in (TEXT_LENGTHS[model.pipeline_name], model.default_length):
        with torch.no_grad():
            states, pooled = model.encode(text, length)
            encoded = [
                e for e in pipe.encode_prompt(*arguments, max_sequence_length=length, **options) if e is not None
            ]
        assert torch.allclose(states, encoded[0], atol=1e-5)
        assert torch.allclose(pooled, encoded[1], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_of_the_pipeline_applies_the_trained_velocity(name, small, vae):
    """An Euler step from pure noise subtracts the velocity: its timestep, positions and packing are the training's."""
    model = random_weights(DENOISERS[name](CONTENT).eval())
    pipe = model.pipeline(vae)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 6, 8)
    latents = noise if name == "sd3" else pipe._pack_latents(noise, 1, 4, 6, 8)
    options = tofu_sd.demo.call_options(pipe, 1, guidance=1.0)
    image = pipe(
        model.texts[2], latents=latents, num_inference_steps=1, height=48, width=64, output_type="latent", **options
    ).images
    if name == "flux":
        image = pipe._unpack_latents(image, 48, 64, 8)
    with torch.no_grad():
        velocity = model(noise, torch.ones(1), torch.tensor([2]), TEXT_LENGTHS[model.pipeline_name])
    assert velocity.std() > 0.1
    assert torch.allclose(image, noise - velocity, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_untrained_transformer_predicts_zero(name, small):
    """adaLN-Zero; the loss then starts at the variance of noise plus that of the images."""
    model = DENOISERS[name](CONTENT)
    with torch.no_grad():
        velocity = model(torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 1]), 16)
    assert velocity.shape == (2, 4, 4, 4)
    assert (velocity == 0).all()


def test_t5_tokenizer_has_one_token_per_prompt_word_and_reads_any_text():
    tokenizer = build_t5_tokenizer(c.prompt for c in CLASSES)
    for c in CLASSES:
        assert tokenizer.tokenize(c.prompt) == [f"▁{word}" for word in c.prompt.split()]
    assert tokenizer.unk_token_id not in tokenizer("A zebra, 3 o'clock!").input_ids
    assert tokenizer("", padding="max_length", max_length=3).input_ids == [1, 0, 0]  # end, padding, as in T5


def test_noise_levels_cover_pure_noise_and_move_towards_it_for_large_latents():
    def levels(shift):
        g = torch.Generator().manual_seed(0)
        return torch.cat([flow.noise_levels(24, shift, g) for _ in range(500)])

    plain, shifted = levels(1.0), levels(2.0)
    assert (plain.min(), plain.max()) > (0, 0)
    assert plain.max() < 1
    assert plain.median().item() == pytest.approx(0.5, abs=0.01)
    assert shifted.median().item() == pytest.approx(2 / 3, abs=0.01)  # shift / (1 + shift)
    # a normal variable's logistic is above 0.98 in 5e-5 of all cases; a tenth of all samples are uniform
    assert (plain > 0.98).float().mean().item() == pytest.approx(0.1 * 0.02, abs=0.001)


def write_latents(work, sizes, images=2):
    """Latents with a constant colour for each class, which are easy to learn."""
    g = torch.Generator().manual_seed(0)
    colours = torch.randn(len(CLASSES), 4, 1, 1, generator=g).repeat_interleave(images, 0).repeat(2, 1, 1, 1)
    for size in sizes:
        np.save(work / f"latents-{size}.npy", colours.expand(-1, -1, size, size).half().numpy())


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_training_reduces_the_loss_and_ends_with_the_same_weights(name, small, tmp_path, monkeypatch):
    """Bit for bit: batches, noise and text lengths depend on the step alone, and no layer drops units."""
    monkeypatch.setattr(flow, "LONG", 0.1)
    run = RECIPES[name]

    def trained(folder, stop_at=None):
        folder.mkdir(exist_ok=True)
        write_latents(folder, (4,))
        torch.manual_seed(0)
        model, calls = DENOISERS[name](CONTENT), 0
        loss = model.loss

        def counted(*args):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            return loss(*args)

        model.loss = counted
        figures = stages.train_denoiser("low", model, run, folder, CPU, sizes=(4,), samples=24 * 20, rate=1e-2)
        return model, calls, figures["loss"]

    whole, _, loss = trained(tmp_path / "whole")
    assert loss < 1.7  # mean of all steps; the first has the variance of noise and images, 2
    monkeypatch.setattr(fit_module, "CHECKPOINT_SECONDS", -1)  # a checkpoint after every step
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", stop_at=10)
    resumed, calls, _ = trained(tmp_path / "cut")
    assert calls == 20 - 9
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_training_uses_the_results_of_a_folder_and_exports_a_pipeline(name, small, tmp_path, monkeypatch):
    """Latents and autoencoder of a UNet's folder serve a transformer, without the UNet's other results."""
    work, weights = tmp_path / "work", tmp_path / "weights"
    work.mkdir()
    weights.mkdir()
    unet = replace(RECIPES["textures"], images=2, size=192)
    (work / "figures.json").write_text(json.dumps({"recipe": asdict(unet), "low": {"loss": 0.1}}))
    write_latents(work, (12, 24, 48))
    monkeypatch.setattr(train, "make_renders", None)  # would fail
    run = replace(RECIPES[name], images=2, size=192, low=24, high=24, large=24 if name == "flux" else 0)
    train.train(run, work, weights / name, CPU)
    assert json.loads((work / "figures.json").read_text())["low"] == {"loss": 0.1}
    figures = json.loads((weights / name / "figures.json").read_text())
    assert figures["recipe"] == asdict(run)
    assert figures["high"]["samples"] == 24
    assert ("large" in figures) == (name == "flux")
    assert not any(str(tmp_path) in file.read_text() for file in weights.rglob("*.json"))

    t5 = "tokenizer_3" if name == "sd3" else "tokenizer_2"
    assert json.loads((weights / name / "model_index.json").read_text())[t5] == ["transformers", "T5TokenizerFast"]
    assert "extra_special_tokens" not in json.loads((weights / name / t5 / "tokenizer_config.json").read_text())

    monkeypatch.setattr("tofu_sd.demo.models.WEIGHTS", weights)
    pipe = tofu_sd.demo.load(name)
    assert type(pipe).__name__ == DENOISERS[name].pipeline_name
    assert pipe.transformer.dtype == torch.float32
    assert pipe.default_sample_size * pipe.vae_scale_factor == tofu_sd.demo.NATIVE_SIZE
    options = tofu_sd.demo.call_options(pipe, 2)
    images = pipe([CLASSES[0].prompt, "zebra"], num_inference_steps=1, height=64, width=64, **options).images
    assert [image.size for image in images] == [(64, 64)] * 2

    with pytest.raises(ValueError, match="work holds results for images 2, not 3"):
        train.train(replace(run, images=3), work, weights / name, CPU)
    with pytest.raises(ValueError, match="work holds results for low 24, not 48"):
        train.train(replace(run, low=48), work, weights / name, CPU)


def test_transformer_in_an_empty_folder_takes_the_autoencoder_of_its_content(small, tmp_path, monkeypatch):
    run = replace(RECIPES["sd3"], images=1, size=192, low=24, high=24)
    monkeypatch.setattr(train, "train_denoiser", lambda *_, **__: {})
    train.train(run, tmp_path / "work", tmp_path / "sd3", CPU)
    assert np.load(tmp_path / "work" / "latents-24.npy").shape == (2 * len(CLASSES), 4, 24, 24)
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "sd3" / name).read_bytes() == (TEXTURES.weights / name).read_bytes()
    with pytest.raises(
        ValueError, match="vae is 8; sd3 uses the autoencoder of textures, which was trained with 64000"
    ):
        train.train(replace(run, vae=8), tmp_path / "other", tmp_path / "sd3", CPU)


def test_command_rejects_a_model_that_is_not_embedded(capsys):
    with pytest.raises(SystemExit):
        train.main(["--denoiser", "sd3"])
    assert (
        "no embedded model is scenes with sd3; known: scenes with unet, textures with unet" in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_and_embedded_models_have_the_same_parts(name):
    assert (RECIPES[name].content, RECIPES[name].denoiser) == (MODELS[name].content, MODELS[name].denoiser)
