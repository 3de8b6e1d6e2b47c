"""CLIP score and DINO distance agree with the networks of transformers."""

from __future__ import annotations

import io

import pytest
import tiny
import torch
from metric_inputs import import_or_skip, is_independent_of_other_images, random_features, random_images
from torch import nn

from eval.metrics import base, clip, dino, pairwise
from eval.metrics import registry as metrics

CPU = torch.device("cpu")


def saved(content):
    """The bytes of a file that torch reads, and that holds this."""
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.fixture
def clip_folder(tmp_path):
    """A tiny CLIP with random weights, saved as the real ones are; torchmetrics looks for 'openai' in its name."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words, folder = tiny.tokenizer(), tmp_path / "openai-tiny"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = transformers.CLIPConfig(
        text_config={**shape, **text}, vision_config={**shape, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    save_processor("CLIPImageProcessor", crop, folder)
    return folder


def save_processor(name, settings, folder):
    try:
        getattr(import_or_skip("transformers"), name)(**settings).save_pretrained(folder)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers' image processors want torchvision: {error}")


def test_clip_score_agrees_with_clip_logits(clip_folder):
    """Its logits are the cosines by a learnt scale. (torchmetrics 1.9's CLIPScore does not run on transformers 5.)"""
    transformers = pytest.importorskip("transformers")
    metric = clip.clip(str(clip_folder), CPU)
    assert isinstance(metric, base.PerImageMetric), metric
    shown, asked = random_images(3), ["a red fox", "a blue house", "a very long prompt " * 40]
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    prepare = transformers.CLIPProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        said = model(**prepare(text=asked, images=list(shown), return_tensors="pt", padding=True, truncation=True))
    expected = 100 * said.logits_per_image.diagonal() / model.logit_scale.exp()
    assert torch.allclose(metric.compute(shown, asked), expected.clamp_min(0).double(), atol=1e-4)
    assert is_independent_of_other_images(metric, shown, asked)
    assert metric.implementation.startswith(f"transformers {transformers.__version__}, {clip_folder.name}, weights ")


def test_a_net_saved_in_half_precision_measures_in_float32(clip_folder):
    """Newer versions of transformers would take the type it was saved in."""
    transformers = pytest.importorskip("transformers")
    saved = clip.clip(str(clip_folder), CPU)
    transformers.CLIPModel.from_pretrained(clip_folder).half().save_pretrained(clip_folder)
    half = clip.clip(str(clip_folder), CPU)
    assert isinstance(half, base.PerImageMetric), half
    seen = []
    torch.nn.modules.module.register_module_forward_hook(lambda module, _, out: seen.append(out))
    try:
        half.compute(random_images(1), ["a fox"])
    finally:
        torch.nn.modules.module._global_forward_hooks.popitem()
    assert {out.dtype for out in seen if isinstance(out, torch.Tensor)} == {torch.float32}
    assert half.implementation != saved.implementation  # other weights


def test_dino_distance_is_one_minus_the_cosine_of_class_tokens_and_rises_with_noise(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    torch.manual_seed(0)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    crop = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    save_processor("BitImageProcessor", crop, tmp_path)
    metric = dino.dino(str(tmp_path), CPU)
    assert isinstance(metric, base.Pairwise), metric
    assert metric.compute(random_images(), random_images()).abs().max() < 1e-6
    prepare = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    model = transformers.Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        shown = [prepare(images=list(random_images(seed=seed)), return_tensors="pt") for seed in (0, 1)]
        one, other = (model(**pair).last_hidden_state[:, 0] for pair in shown)
    cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    assert (1 - cosine > 1e-4).all()
    assert torch.allclose(metric.compute(random_images(), random_images(seed=1)), 1 - cosine.double(), atol=1e-5)
    a = nn.functional.avg_pool2d(random_images(3, size=56).float(), 9, 1, 4).byte()
    noise = random_features(a.numel(), 1).view(a.shape)
    far = [metric.compute(a, (a + sigma * noise).clamp(0, 255).byte()).mean() for sigma in (5, 20, 80)]
    assert far[0] < far[1] < far[2]
    assert is_independent_of_other_images(metric, a, a.flip(0))


def test_network_of_another_kind_is_skipped(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    save_processor("BitImageProcessor", {"size": {"shortest_edge": 28}}, tmp_path)
    found = metrics.probe_metrics([clip.clip(str(tmp_path), CPU), pairwise.psnr()], random_images(), ["a", "b"])
    assert isinstance(found[0], base.Skipped)
    assert found[1].name == "PSNR"
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    assert isinstance(dino.dino(str(tmp_path), CPU), base.Skipped)


@pytest.mark.parametrize("make", [clip.clip, dino.dino])
def test_unavailable_network_is_skipped(make, tmp_path):
    skipped = make(str(tmp_path / "nowhere"), CPU)
    assert isinstance(skipped, base.Skipped)
    assert skipped.reason.startswith("no weights")
