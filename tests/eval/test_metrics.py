"""Metrics agree with their formulas, with a second implementation where there is one, and with each other's limits."""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eval import EvalError
from eval.common import provenance
from eval.metrics import base, cache, clip, demo_classifier, dino, pairwise, statistics, summary
from eval.metrics import registry as metrics
from eval.reporting import tables

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "weights" / "squeeze.backbone.pth"
CPU = torch.device("cpu")


def have(module):
    """Imports a module that may be missing or broken: torchvision's mismatch is a RuntimeError, not an ImportError."""
    try:
        return __import__(module, fromlist=["_"])
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"{module} cannot be imported here: {error}")


def pictures(n=2, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def fid(weights):
    [metric] = metrics.build_metrics("fid", metrics.Nets(inception=weights), size=64, prompts=[], device=CPU)
    return metric


def features(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_psnr_by_hand():
    a = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    b = torch.full((1, 3, 8, 8), 120, dtype=torch.uint8)
    expected = 10 * math.log10(255**2 / 400)  # as uint8, 100 - 120 would wrap to 236
    assert pairwise.psnr().compute(a, b).item() == pytest.approx(expected, abs=1e-12)
    assert pairwise.psnr().compute(b, a).item() == pytest.approx(expected, abs=1e-12)


def test_psnr_of_equal_images_is_infinite():
    assert pairwise.psnr().compute(pictures(), pictures()).tolist() == [math.inf, math.inf]


def test_ms_ssim_is_one_on_equal_images_and_near_zero_on_noise():
    pytest.importorskip("pytorch_msssim")
    measure = pairwise.ms_ssim(176)
    a, b = pictures(size=176), pictures(size=176, seed=1)
    assert measure.compute(a, a).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert measure.compute(a, b).max() < 0.1  # with a wrong data range two noise images reach 0.9996


def test_ms_ssim_agrees_with_torchmetrics():
    pytest.importorskip("pytorch_msssim")
    other = have("torchmetrics.functional.image").multiscale_structural_similarity_index_measure
    a = pictures(size=192)
    a = nn.functional.avg_pool2d(a.float(), 5, 1, 2).byte()  # structure to lose
    b = (a.float() + 20 * features(a.numel(), 1).view(a.shape)).clamp(0, 255).byte()
    expected = torch.stack(
        [other(x[None].float(), y[None].float(), data_range=255.0) for x, y in zip(a, b, strict=True)]
    )
    # the two pad odd sizes and combine channels differently: 9e-4 was the largest difference on photographs
    assert torch.allclose(pairwise.ms_ssim(192).compute(a, b), expected.double(), atol=2e-3)


def test_ssim_agrees_with_its_formula_on_flat_images():
    """Without structure, only the luminance term is left: (2ab + c) / (a² + b² + c), c = (0.01 · 255)²."""
    pytest.importorskip("pytorch_msssim")
    a, b = (torch.full((1, 3, 16, 16), level, dtype=torch.uint8) for level in (100, 150))
    c = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c) / (100**2 + 150**2 + c)
    # float32 leaves a variance of flat images that is not quite 0
    assert pairwise.ssim(16).compute(a, b).item() == pytest.approx(expected, rel=1e-4)
    assert pairwise.ssim(16).compute(a, a).item() == pytest.approx(1, abs=1e-6)
    assert "11" in pairwise.ssim(10).reason


def test_ms_ssim_agrees_with_its_formula_on_flat_images():
    """Contrast and structure are 1 at every scale, so that the luminance of the last is left, to its weight (Wang et
    al. 2003: 0.1333)."""
    pytest.importorskip("pytorch_msssim")
    a, b = (torch.full((1, 3, 176, 176), level, dtype=torch.uint8) for level in (60, 180))
    c = (0.01 * 255) ** 2
    expected = ((2 * 60 * 180 + c) / (60**2 + 180**2 + c)) ** 0.1333
    assert pairwise.ms_ssim(176).compute(a, b).item() == pytest.approx(expected, rel=1e-3)


def lpips():
    have("lpips")
    if not WEIGHTS.exists():
        pytest.skip("no SqueezeNet weights beside the repository")
    measure = pairwise.lpips("squeeze", WEIGHTS, CPU)
    assert isinstance(measure, base.Pairwise), measure
    return measure


PAIRWISE = {
    "PSNR": pairwise.psnr, "SSIM": lambda: pairwise.ssim(176), "MS-SSIM": lambda: pairwise.ms_ssim(176),
    "PD-demo": lambda: demo_classifier.pd_demo(ToyClassifier(), CPU), "LPIPS": lpips,
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_metrics_increase_with_noise_and_are_symmetric(name):
    pytest.importorskip("pytorch_msssim")
    a = nn.functional.avg_pool2d(pictures(3, size=176).float(), 9, 1, 4).byte()
    noise = features(a.numel(), 1).view(a.shape)
    steps = [(a.float() + sigma * noise).clamp(0, 255).byte() for sigma in (5, 15, 45)]
    measure = PAIRWISE[name]()
    far = torch.stack([measure.compute(a, b) for b in steps])
    far = far if measure.lower_is_better else -far
    assert (far.diff(dim=0) > 0).all()
    assert knows_no_company(measure, a, steps[0])


def knows_no_company(measure, *of):
    """Whether an image's figure is the same alone and among others, in any order. of: what `compute` takes."""
    alone = torch.cat([measure.compute(*(each[i : i + 1] for each in of)) for i in range(len(of[0]))])
    turned = [each.flip(0) if isinstance(each, torch.Tensor) else each[::-1] for each in of]
    return torch.allclose(alone, measure.compute(*turned).flip(0), rtol=1e-5, atol=1e-6)


def test_ms_ssim_skips_too_small_images_with_a_reason():
    skipped = pairwise.ms_ssim(160)
    assert isinstance(skipped, base.Skipped)
    assert "161" in skipped.reason
    assert "160" in skipped.reason


def test_lpips_reproduces_the_documented_value():
    """torchmetrics' own documentation gives [0.1024, 0.0938] for these tensors with SqueezeNet."""
    measure = lpips()
    generator = torch.Generator().manual_seed(42)
    a, b = (torch.rand(2, 3, 100, 100, generator=generator) for _ in range(2))
    documented = torch.tensor([0.1024, 0.0938], dtype=torch.float64)
    # rounding the images to 8 bits moves the value by about 1e-4; the random backbone gives 0.1497, 0.1504
    found = measure.compute((a * 255).round().byte(), (b * 255).round().byte())
    assert torch.allclose(found, documented, atol=5e-4), found


def test_lpips_backbone_weights_are_loaded_into_matching_layers():
    net = nn.Module()
    net.slice1, net.slice2 = nn.Sequential(), nn.Sequential()
    net.slice1.add_module("0", nn.Linear(2, 2))
    net.slice2.add_module("3", nn.Linear(2, 2))
    weights = {f"features.{i}.{part}": torch.randn(2, 2) if part == "weight" else torch.randn(2)
               for i in (0, 3) for part in ("weight", "bias")}  # fmt: skip
    pairwise.load_backbone(net, weights)
    assert torch.equal(net.slice1[0].weight, weights["features.0.weight"])
    assert torch.equal(net.slice2.get_submodule("3").bias, weights["features.3.bias"])


@pytest.mark.parametrize("net", pairwise.LPIPS_NETS)
def test_lpips_uses_the_given_backbone_file(net, tmp_path):
    """torchvision's nets with random weights: into lpips's own by their names, and one after the other."""
    package, models = have("lpips"), have("torchvision.models")
    layers = {
        "alex": lambda: models.alexnet().features,
        "vgg": lambda: models.vgg.make_layers(models.vgg.cfgs["D"]),
        "squeeze": lambda: models.squeezenet1_1().features,
    }[net]()
    torch.save({f"features.{name}": weight for name, weight in layers.state_dict().items()}, tmp_path / "w.pth")
    measure = pairwise.lpips(net, tmp_path / "w.pth", CPU)
    assert isinstance(measure, base.Pairwise), measure
    theirs = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    for own, weight in zip(theirs.net.parameters(), layers.parameters(), strict=True):
        own.data = weight.data
    a, b = pictures(), pictures(seed=1)
    with torch.no_grad():
        expected = theirs(a / 127.5 - 1, b / 127.5 - 1).flatten().double()
    assert torch.allclose(measure.compute(a, b), expected, rtol=1e-4)
    assert measure.compute(a, a).tolist() == [0, 0]
    assert (measure.compute(a, b) > 0).all()


def test_a_metric_whose_weights_are_missing_is_skipped_with_the_reason(monkeypatch, tmp_path):
    have("lpips")
    skipped = pairwise.lpips("squeeze", tmp_path / "nowhere.pth", CPU)
    assert isinstance(skipped, base.Skipped)
    assert "nowhere.pth" in skipped.reason
    assert str(tmp_path) not in skipped.reason  # results carry no path of a machine


def saved(content):
    """The bytes of a file that torch reads, and that holds this."""
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK", saved([]), saved(torch.ones(2))])
def test_broken_weights_skip_only_their_metric(tmp_path, content):
    have("lpips")
    have("torchmetrics")
    (tmp_path / "w.pth").write_bytes(content)
    for metric in (pairwise.lpips("squeeze", tmp_path / "w.pth", CPU), fid(tmp_path / "w.pth")):
        assert isinstance(metric, base.Skipped), metric
        assert "weights" in metric.reason


def test_metric_that_fails_on_these_images_is_skipped_alone():
    def fails(*_):
        raise RuntimeError("Kernel size can't be greater than actual input size\nmore")

    broken = base.Pairwise("LPIPS-squeeze", "lpips", True, fails)
    skipped, kept = metrics.probe_metrics([broken, pairwise.psnr()], pictures(size=8), ["a", "b"])
    assert skipped == base.Skipped("LPIPS-squeeze", "Kernel size can't be greater than actual input size")
    assert kept.name == "PSNR"


def test_out_of_memory_does_not_skip_a_metric():
    def fails(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        metrics.probe_metrics([base.Pairwise("LPIPS-squeeze", "lpips", True, fails)], pictures(size=8), ["a", "b"])


def test_unknown_metric_suggests_the_nearest_name():
    with pytest.raises(EvalError, match=r"'lpip'.*did you mean 'lpips'"):
        metrics.parse_metric_names("psnr,lpip", metrics.Nets())
    with pytest.raises(EvalError, match=r"'alexnet'.*did you mean 'alex'"):
        metrics.parse_metric_names("all", metrics.Nets(lpips="alexnet"))


# --- sets -----------------------------------------------------------------------------------------------------------


def test_frechet_is_zero_on_equal_sets_with_fewer_images_than_features():
    x = features(20, 64)
    assert statistics.frechet(x, x) < 1e-9  # exact but for float64 rounding; a matrix square root leaves 1e-6


def test_frechet_of_a_shift_is_its_squared_length():
    x = features(50, 8)
    shift = torch.arange(8.0)
    assert statistics.frechet(x, x + shift) == pytest.approx(140.0, rel=1e-5)  # 0 + 1 + 4 + … + 49; x is float32


def test_frechet_of_a_scaling_in_closed_form():
    """Covariances S and 4 S commute: tr(S + 4 S - 2 · 2 S) = tr S."""
    x = features(50, 8).double()
    x = x - x.mean(0)
    assert statistics.frechet(x, 2 * x) == pytest.approx(x.T.cov().trace().item(), rel=1e-9)


def test_frechet_agrees_with_the_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    x, y = features(300, 16).double(), (features(300, 16, 1) * 1.3 + 0.2).double()
    root = linalg.sqrtm((x.T.cov() @ y.T.cov()).numpy()).real
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * root.trace()
    assert statistics.frechet(x, y) == pytest.approx(expected.item(), rel=1e-8)


def test_frechet_agrees_with_torchmetrics():
    fid = have("torchmetrics.image.fid").FrechetInceptionDistance

    class Passed(nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1).float()

    x, y = pictures(40, 2), pictures(40, 2, seed=1)
    theirs = fid(feature=Passed(), normalize=False)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    assert statistics.frechet(x.flatten(1), y.flatten(1)) == pytest.approx(theirs.compute().item(), rel=1e-4)


def test_frechet_agrees_with_torch_fidelity():
    fidelity = have("torch_fidelity.metric_fid")
    x, y = features(200, 32), features(200, 32, 1) * 1.2 + 0.1
    observed = fidelity.fid_statistics_to_metric(*map(fidelity.fid_features_to_statistics, (x, y)), False)
    assert statistics.frechet(x, y) == pytest.approx(observed["frechet_inception_distance"], rel=1e-6)


def test_inception_features_have_a_row_for_each_image(monkeypatch, tmp_path):
    """With random weights, as the real ones cannot be had everywhere; what is tested is how the net is called."""
    have("torchmetrics.image.fid")
    net = have("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    monkeypatch.setattr(net, "load_state_dict", lambda *_: None)
    torch.save({}, tmp_path / "w.pth")
    torch.manual_seed(0)
    metric = fid(tmp_path / "w.pth")
    assert isinstance(metric, base.DistributionMetric), metric
    found = metric.features.compute(pictures(2))
    assert (metric.name, found.shape) == ("FID", (2, 2048))
    torch.manual_seed(0)  # the same random weights
    theirs = have("torchmetrics.image.fid").FrechetInceptionDistance(feature_extractor_weights_path=tmp_path / "w.pth")
    assert torch.allclose(found, theirs.inception(pictures(2)), rtol=1e-4, atol=1e-6)  # antialiased, from 0 to 255


def test_distribution_metrics_increase_with_noise_and_ignore_order_and_batch():
    a = nn.functional.avg_pool2d(pictures(40, size=32).float(), 9, 1, 4).byte()
    noise = features(a.numel(), 1).view(a.shape)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))

    class Looking(ToyClassifier):
        """At a few pixels: noise cancels out of a mean."""

        def features(self, pictures):
            return pictures[:, :, ::8, ::8].flatten(1)

    classifier = Looking()
    for metric in (demo_classifier.fd_demo(classifier, CPU), demo_classifier.kd_demo(classifier, CPU)):
        x = metric.features.compute(a)
        far = [metric.features.compute((a + sigma * noise).clamp(0, 255).byte()) for sigma in (20, 60, 180)]
        distances = [metric.distance(x, y) for y in far]
        assert 0 < distances[0] < distances[1] < distances[2], metric.name
        assert metric.distance(x[order], far[2][order]) == pytest.approx(distances[2], rel=1e-9)
        alone = torch.cat([metric.features.compute(picture) for picture in a.split(1)])
        assert torch.allclose(alone, x, rtol=1e-6), metric.name


def test_kernel_distance_agrees_with_its_formula():
    """KID's U-statistic, term by term."""
    x, y = features(5, 3).double(), features(5, 3, 1).double()

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    terms = [
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(y[i], x[j]) for i in range(5) for j in range(5) if i != j
    ]
    assert statistics.kernel_distance(x, y) == pytest.approx(sum(terms) / 20, rel=1e-12)


def test_kernel_distance_is_zero_on_equal_sets_and_increases():
    """The estimator for independent sets gives -0.0003 for equal ones: it takes pairs for luck."""
    x = features(600, 8)  # more than one block of rows
    assert statistics.kernel_distance(x, x) == 0
    far = [statistics.kernel_distance(x, x + shift) for shift in (0.1, 0.3, 1.0)]
    assert 0 < far[0] < far[1] < far[2]
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    assert statistics.kernel_distance(x[order], x[order] + 0.3) == pytest.approx(far[1], rel=1e-9)


def test_metrics_with_the_same_features_compute_them_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(metrics, "inception", lambda *_: loaded.append(1) or base.Features("net", lambda p: p))
    fid, kid = metrics.build_metrics("fid,kid", metrics.Nets(), size=64, prompts=[], device=CPU)
    assert loaded == [1]
    assert fid.features is kid.features
    assert fid.distance is not kid.distance
    classifier = ToyClassifier()
    assert demo_classifier.fd_demo(classifier, CPU).features is demo_classifier.kd_demo(classifier, CPU).features


# --- nets of transformers ---------------------------------------------------------------------------------------------


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
        getattr(have("transformers"), name)(**settings).save_pretrained(folder)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers' image processors want torchvision: {error}")


def test_clip_score_agrees_with_clip_logits(clip_folder):
    """Its logits are the cosines by a learnt scale. (torchmetrics 1.9's CLIPScore does not run on transformers 5.)"""
    transformers = pytest.importorskip("transformers")
    metric = clip.clip(str(clip_folder), CPU)
    assert isinstance(metric, base.PerImageMetric), metric
    shown, asked = pictures(3), ["a red fox", "a blue house", "a very long prompt " * 40]
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    prepare = transformers.CLIPProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        said = model(**prepare(text=asked, images=list(shown), return_tensors="pt", padding=True, truncation=True))
    expected = 100 * said.logits_per_image.diagonal() / model.logit_scale.exp()
    assert torch.allclose(metric.compute(shown, asked), expected.clamp_min(0).double(), atol=1e-4)
    assert knows_no_company(metric, shown, asked)
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
        half.compute(pictures(1), ["a fox"])
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
    assert metric.compute(pictures(), pictures()).abs().max() < 1e-6
    prepare = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    model = transformers.Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        shown = [prepare(images=list(pictures(seed=seed)), return_tensors="pt") for seed in (0, 1)]
        one, other = (model(**pair).last_hidden_state[:, 0] for pair in shown)
    cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    assert (1 - cosine > 1e-4).all()
    assert torch.allclose(metric.compute(pictures(), pictures(seed=1)), 1 - cosine.double(), atol=1e-5)
    a = nn.functional.avg_pool2d(pictures(3, size=56).float(), 9, 1, 4).byte()
    noise = features(a.numel(), 1).view(a.shape)
    far = [metric.compute(a, (a + sigma * noise).clamp(0, 255).byte()).mean() for sigma in (5, 20, 80)]
    assert far[0] < far[1] < far[2]
    assert knows_no_company(metric, a, a.flip(0))


def test_nan_features_have_no_distance_and_are_reported():
    """Eigenvalues of NaN are an error, after everything was generated."""
    x = features(6, 3).double()
    broken = torch.where(torch.arange(6)[:, None] == 2, torch.nan, x)
    for metric in (demo_classifier.fd_demo(ToyClassifier(), CPU), demo_classifier.kd_demo(ToyClassifier(), CPU)):
        for pair in ((x, broken), (broken, x)):
            figure = summary.distance_ci(metric, *pair, ["a", "b", "c"] * 2)
            assert (figure["value"], figure["low"], figure["nan"]) == (None, None, 1)
            assert tables.short(figure, 3) == "– (1 NaN)"


def test_network_of_another_kind_is_skipped(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    save_processor("BitImageProcessor", {"size": {"shortest_edge": 28}}, tmp_path)
    found = metrics.probe_metrics([clip.clip(str(tmp_path), CPU), pairwise.psnr()], pictures(), ["a", "b"])
    assert isinstance(found[0], base.Skipped)
    assert found[1].name == "PSNR"
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    assert isinstance(dino.dino(str(tmp_path), CPU), base.Skipped)


@pytest.mark.parametrize("make", [clip.clip, dino.dino])
def test_unavailable_network_is_skipped(make, tmp_path):
    skipped = make(str(tmp_path / "nowhere"), CPU)
    assert isinstance(skipped, base.Skipped)
    assert skipped.reason.startswith("no weights")


def test_weights_hash_depends_on_the_weights():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert provenance.weights_hash(a) != provenance.weights_hash(b)
    b.load_state_dict(a.state_dict())
    assert provenance.weights_hash(a) == provenance.weights_hash(b)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_bootstrap_interval_contains_the_mean_and_is_deterministic():
    values = features(60, 1).flatten()
    groups = [str(i) for i in range(60)]
    low, high = statistics.bootstrap(values, groups)
    assert low < values.mean() < high
    assert (low, high) == statistics.bootstrap(values, groups)
    # the textbook's interval for a mean; 60 draws from a normal distribution are that near to it
    half = 1.96 * values.std().item() / math.sqrt(60)
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_bootstrap_resamples_whole_classes():
    """Twice the same image is no second observation: the interval must not shrink by the square root of two."""
    values = features(40, 1).flatten()
    once = statistics.bootstrap(values, [str(i) for i in range(40)])
    twice = statistics.bootstrap(values.repeat_interleave(2), [str(i // 2) for i in range(80)])
    assert twice == pytest.approx(once, abs=1e-12)


def test_bootstrap_does_not_depend_on_the_chunk_size(monkeypatch):
    values, groups = features(40, 1).flatten(), [str(i // 2) for i in range(40)]
    together = statistics.bootstrap(values, groups)
    monkeypatch.setattr(statistics, "AT_ONCE", 1)
    assert statistics.bootstrap(values, groups) == pytest.approx(together, abs=1e-12)


def test_bootstrap_does_not_touch_the_global_rng():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    statistics.bootstrap(torch.arange(5.0), list("abcde"))
    assert torch.equal(torch.rand(1), expected)


def test_jackknife_of_a_difference_of_means_is_the_textbook_interval():
    x = features(40, 1).double()
    y = torch.zeros_like(x)
    low, high = statistics.jackknife(lambda a, b: 9 + (a - b).mean().item(), x, y, [str(i) for i in range(40)])
    error = x.std().item() / math.sqrt(40)  # for a mean the jackknife's error is exactly this
    assert high - low == pytest.approx(2 * statistics.NORMAL_95 * error, rel=1e-9)


def test_jackknife_of_too_few_classes_is_none():
    """Of images of four, however many: a normal interval from four blocks is half as wide as it should be."""
    pair = features(12, 3), features(12, 3)
    assert statistics.jackknife(statistics.frechet, *pair, list("abcd") * 3) is None
    assert statistics.jackknife(statistics.frechet, *pair, list("abcdef") * 2) is not None


def test_interval_of_a_distance_is_clipped_to_its_minimum():
    """A kernel distance has no bias, and where there is none between the sets it is below 0 every other time; a Fréchet
    distance never is."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(40, 3, generator=generator).double() for _ in range(2))
    groups = [str(i) for i in range(40)]
    kernel = summary.distance_ci(demo_classifier.kd_demo(ToyClassifier(), CPU), x, y, groups)
    assert kernel["low"] < 0 < kernel["high"]
    assert kernel["value"] - kernel["low"] == pytest.approx(kernel["high"] - kernel["value"])
    near = summary.distance_ci(demo_classifier.fd_demo(ToyClassifier(), CPU), x, x + 1e-3 * y, groups)
    assert near["low"] == 0 < near["value"] < near["high"]


def test_image_of_one_colour_is_flat():
    shown = pictures(3)
    shown[1] = torch.tensor([200, 60, 20], dtype=torch.uint8).view(3, 1, 1)
    shown[2] = 7
    assert base.is_flat(shown).tolist() == [False, True, True]


# --- the embedded model's classifier ----------------------------------------------------------------------------------


class ToyClassifier(nn.Module):
    """Sees in an image the class whose index is the first pixel's red level."""

    def maps(self, pictures):
        return [pictures, pictures[:, :, ::2, ::2]]

    def features(self, pictures):
        return pictures.mean((2, 3))

    def classify(self, pictures):
        from tofu_sd.demo.scene_classes import CLASSES

        return torch.tensor([CLASSES[int(level)].labels for level in (pictures[:, 0, 0, 0] * 255).round()])


def test_demo_classifier_metrics_are_zero_on_equal_images():
    pair, of_sets = demo_classifier.pd_demo(ToyClassifier(), CPU), demo_classifier.fd_demo(ToyClassifier(), CPU)
    assert pair.compute(pictures(), pictures()).tolist() == [0, 0]
    assert (pair.compute(pictures(), pictures(seed=1)) > 0).all()
    assert of_sets.features.compute(pictures(3)).shape == (3, 3)
    kernel = demo_classifier.kd_demo(ToyClassifier(), CPU)
    assert kernel.distance(*[kernel.features.compute(pictures(3))] * 2) == 0
    for metric in (pair, of_sets, kernel):
        assert metric.name.endswith("-demo")
        assert "LPIPS" not in metric.name + metric.implementation
        assert "FID" not in metric.name + metric.implementation


def test_perceptual_distance_ignores_feature_norms():
    a = pictures().clamp(0, 100)
    twice = 2 * a
    assert demo_classifier.pd_demo(ToyClassifier(), CPU).compute(a, twice).max() < 1e-10


def test_class_accuracy_counts_images_with_all_labels_right():
    from tofu_sd.demo.scene_classes import CLASSES

    shown = pictures(3)
    shown[:, 0, 0, 0] = torch.tensor([5, 6, 7], dtype=torch.uint8)
    asked = [CLASSES[5].prompt, CLASSES[6].prompt, CLASSES[9].prompt]
    metric = demo_classifier.class_accuracy(ToyClassifier(), asked, CPU)
    assert metric.compute(shown, asked).tolist() == [1, 1, 0]


def test_demo_classifier_works_with_its_metrics():
    from tofu_sd.demo.classifier import DemoClassifier
    from tofu_sd.demo.scene_classes import CLASSES

    asked = [kind.prompt for kind in CLASSES[:2]]
    pair, of_sets, share = demo_classifier.demo_classifier_metrics(DemoClassifier().eval(), asked, CPU)
    assert (pair.compute(pictures(), pictures(seed=1)) > 0).all()
    assert of_sets.features.compute(pictures()).shape == (2, 144)
    assert share.compute(pictures(), asked).shape == (2,)


def test_class_accuracy_of_unknown_prompts_is_skipped():
    assert isinstance(demo_classifier.class_accuracy(ToyClassifier(), ["a red fox"], CPU), base.Skipped)


def test_metrics_disable_tf32_and_restore_it():
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before, seen = [switch.allow_tf32 for switch in switches], []

    class Looking(ToyClassifier):
        def features(self, pictures):
            seen.extend(switch.allow_tf32 for switch in switches)
            return super().features(pictures)

    try:
        for switch in switches:
            switch.allow_tf32 = True
        demo_classifier.fd_demo(Looking(), CPU).features.compute(pictures())
        assert seen == [False, False]
        assert [switch.allow_tf32 for switch in switches] == [True, True]
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was


def test_metrics_ignore_autocast():
    a, b = pictures(size=176), pictures(size=176, seed=1)
    pytest.importorskip("pytorch_msssim")
    plain = pairwise.ms_ssim(176).compute(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pairwise.ms_ssim(176).compute(a, b), plain)


# --- measured once ----------------------------------------------------------------------------------------------------


def test_metric_cache_is_invalidated_by_its_dependencies(tmp_path, monkeypatch):
    computed = []

    def figure(name, value):
        return lambda: computed.append(name) or torch.tensor([value])

    def recall(content, **values):
        return {k: v.item() for k, v in cache.cached_metrics(
            tmp_path, content, {name: figure(name, value) for name, value in values.items()}).items()}  # fmt: skip

    assert recall(["a", "b"], psnr=1.0) == {"psnr": 1}
    assert recall(["a", "b"], psnr=9.0) == {"psnr": 1}
    assert recall(["a", "b"], psnr=9.0, lpips=2.0) == {"psnr": 1, "lpips": 2}
    assert recall(["b", "a"], psnr=3.0) == {"psnr": 3}  # other images, or the same the other way round
    assert computed == ["psnr", "lpips", "psnr"]
    monkeypatch.setattr(cache, "_versions", lambda: ["another torch"])
    assert recall(["a", "b"], psnr=4.0) == {"psnr": 4}


def test_metric_cache_depends_on_the_demo_classifier_and_its_code(monkeypatch):
    cache._versions.cache_clear()
    before = cache._versions()
    for module in ("eval.metrics.cache", "tofu_sd.demo.classifier"):
        cache._versions.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module(module), "__file__", __file__)
            assert cache._versions() != before
    cache._versions.cache_clear()


@pytest.mark.parametrize(("values", "size"), [
    ([1, 0, 1, 0], 4),  # images of a class as different as those of two
    ([1, 1, 0, 0], 2),  # equal within a class
    ([1, 1, 1, 1], 2),
])  # fmt: skip
def test_effective_size_depends_on_the_variance_within_classes(values, size):
    assert statistics.effective_size(torch.tensor(values), list("aabb")) == pytest.approx(size)


@given(st.lists(st.booleans(), min_size=2, max_size=12), st.integers(1, 4))
def test_effective_size_is_between_numbers_of_classes_and_images(values, each):
    groups = [str(i // each) for i in range(len(values))]
    size = statistics.effective_size(torch.tensor(values).double(), groups)
    assert len(set(groups)) <= size <= len(values)
    if each == 1:
        assert size == len(values)


def test_corrupt_metric_cache_is_recomputed(tmp_path):
    cache.cached_metrics(tmp_path, ["a"], {"psnr": lambda: torch.tensor([1.0])})
    [file] = (tmp_path / cache.FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert cache.cached_metrics(tmp_path, ["a"], {"psnr": lambda: torch.tensor([2.0])})["psnr"].item() == 2
    assert cache.cached_metrics(tmp_path, ["a"], {"psnr": lambda: torch.tensor([3.0])})["psnr"].item() == 2
