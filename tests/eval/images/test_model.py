"""Models that load without an error and are not whole, variants of weights, and paths that hold no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTokenizer

from eval import EvalError, run
from eval.common import files
from eval.evaluation import prepare
from eval.images import checkpoint, components
from eval.images.model import check_guidance, guidance_scale, load_model, variant_of
from eval.methods.registry import parse
from tofu_sd.demo.tokenizer import build_tokenizer

CPU = torch.device("cpu")
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
PICKLED = {
    "text_encoder": "pytorch_model.bin",
    "unet": "diffusion_pytorch_model.bin",
    "vae": "diffusion_pytorch_model.bin",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of Stable Diffusion 1.5's layout."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny.sd15_pipe(with_unet=tiny.SHALLOW).save_pretrained(folder)
    return folder


@pytest.fixture
def mine(whole, tmp_path, monkeypatch):
    """A copy of it to be damaged, in the current folder."""
    shutil.copytree(whole, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    return Path("mine")


def refused(model="mine", **options):
    """The one line that a model is refused by."""
    with pytest.raises(EvalError) as raised:
        load_model(str(model), CPU, torch.float32, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- not whole --------------------------------------------------------------------------------------------------------


def test_complete_model_is_loaded(mine):
    pipe, classifier = load_model("mine", CPU, torch.float32)
    assert len(pipe.tokenizer) == pipe.text_encoder.config.vocab_size
    assert (classifier, variant_of(pipe)) == (None, None)


@pytest.mark.parametrize("gone", ["tokenizer/tokenizer.json", "tokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused_with_both_counts(mine, capsys, gone):
    """All prompts would be the same few tokens, and all images the same."""
    shutil.rmtree(mine / gone) if (mine / gone).is_dir() else (mine / gone).unlink()
    assert "its tokenizer has 2 tokens and its text_encoder 514: " in refused()
    assert run.main(["--model", "mine", "--method", "tofu", "--steps", "1", "--out", "out"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cannot load the model 'mine': its tokenizer has")
    assert not Path("out").exists()


def test_second_tokenizer_is_checked(tmp_path):
    tiny.sdxl_pipe().save_pretrained(tmp_path / "xl")
    load_model(str(tmp_path / "xl"), CPU, torch.float32)
    (tmp_path / "xl" / "tokenizer_2" / "tokenizer.json").unlink()
    assert "its tokenizer_2 has 3 tokens and its text_encoder_2 514" in refused(tmp_path / "xl")


def test_a_tokenizer_that_lacks_a_few_words_is_refused(mine):
    file = mine / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for word in list(content["model"]["vocab"])[100:103]:
        del content["model"]["vocab"][word]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert "its tokenizer has 511 tokens and its text_encoder 514" in refused()


def test_a_tokenizer_without_its_settings_is_refused(mine):
    """It would pad every prompt to 10^30 tokens."""
    (mine / "tokenizer" / "tokenizer_config.json").unlink()
    assert "its tokenizer reads up to 1e+30 tokens and its text encoder 77" in refused()


def encoder(vocab_size, **more):
    return SimpleNamespace(config=CLIPTextConfig(vocab_size=vocab_size, **more))


def test_a_tokenizer_without_its_merges_is_refused(tmp_path):
    build_tokenizer(["a red fox", "a big owl"]).save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    components._check_vocabulary("tokenizer", tokenizer, encoder(len(tokenizer)))
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    needed = len(content["model"]["merges"])
    content["model"]["merges"] = content["model"]["merges"][:3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    damaged = CLIPTokenizer.from_pretrained(tmp_path)
    with pytest.raises(EvalError, match=f"its tokenizer has 3 merges of letters and needs {needed}"):
        components._check_vocabulary("tokenizer", damaged, encoder(len(damaged)))


@pytest.mark.parametrize(("kind", "spare", "fits"), [("clip_text_model", 1, False), ("t5", 5, True), ("t5", 6, False)])
def test_only_encoders_that_round_their_vocabulary_up_have_more_rows(kind, spare, fits):
    tokenizer = tiny.tokenizer()
    part = SimpleNamespace(config=SimpleNamespace(model_type=kind, vocab_size=len(tokenizer) + spare))
    if fits:
        components._check_vocabulary("tokenizer", tokenizer, part)
    else:
        with pytest.raises(EvalError, match=r"its tokenizer has 514 tokens and its text_encoder 51\d|520"):
            components._check_vocabulary("tokenizer", tokenizer, part)


@pytest.mark.parametrize("component", WEIGHTS)
def test_weights_that_would_be_random_are_refused(mine, component):
    file = mine / component / WEIGHTS[component]
    weights = load_file(file)
    name = sorted(weights)[3]
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    assert f"1 weights of {component} are in no file ({name}) and would be random" in refused()
    save_file({"other": torch.zeros(1)}, file, {"format": "pt"})
    assert f"weights of {component} are in no file" in refused()


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("what", ["code", "garbage", "nothing", "a list"])
def test_weights_that_cannot_be_unpickled_are_one_line_and_no_code_runs(mine, component, what, capfd):
    class Code:
        def __reduce__(self):
            return print, ("it ran",)

    (mine / component / WEIGHTS[component]).unlink()
    file = mine / component / PICKLED[component]
    if what in ("garbage", "nothing"):
        file.write_bytes(b"garbage" * 50 * (what == "garbage"))
    else:
        torch.save({"x": Code()} if what == "code" else [1, 2], file)
    assert refused().startswith("cannot load the model 'mine': ")
    assert "it ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "model_index.json",
        "unet/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"[1", b"\x00\xff" * 9, b"null", b'"x"', b"[" * 100_000])  # fmt: skip
def test_model_files_with_other_content_print_one_line(mine, file, content):
    (mine / file).write_bytes(content)
    assert refused().startswith("cannot load the model 'mine': ")


def test_a_schedule_of_defaults_is_refused(mine):
    (mine / "scheduler" / "scheduler_config.json").write_text("{}")
    assert "scheduler/scheduler_config.json has no '_class_name'" in refused()


def test_a_model_for_inpainting_is_refused():
    pipe = tiny.sd15_pipe(with_unet={**tiny.SHALLOW, "in_channels": 9})
    with pytest.raises(EvalError, match="its UNet takes 9 channels and an image from text has 4: it is for inpainting"):
        components.check_components(pipe)


# --- prompts that a model cannot tell apart ---------------------------------------------------------------------------


def reading(tokenizer):
    return SimpleNamespace(components={"tokenizer": tokenizer})


def test_prompts_of_unknown_words_are_refused():
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "!": 2}, merges=[])
    with pytest.raises(EvalError, match="the tokenizer does not know 14 of 14 tokens of these prompts"):
        components.check_prompts(reading(tokenizer), ["a red fox", "a big owl"])


def test_prompts_with_equal_tokens_are_refused():
    def tokenizer(texts, **_):
        return SimpleNamespace(input_ids=[[5, 6, 7] for _ in texts])

    tokenizer.get_vocab, tokenizer.unk_token_id = dict, 0
    with pytest.raises(EvalError, match="reads 'a red fox' and 'a big owl' as the same 3 tokens"):
        components.check_prompts(reading(tokenizer), ["a red fox", "a big owl"])


def test_prompts_that_differ_in_case_or_spaces_are_accepted():
    """ImageNet has both Cardigan and cardigan; beyond 77 tokens all prompts are cut."""
    long = "a " * 200
    prompts = ["a Cardigan", "a  cardigan", "", f"{long} fox", f"{long} owl", "a fox", "a fox"]
    pipe = tiny.sd15_pipe(with_unet=tiny.SHALLOW)
    assert pipe.tokenizer(prompts[0]).input_ids == pipe.tokenizer(prompts[1]).input_ids
    components.check_prompts(pipe, prompts)


# --- variants ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def half(tmp_path, monkeypatch):
    """A folder with weights of the variant fp16 alone."""
    monkeypatch.chdir(tmp_path)
    tiny.sd15_pipe(with_unet=tiny.SHALLOW).save_pretrained("half", variant="fp16")
    return Path("half")


def test_fp16_is_used_where_it_is_the_only_variant(half, capsys):
    Path("own.txt").write_text("a fox\na bee")
    asked = ["--model", "half", "--prompts", "own.txt", "--steps", "1", "--metrics", "psnr", "--method", "tofu"]
    assert run.main([*asked, "--out", "out"]) == 0
    assert "the model has only weights of the variant fp16: these are used\n" in capsys.readouterr().err
    assert files.read_json(Path("out/settings.json"))["variant"] == "fp16"
    assert files.read_json(Path("out/results.json"))["settings"]["variant"] == "fp16"
    assert run.main([*asked, "--out", "out", "--variant", "fp16"]) == 0
    assert "these are used" not in capsys.readouterr().err
    assert run.main([*asked, "--out", "out", "--metrics-only", "--variant", "bf16"]) == 2
    assert "--variant is bf16; the images of out were generated with fp16" in capsys.readouterr().err


def test_images_of_two_variants_are_not_mixed(half, capsys):
    tiny.sd15_pipe(with_unet=tiny.SHALLOW).save_pretrained("half")  # the plain weights beside the others
    Path("own.txt").write_text("a fox\na bee")
    asked = ["--model", "half", "--prompts", "own.txt", "--steps", "1", "--metrics", "psnr", "--method", "tofu"]
    assert run.main([*asked, "--out", "out"]) == 0
    assert files.read_json(Path("out/settings.json"))["variant"] is None
    assert run.main([*asked, "--out", "out", "--variant", "fp16"]) == 2
    assert "variant None, this run has 'fp16'" in capsys.readouterr().err


def test_missing_variant_is_refused(half, mine):
    assert "--variant is 'bf16'; the weights of half are fp16" in refused("half", variant="bf16")
    assert "--variant is 'fp16'; the weights of mine are plain" in refused("mine", variant="fp16")
    assert "--variant is 'fp16'; the embedded model has none" in refused("demo", variant="fp16")


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["unet/diffusion_pytorch_model.safetensors"], None),
        (["unet/diffusion_pytorch_model.fp16.safetensors"], "fp16"),
        (["unet/diffusion_pytorch_model.fp16.bin", "unet/diffusion_pytorch_model.bin"], None),
        (["unet/diffusion_pytorch_model.fp16.bin", "vae/diffusion_pytorch_model.bin"], "fp16"),
        (["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], "fp16"),
        (["unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors"], "fp16"),
        (["unet/diffusion_pytorch_model-00001-of-00002.safetensors"], None),
        (["unet/diffusion_pytorch_model.fp16.bin", "unet/diffusion_pytorch_model.non_ema.bin"], "fp16"),
        (["safety_checker/model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"], None),
        ([], None),
    ],
)
def test_variant_is_read_from_file_names(tmp_path, names, taken):
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": [], "vae": [], "safety_checker": []}))
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert checkpoint.pick_variant(tmp_path, None) == taken


def test_other_single_variant_must_be_requested(tmp_path):
    (tmp_path / "model_index.json").write_text('{"unet": []}')
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bf16.safetensors").touch()
    with pytest.raises(EvalError, match="unet has no plain weights; give --variant: bf16"):
        checkpoint.pick_variant(tmp_path, None)
    assert checkpoint.pick_variant(tmp_path, "bf16") == "bf16"


# --- paths that hold no model -----------------------------------------------------------------------------------------

ONE = {
    "one.safetensors": ("model.diffusion_model.x", "diffusers' StableDiffusionPipeline.from_single_file('one.safetens"),
    "xl.safetensors": ("conditioner.embedders.0.x", "StableDiffusionXLPipeline.from_single_file('xl.safetensors')"),
    "lora.safetensors": ("lora_unet_down.lora_up.weight", "it is a LoRA, which changes a model"),
    "unet.safetensors": ("conv_in.weight", "it is a file of weights (conv_in.weight), but not of a whole model"),
}


@pytest.mark.parametrize("name", ONE)
def test_single_file_checkpoint_explains_how_to_convert_it(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    key, said = ONE[name]
    save_file({key: torch.zeros(1)}, name)
    assert run.main(["--model", name, "--method", "tofu", "--out", "out"]) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"error: cannot load the model {name!r}: ")
    assert said in output
    assert output.count("\n") == 1
    Path("folder").mkdir()
    Path(name).rename(Path("folder", name))
    assert said in refused("folder")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("m.ckpt", "it is a single-file checkpoint; write a folder once"),
        ("m.bin", "it is a single-file checkpoint; write a folder once"),
        ("m.safetensors", "it is not a complete safetensors file"),
        ("notes.txt", "it is a file; --model takes a folder with model_index.json"),
        ("gone.safetensors", "there is no such file; --model takes a folder"),
        ("gone/model.ckpt", "there is no such file; --model takes a folder"),
        ("empty", "the folder is empty; --model takes a folder"),
        ("some", "the folder has no model_index.json; --model takes a folder"),
        ("mine/unet", "it holds one component (UNet2DConditionModel) and no model_index.json"),
        ("mine/text_encoder", "it holds one component (CLIPTextModel) and no model_index.json"),
        (".", "it has no model_index.json, and its folder 'mine' has one: give that folder"),
        ("adapter", "it is a LoRA, which changes a model"),
        ("", "--model is ''; --model takes a folder"),
    ],
)
def test_path_without_a_model_says_what_it_is(mine, path, said):
    for name in ("m.ckpt", "m.bin", "m.safetensors", "notes.txt"):
        Path(name).write_text("x")
    for name in ("empty", "some", "adapter"):
        Path(name).mkdir()
    Path("some/notes.txt").write_text("x")
    Path("adapter/adapter_config.json").write_text("{}")
    assert said in refused(path)


def test_a_pipeline_that_needs_more_than_a_prompt_is_refused(mine):
    content = json.loads((mine / "model_index.json").read_text())
    content["_class_name"] = "StableDiffusionUpscalePipeline"
    (mine / "model_index.json").write_text(json.dumps(content))
    assert "it does not generate images from text alone" in refused()


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tofu@share_across_cfg=True", "deepcache:tofu@share_across_cfg=True"])
@pytest.mark.parametrize("guidance", ["1", "0.5", "0", "-1"])
def test_share_across_cfg_needs_guidance(tmp_path, monkeypatch, capsys, name, guidance):
    if name.startswith("deepcache"):
        pytest.importorskip("DeepCache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "load_model", lambda *_: pytest.fail("it went on"))
    assert run.main(["--method", f"full,{name}", "--guidance", guidance]) == 2
    output = capsys.readouterr().err
    assert f"method {name!r} has share_across_cfg, and the guidance scale is {guidance}" in output
    assert output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_default_guidance_is_the_pipelines():
    pipe = tiny.sd15_pipe(with_unet=tiny.SHALLOW)
    assert guidance_scale(pipe, None) == 7.5
    assert guidance_scale(pipe, 3.0) == 3.0
    distilled = tiny.sd15_pipe(with_unet={**tiny.SHALLOW, "time_cond_proj_dim": 8})
    assert guidance_scale(distilled, 8.5) == 1.0  # an input of the model, as in LCM
    check_guidance(parse("tofu@share_across_cfg=True", [0.5]), 7.5)
    check_guidance(parse("tofu", [0.5]), 1.0)
    with pytest.raises(EvalError, match="has share_across_cfg, and the guidance scale is 1"):
        check_guidance(parse("tofu@share_across_cfg=True", [0.5]), guidance_scale(distilled, 8.5))
