"""Images depend on the request and the method alone, are made once, and are whole or not there."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny import sd15_pipe
from tokenizers import Tokenizer

from eval.common import files, provenance
from eval.images import generate, timing
from eval.images import settings as settings_module
from eval.images.requests import Request
from eval.methods import registry as methods
from eval.methods.method import BASELINE, OTHER_SEEDS, SEED_SHIFT
from tofu_sd.demo.models import FLUX

SETTINGS = generate.Settings("tiny", "p", "own.txt", "h", 0, 64, 2, None, 2, "cpu", "float32", "a", "t", "d", "tf")
REQUESTS = [Request(f"{i:04d}", prompt, 10 + i) for i, prompt in enumerate(["a red fox", "a bee", "an old oak"])]
(TOFU,) = methods.parse("tofu", [0.5])


@pytest.fixture
def calls(monkeypatch):
    """The prompts and number of steps of every call of a pipeline."""
    seen = []
    original = StableDiffusionPipeline.__call__

    def counting(self, prompt, num_inference_steps, **options):
        seen.append((tuple(prompt), num_inference_steps))
        return original(self, prompt=prompt, num_inference_steps=num_inference_steps, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counting)
    return seen


def run(pipe, out, chosen=(BASELINE, TOFU), settings=SETTINGS, requests=REQUESTS, **options):
    return generate.generate(pipe, requests, list(chosen), settings, out, **options)


def pixels(out, key="baseline"):
    return np.stack([np.asarray(Image.open(out / key / f"{r.id}.png")).astype(int) for r in REQUESTS])


def lose(record, name):
    files.write_json(record, {key: value for key, value in files.read_json(record).items() if key != name})


def test_existing_images_are_not_generated_again(pipe, tmp_path, calls):
    assert run(pipe, tmp_path) == 6
    before = pixels(tmp_path)
    calls.clear()
    assert run(pipe, tmp_path) == 0
    assert calls == []
    assert (pixels(tmp_path) == before).all()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "0002.png").unlink(),
        lambda folder: (folder / "0002.json").unlink(),
        lambda folder: (folder / "0002.png").write_bytes((folder / "0002.png").read_bytes()[:100]),
        lambda folder: (folder / "0002.json").write_text('{"id": "00'),
        lambda folder: lose(folder / "0002.json", "run"),
        lambda folder: lose(folder / "0002.json", "seconds"),
    ],
    ids=["no image", "no record", "half an image", "half a record", "no run", "no time"],
)
def test_only_the_corrupt_batch_is_generated_again_with_equal_images(pipe, tmp_path, calls, damage):
    run(pipe, tmp_path)
    before = pixels(tmp_path, TOFU.slug)
    damage(tmp_path / TOFU.slug)
    calls.clear()
    assert run(pipe, tmp_path) == 1
    assert [prompts for prompts, _ in calls[generate.WARM_UP :]] == [("an old oak",)]
    assert (pixels(tmp_path, TOFU.slug) == before).all()


def test_interrupted_run_resumes_with_the_same_images(pipe, tmp_path, monkeypatch):
    run(pipe, tmp_path / "whole")
    save, saved = generate._save, []

    def stop_in_the_second_batch(*args):
        if len(saved) == 5:
            raise KeyboardInterrupt
        saved.append(args)
        save(*args)

    monkeypatch.setattr(generate, "_save", stop_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, tmp_path / "cut")
    monkeypatch.setattr(generate, "_save", save)
    assert run(pipe, tmp_path / "cut") == 1
    for key in ("baseline", TOFU.slug):
        assert (pixels(tmp_path / "cut", key) == pixels(tmp_path / "whole", key)).all()


def test_methods_are_generated_one_after_the_other_with_a_warm_up_for_each_batch_size(pipe, tmp_path, monkeypatch):
    order = []
    generate_batch = generate.generate_batch

    def recording(pipe, requests, method, settings, *, steps, baseline_unet=None):
        order.append((method.slug, len(requests), steps))
        return generate_batch(pipe, requests, method, settings, steps=steps, baseline_unet=baseline_unet)

    monkeypatch.setattr(generate, "generate_batch", recording)
    monkeypatch.setattr(generate, "WARM_UP_STEPS", 1)
    run(pipe, tmp_path)  # batches of two images and one: at least two images warm up each size
    assert order == [
        (key, *call) for key in ("baseline", TOFU.slug) for call in ((2, 1), (2, 2), (1, 1), (1, 1), (1, 2))
    ]


def test_progress_names_the_method_and_how_many_there_are(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate.sys.stderr, "isatty", lambda: True)
    run(pipe, tmp_path)
    printed = capsys.readouterr().err
    assert printed.index("baseline (1 of 2)") < printed.index("tofu-r50 (2 of 2)")


@pytest.mark.parametrize("name", ["tofu", "adaptive", "deepcache"])
def test_images_of_a_method_do_not_depend_on_the_methods_before_it(pipe, tmp_path, name):
    """Also for methods with state between steps: a warm-up leaves nothing behind."""
    if name == "deepcache":
        pytest.importorskip("DeepCache")
    (method,) = methods.parse(name, [0.5])
    settings = replace(SETTINGS, steps=5)
    run(pipe, tmp_path / "both", (BASELINE, method), settings)
    run(pipe, tmp_path / "alone", (method,), settings)
    assert (pixels(tmp_path / "both", method.slug) == pixels(tmp_path / "alone", method.slug)).all()


def test_image_does_not_depend_on_its_batch(pipe, tmp_path):
    for batch in (1, 3):
        run(pipe, tmp_path / str(batch), settings=replace(SETTINGS, batch=batch))
    for key in ("baseline", TOFU.slug):
        # matrix products of another height round differently; the smallest step of a pixel is 1
        assert abs(pixels(tmp_path / "1", key) - pixels(tmp_path / "3", key)).max() <= 1
    full = pixels(tmp_path / "3")
    assert abs(full[0] - full[1]).mean() > 10  # other seeds are other images


def test_seed_baseline_has_other_seeds_and_the_same_prompts(pipe, tmp_path):
    run(pipe, tmp_path, (BASELINE, OTHER_SEEDS))
    record = files.read_json(tmp_path / OTHER_SEEDS.slug / "0001.json")
    assert record["prompt"] == "a bee"
    assert record["seed"] == 11 + SEED_SHIFT
    assert abs(pixels(tmp_path) - pixels(tmp_path, OTHER_SEEDS.slug)).mean() > 10


def test_changed_method_is_generated_again(pipe, tmp_path, calls):
    run(pipe, tmp_path)
    calls.clear()
    changed = replace(TOFU, identity={**TOFU.identity, "code": "other"})
    assert run(pipe, tmp_path, (BASELINE, changed)) == 3
    assert len(calls) == 1 + 2 + 2  # warm-ups of two and of one, two batches; the baseline's images stay


def test_later_method_is_timed_against_the_baseline(pipe, tmp_path):
    """In as many batches as are worth their double time."""
    run(pipe, tmp_path, (BASELINE,))
    before = {path: path.read_bytes() for path in (tmp_path / "baseline").iterdir()}
    assert run(pipe, tmp_path, timing=timing.TimingOptions(with_baseline=1)) == 3
    assert {path: path.read_bytes() for path in (tmp_path / "baseline").iterdir()} == before
    full, own = (
        {r.id: files.read_json(tmp_path / key / f"{r.id}.json") for r in REQUESTS} for key in ("baseline", TOFU.slug)
    )
    assert own["0000"]["baseline_denoiser_seconds"] > 0
    assert own["0002"]["baseline_denoiser_seconds"] is None
    assert all(record["baseline_denoiser_seconds"] == record["denoiser_seconds"] for record in full.values())


@pytest.mark.parametrize("name", ["tofu", "adaptive", "tofu@match_interval=2", "tomesd", "deepcache:tofu"])
def test_interleaved_baseline_changes_no_image(pipe, tmp_path, name):
    for peer, package in (("tomesd", "tomesd"), ("deepcache", "DeepCache")):
        if name.startswith(peer):
            pytest.importorskip(package)
    (method,) = methods.parse(name, [0.5])
    settings = replace(SETTINGS, steps=5)
    run(pipe, tmp_path / "beside", (method,), settings)
    run(pipe, tmp_path / "alone", (method,), settings, timing=timing.TimingOptions(with_baseline=0))
    content = [files.read_json(tmp_path / out / method.slug / "0000.json") for out in ("beside", "alone")]
    assert content[0]["baseline_denoiser_seconds"] > 0
    assert content[1]["baseline_denoiser_seconds"] is None
    assert content[0]["sha256"] == content[1]["sha256"]


def test_shared_weights_copy_is_unpatched(pipe):
    beside = generate.shared_weights_copy(pipe.unet)
    assert [a.data_ptr() for a in pipe.unet.parameters()] == [b.data_ptr() for b in beside.parameters()]
    x, t, words = torch.randn(2, 4, 16, 16), 7, torch.randn(2, 5, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        plain = pipe.unet(x, t, words).sample
        with TOFU.apply(pipe):
            assert not torch.equal(pipe.unet(x, t, words).sample, plain)
            assert torch.equal(beside(x, t, words).sample, plain)


def test_hooks_of_a_method_count_as_its_time(pipe, monkeypatch):
    """As counting similar tokens: the baseline does nothing of the kind."""
    clock = itertools.count()

    @contextmanager
    def slow(pipe):
        hook = pipe.unet.register_forward_pre_hook(lambda *_: [next(clock) for _ in range(100)] and None)
        yield
        hook.remove()

    method = replace(TOFU, apply=slow)
    for module in (generate, timing):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.__next__))
    with method.apply(pipe):
        cost = generate.generate_batch(
            pipe, REQUESTS[:1], method, SETTINGS, steps=2, baseline_unet=generate.shared_weights_copy(sd15_pipe().unet)
        )[1]
    assert (cost["denoiser_seconds"], cost["baseline_denoiser_seconds"]) == (2 * 101, 2)


def test_fastest_repeat_is_compared_with_the_fastest_baseline():
    """One in which the baseline was held up would be a speed-up of nothing."""
    own = [
        {"seconds": s, "denoiser_seconds": s - 1, "baseline_denoiser_seconds": f} for s, f in ((5, 4), (4, 9), (6, 5))
    ]
    counted = functools.reduce(generate.fastest, own)
    assert counted == {"seconds": 4, "denoiser_seconds": 3, "baseline_denoiser_seconds": 4}
    full = [
        {"seconds": s, "denoiser_seconds": d, "baseline_denoiser_seconds": d} for s, d in ((5, 4), (4, 3.5), (6, 3))
    ]
    assert functools.reduce(generate.fastest, full) == full[1]
    assert (
        generate.fastest(*({**cost, "baseline_denoiser_seconds": None} for cost in own[:2]))[
            "baseline_denoiser_seconds"
        ]
        is None
    )


def test_config_hash_of_older_settings_is_unchanged():
    older = replace(SETTINGS, tokenizers=None, variant=None)
    whole = {name: value for name, value in asdict(older).items() if name not in ("tokenizers", "variant")}
    observed = json.dumps([settings_module.IMAGE_VERSION, whole, TOFU.identity], sort_keys=True)
    assert settings_module.config_hash(older, TOFU) == hashlib.sha256(observed.encode()).hexdigest()[:16]
    for later in ({"tokenizers": "a"}, {"variant": "fp16"}):
        assert settings_module.config_hash(replace(older, **later), TOFU) != settings_module.config_hash(older, TOFU)


def test_time_of_the_interleaved_baseline_is_excluded(pipe, monkeypatch):
    """By a clock that ticks when it is looked at: at the start, around the step of each, and at the end."""
    clock = itertools.count()
    for module in (generate, timing):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.__next__))
    _, cost = generate.generate_batch(
        pipe, REQUESTS[:1], TOFU, SETTINGS, steps=2, baseline_unet=generate.shared_weights_copy(pipe.unet)
    )
    assert (cost["seconds"], cost["denoiser_seconds"], cost["baseline_denoiser_seconds"]) == (7 - 2, 2, 2)
    _, cost = generate.generate_batch(pipe, REQUESTS[:1], TOFU, SETTINGS, steps=2)
    assert (cost["seconds"], cost["denoiser_seconds"], cost["baseline_denoiser_seconds"]) == (5, 2, None)


def test_flux_gets_guidance_and_the_text_length_of_its_training(monkeypatch):
    """The embedded Flux is not distilled: its pipeline would take guidance_scale without any effect."""
    monkeypatch.setattr(generate, "EMBEDDED", {"demo-flux": FLUX})
    calls = []

    class FluxPipeline:
        device = torch.device("cpu")
        transformer = torch.nn.Identity()

        def __call__(self, **arguments):
            calls.append(arguments)
            return SimpleNamespace(images=np.zeros((2, 64, 64, 3)))

    for model in ("demo-flux", "a-flux"):
        settings = replace(SETTINGS, model=model, guidance=3.0)
        generate.generate_batch(FluxPipeline(), REQUESTS[:2], BASELINE, settings, steps=2)
    embedded, other = calls
    assert embedded["true_cfg_scale"] == 3.0
    assert embedded["negative_prompt"] == ["", ""]
    assert embedded["max_sequence_length"] == 32
    assert "guidance_scale" not in embedded
    assert other["guidance_scale"] == 3.0
    assert not {"true_cfg_scale", "max_sequence_length"} & set(other)


@pytest.mark.parametrize("name", ["tofu", "deepcache:tofu", "todo", "hypertile"])
def test_config_hash_depends_on_the_version_of_this_package(name, monkeypatch):
    """Of stacked methods too, and of those that find their blocks by it."""
    pytest.importorskip("DeepCache")
    (before,) = methods.parse(name, [0.5])
    monkeypatch.setattr(methods, "source_hash", lambda: "newer")
    (after,) = methods.parse(name, [0.5])
    assert settings_module.config_hash(SETTINGS, before) != settings_module.config_hash(SETTINGS, after)


def test_config_hash_depends_on_the_stacked_package(monkeypatch):
    pytest.importorskip("DeepCache")
    (before,) = methods.parse("deepcache:tofu", [0.5])
    monkeypatch.setattr(methods, "digest", lambda *_: "newer")
    (after,) = methods.parse("deepcache:tofu", [0.5])
    assert settings_module.config_hash(SETTINGS, before) != settings_module.config_hash(SETTINGS, after)


@pytest.mark.parametrize(
    "change", ["the last weight", "a word", "how words are split", "the length of a text", "a setting"]
)
def test_pipeline_name_depends_on_weights_vocabulary_and_settings(change):

    def name(pipe):
        return provenance.pipeline_name(pipe), provenance.tokenizers_hash(pipe)

    pipe = sd15_pipe()
    before = name(pipe)
    assert name(sd15_pipe()) == before
    if change == "the last weight":
        pipe.text_encoder.get_input_embeddings().weight.data[-1, -1] += 1
    elif change == "a word":
        pipe.tokenizer.add_tokens(["<my-cat>"])
    elif change == "how words are split":
        rules = json.loads(pipe.tokenizer.backend_tokenizer.to_str())
        rules["model"]["end_of_word_suffix"] = "</word>"
        pipe.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(rules))
    elif change == "the length of a text":
        pipe.tokenizer.model_max_length = 10
    else:
        pipe.scheduler.register_to_config(steps_offset=0)
    after = name(pipe)
    observed = change == "a word", change in ("how words are split", "the length of a text", "a word")
    assert (after[0] != before[0], after[1] != before[1]) == (observed[0] or not observed[1], observed[1])


def test_slow_tokenizer_is_hashed_by_its_files(tmp_path):
    """As sentencepiece's, whose file is no text."""

    class Slow:
        model_max_length, all_special_ids, content = 7, [0], b"\xff\x00"

        def get_vocab(self):
            return {"a": 0}

        def save_vocabulary(self, folder):
            file = Path(folder) / "words.model"
            file.write_bytes(self.content)
            return (str(file),)

    one, other = Slow(), Slow()
    assert provenance.tokenizer_hash(one) == provenance.tokenizer_hash(other)
    other.content = b"\xff\x01"
    assert provenance.tokenizer_hash(one) != provenance.tokenizer_hash(other)


def test_calling_a_pipeline_does_not_change_its_name(pipe):
    """The rules of a tokenizer remember how the last text was padded."""
    before = provenance.pipeline_name(pipe), provenance.tokenizers_hash(pipe)
    pipe.tokenizer(["a", "a b c"], padding="longest", truncation=True, max_length=5)
    assert (provenance.pipeline_name(pipe), provenance.tokenizers_hash(pipe)) == before


def test_device_is_synchronized_around_each_measurement(pipe, monkeypatch):
    """Otherwise a GPU's time is the time of asking for it."""
    order = []
    monkeypatch.setattr(generate, "synchronize", lambda device: order.append("wait"))
    clock = generate.time.perf_counter
    monkeypatch.setattr(generate.time, "perf_counter", lambda: order.append("look") or clock())
    timer = SimpleNamespace(seconds=lambda: (None, None))
    monkeypatch.setattr(generate, "UNetTimer", lambda *_: nullcontext(timer))
    generate.generate_batch(pipe, REQUESTS[:1], BASELINE, SETTINGS, steps=1)
    looks = [i for i, what in enumerate(order) if what == "look"]
    assert order[looks[0] - 1] == order[looks[-1] - 1] == "wait"


def test_number_of_generated_images_is_that_of_saved_images(pipe, tmp_path):
    run(pipe, tmp_path)
    (tmp_path / "baseline" / "0001.png").unlink()  # of a batch of two
    assert run(pipe, tmp_path) == 1


def test_pipeline_and_global_rng_are_unchanged(pipe, tmp_path):
    classes = [type(module) for module in pipe.unet.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run(pipe, tmp_path, methods.parse("full,tofu,kv:tome+p", [0.5]))
    assert torch.equal(torch.rand(1), expected)
    assert [type(module) for module in pipe.unet.modules()] == classes
