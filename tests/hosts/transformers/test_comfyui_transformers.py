"""ComfyUI's node on diffusion transformers, in a stand-in and, if COMFYUI names a checkout, in ComfyUI itself.

See tests/hosts/test_comfyui.py for how to run both.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import types

import pytest
import tiny
import torch
from comfyui import run_in_comfyui
from torch import nn
from transformer_host import (
    TEXT,
    WIDTH,
    Flux,
    NextDiT,
    OpenAISignatureMMDITWrapper,
    TransformerPatcher,
    attention,
    optimized_attention,
)

from tofu_sd import TokenFusionConfig
from tofu_sd.hosts.programs import transformer_patches
from tofu_sd.hosts.programs.base_patches import OUTSIDE, SLOWER, SMALL, UNKNOWN
from tofu_sd.hosts.programs.model_patcher import patch_transformer, patches_of, record_model_maps
from tofu_sd.hosts.programs.transformer_families import family_of
from tofu_sd.patching import autotune
from tofu_sd.timing_cache import Timing

KINDS = [Flux, OpenAISignatureMMDITWrapper, NextDiT]
MODULE = "tofu_sd.hosts.comfyui"
SETTINGS = [
    {},
    {"kv_only": True},
    {"early": "mean", "late": "mean", "window": 2},
    {"early": "mlerp", "kv_late": "mean"},
]


def plain(q, k, v, heads, options):
    return attention(q, k, v, heads)


def merged(patcher, ratio=0.5, **options):
    config = TokenFusionConfig.of(ratio, **{"min_tokens": 0, "proportional": True, **options})
    family = family_of(patcher.model.diffusion_model)
    return patch_transformer(patcher, family, config, plain, lambda percent: 10 * (1 - percent))[0]


def call(patcher, h=16, w=12, batch=2, **more):
    return patcher.call(tiny.noise(batch, 4, h, w), tiny.noise(batch, TEXT, WIDTH, seed=1), **more)


def watched(patcher):
    """Returns a clone with another node's override, and the list of the (q, k, v, mask) [B, S, C] that it gets."""
    calls = []

    def override(function, q, k, v, heads, mask=None, **kwargs):
        split = kwargs.get("skip_reshape")
        calls.append((*((x.transpose(1, 2) if split else x).reshape(len(x), -1, WIDTH) for x in (q, k, v)), mask))
        return function(q, k, v, heads, mask=mask, **kwargs)

    clone = patcher.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone, calls


def reasons(patcher):
    return patches_of(patcher).reasons


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def patcher(request):
    return TransformerPatcher(request.param().eval())


@pytest.fixture
def flux():
    return TransformerPatcher(Flux().eval())


# --- what is merged ---------------------------------------------------------------------------------------------------


def test_ratio_0_is_bitwise_the_baseline(patcher):
    """No token is merged, so attention gets the model's own tensors."""
    assert torch.equal(call(merged(patcher, 0.0)), call(patcher))


@pytest.mark.parametrize("settings", SETTINGS)
def test_merging_changes_the_clone_and_leaves_the_model(patcher, settings):
    before = call(patcher)
    clone = merged(patcher, **settings)
    assert (call(clone) - before).abs().max() > 1e-3
    assert torch.equal(call(patcher), before)
    assert patcher.model_options == {"transformer_options": {}}
    assert set(clone.model_options["transformer_options"]) == {"wrappers"}
    assert torch.equal(call(merged(clone, 0.0)), before)  # a patch is replaced, not added


@pytest.mark.parametrize("settings", SETTINGS)
def test_text_and_reference_images_stay_bitwise_unchanged(flux, settings):
    """Only the tokens of the image are reduced; all others are copied. 8 x 6 tokens, 4 x 3 of a reference."""
    references = {"ref_latents": [tiny.noise(2, 4, 8, 6, seed=3)]}
    full, before = watched(flux)
    half, after = watched(merged(flux, **settings))
    call(full, **references)
    call(half, **references)
    assert reasons(half) == set()
    keys = 24
    for name, all_tokens, some in zip("qkv", before[0], after[0], strict=False):
        queries = 48 if name == "q" and settings.get("kv_only") else keys
        assert some.shape[1] == TEXT + queries + 12
        assert torch.equal(some[:, :TEXT], all_tokens[:, :TEXT])
        assert torch.equal(some[:, TEXT + queries :], all_tokens[:, TEXT + 48 :])


def test_image_of_equal_tokens_needs_proportional_attention(patcher):
    """n equal keys weigh n against the text. Without log(n) the text gains weight. Exact up to rounding."""
    latent, context = torch.full((1, 4, 16, 12), 0.3), tiny.noise(1, TEXT, WIDTH, seed=1)
    expected = patcher.call(latent, context)
    assert torch.allclose(merged(patcher).call(latent, context), expected, atol=1e-5)
    assert not torch.allclose(merged(patcher, proportional=False).call(latent, context), expected, atol=1e-3)


def test_samples_of_a_batch_are_merged_independently(patcher):
    """ComfyUI puts several prompts into one call, as memory allows. Rounding depends on the batch."""
    clone = merged(patcher)
    x, context = tiny.noise(3, 4, 16, 12), tiny.noise(3, TEXT, WIDTH, seed=1)
    alone = [clone.call(x[i : i + 1], context[i : i + 1]) for i in range(3)]
    assert torch.allclose(clone.call(x, context), torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("size", [(17, 12), (16, 11)])
def test_odd_latents_have_a_token_for_each_started_patch(patcher, size):
    clone = merged(patcher)
    assert call(clone, *size).isfinite().all()
    assert reasons(clone) == set()


def test_both_attentions_of_an_sd35_block_use_one_map():
    """The second is that of the image alone; positions are in the states, so the same tokens are similar."""
    clone, calls = watched(merged(TransformerPatcher(OpenAISignatureMMDITWrapper().eval())))
    call(clone)
    assert [q.shape[1] for q, *_ in calls] == [TEXT + 24, 24] * 2


# --- where and when ---------------------------------------------------------------------------------------------------


def test_step_window_is_in_noise_levels(patcher):
    late = merged(patcher, start=0.6)
    assert torch.equal(call(late, sigma=5.0), call(patcher, sigma=5.0))
    assert reasons(late) == {OUTSIDE}
    assert not torch.equal(call(late, sigma=3.0), call(patcher, sigma=3.0))


@pytest.mark.parametrize(("seconds", "skipped"), [(1.0, False), (3.0, True)])
def test_maps_on_which_merging_is_not_faster_are_not_merged(patcher, monkeypatch, seconds, skipped):
    monkeypatch.setattr(autotune.MergeRule, "_measure", lambda *_: Timing(full=2.0, merged=seconds))
    clone = merged(patcher, min_tokens="auto")
    assert torch.equal(call(clone), call(patcher)) == skipped
    assert (SLOWER in reasons(clone)) == skipped


@pytest.mark.parametrize("settings", [{}, {"kv_only": True}, {"kv_early": "mean"}])
def test_attention_of_text_and_image_is_timed(patcher, monkeypatch, settings):
    monkeypatch.setattr(autotune.MergeRule, "_measure", autotune.MergeRule._measure_for_real)
    clone, timings = merged(patcher, min_tokens="auto", **settings), []
    monkeypatch.setattr(
        autotune, "_time", lambda full, run, *_: (full(), run(), timings.append(1), Timing(2.0, 1.0))[3]
    )
    call(clone)
    # one for each reduction of the merged blocks; the first block of NextDiT is not merged
    assert len(timings) == (1 if isinstance(patcher.model.diffusion_model, NextDiT) else 2)


def test_small_maps_are_skipped(patcher):
    clone = merged(patcher, min_tokens=49)
    assert torch.equal(call(clone), call(patcher))
    assert reasons(clone) == {SMALL}


# --- with other nodes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_override_of_another_node_is_kept_and_called_in_either_order(patcher, settings):
    """It gets merged tokens, and log(n) as a mask. The result is that of the node's own attention up to rounding."""
    full, before = watched(patcher)
    call(full)
    after_it, calls = watched(merged(patcher, **settings))
    expected = call(merged(patcher, **settings))
    assert torch.allclose(call(after_it), expected, atol=1e-5)
    assert len(calls) == len(before)
    first = int(isinstance(patcher.model.diffusion_model, NextDiT))  # its first block is not merged
    fewer = [full_k.shape[1] - k.shape[1] for (_, k, *_), (_, full_k, *_) in zip(calls, before, strict=True)]
    assert fewer == [0] * first + [24] * (len(calls) - first)
    assert torch.equal(call(merged(watched(patcher)[0], **settings)), call(after_it))


def test_another_override_gets_no_mask_without_proportional_attention(patcher):
    clone, calls = watched(merged(patcher, proportional=False))
    call(clone)
    assert all(mask is None for *_, mask in calls)


def test_block_replacement_of_another_node_is_kept_and_called(patcher):
    if isinstance(patcher.model.diffusion_model, NextDiT):
        pytest.skip("its blocks cannot be replaced")
    seen = []

    def replaced(args, extra):
        seen.append(args["img"].shape[1])
        return extra["original_block"](args)

    clone = merged(patcher)
    expected = call(clone)
    clone.set_model_patch_replace(replaced, "dit", "double_block", 1)
    assert torch.equal(call(clone), expected)
    assert seen == [48]
    clone.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)  # as skip-layer guidance does
    assert not torch.equal(call(clone), expected)
    assert reasons(clone) == set()


def test_patch_of_another_node_after_a_block_runs_before_the_next_is_matched():
    """Control networks of Z-Image add to the tokens there."""
    patcher = TransformerPatcher(NextDiT().eval())
    places = []

    def add(args):
        return {"img": args["img"] + 1.0}

    clone = merged(patcher)
    clone.model_options["transformer_options"]["patches"] = {"double_block": [add]}
    other = patcher.clone()
    other.model_options["transformer_options"]["patches"] = {"double_block": [add]}
    recorded, _ = record_model_maps(clone, lambda place, *rest: places.append(place))
    assert torch.equal(call(recorded), call(clone))
    assert places == [("double_block", 1, 0)]
    assert not torch.equal(call(clone), call(other))
    assert torch.equal(call(merged(other)), call(clone))


def test_attention_mask_is_refused_and_logged(flux, caplog):
    """A mask hides keys by their position, which merging changes: attention runs on all tokens."""
    mask = torch.zeros(1, 1, TEXT + 48, TEXT + 48)
    mask[..., :2] = -torch.inf
    clone = merged(flux)
    assert torch.equal(call(clone, attention_mask=mask), call(flux, attention_mask=mask))
    assert caplog.text.count("an attention mask hides tokens by their position") == 1  # not once a block


def test_single_blocks_after_skipped_double_blocks_are_logged(flux, caplog):
    """Only double blocks show how many text tokens come before the image."""
    for number in range(2):
        flux.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", number)
    clone = merged(flux)
    assert torch.equal(call(clone), call(flux))
    assert UNKNOWN in caplog.text


def test_changed_number_of_image_tokens_is_logged(flux, caplog):
    model = flux.model.diffusion_model
    tokens = model.tokens
    model.tokens = lambda x: tokens(x)[:, :-1]
    clone = merged(flux)
    assert torch.equal(call(clone), call(flux))
    assert transformer_patches.CHANGED in caplog.text


def test_latent_of_several_frames_is_logged(flux, caplog):
    flux.model.diffusion_model.tokens = lambda x: Flux.tokens(flux.model.diffusion_model, x[:, :, 0])
    x, context = tiny.noise(1, 4, 2, 16, 12), tiny.noise(1, TEXT, WIDTH, seed=1)
    clone = merged(flux)
    assert torch.equal(clone.call(x, context), flux.call(x, context))
    assert transformer_patches.FRAMES in caplog.text
    assert torch.equal(clone.call(x[:, :, :1], context), merged(flux).call(x[:, :, :1], context))


def test_attention_that_calls_no_override_is_logged(flux, caplog):
    """Another node may replace a block's forward; nothing could be merged silently."""
    block = flux.model.diffusion_model.double_blocks[0]
    block.forward = lambda img, txt, *_: (img, txt)
    clone = merged(flux)
    call(clone)
    assert transformer_patches.UNREACHED in caplog.text


def test_model_that_runs_no_block_is_logged(flux, caplog):
    flux.model.diffusion_model.forward = lambda x, *_, **__: x
    call(merged(flux))
    assert transformer_patches.UNSEEN in caplog.text


def test_error_in_a_block_leaves_the_next_call_unchanged(flux):
    clone = merged(flux)
    expected = call(clone)

    def stop(args, extra):
        raise InterruptedError

    stopped = clone.clone()
    stopped.set_model_patch_replace(stop, "dit", "single_block", 0)
    with pytest.raises(InterruptedError):
        call(stopped)
    assert torch.equal(call(clone), expected)


# --- the node ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def comfy(monkeypatch):
    """Imports the node with the modules of ComfyUI that it uses."""
    names = ("comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention")
    modules = {name: types.ModuleType(name) for name in names}
    for parent, name in itertools.pairwise(names):
        setattr(modules[parent], name.rpartition(".")[2], modules[name])
    vars(modules[names[-1]]).update(optimized_attention=optimized_attention, wrap_attn=None)
    for name, module in {**modules, "comfy_api.latest": None}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize("preset", ["tofu", "tome", "asymmetric"])
def test_presets_have_proportional_attention_on_transformers(comfy, flux, preset):
    """The text's weight depends on it. A preset sets the input, so its value does not count."""
    assert patches_of(comfy.patch_with_preset(flux, preset=preset, proportional=False)).config.proportional


def test_custom_preset_follows_its_input(comfy, flux):
    config = patches_of(comfy.patch_with_preset(flux, preset="custom", proportional=False)).config
    assert not config.proportional
    assert patches_of(comfy.patch_with_preset(flux, preset="custom")).config.proportional


def test_log_names_model_and_blocks(comfy, flux, monkeypatch):
    messages = []
    monkeypatch.setattr(comfy.logger, "info", messages.append)
    comfy.patch_with_preset(flux, min_tokens=0)
    assert messages == ["Flux: tofu-r50+p on 4 of 4 transformer blocks"]


SUPPORTED = "supported: UNets of SD 1.x, 2.x, SDXL and their relatives, SD3 and 3.5 (OpenAISignatureMMDITWrapper), Flux"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MMDiT", "it shows the tokens of its blocks to no patch"),
        ("PixArtMS", "its attention does not call optimized_attention_override"),
        ("WanModel", "its tokens lie in several frames"),
        ("AnotherModel", "where its image tokens lie is not known"),
    ],
)
def test_unsupported_model_is_refused_by_name(comfy, name, reason):
    other = TransformerPatcher(type(name, (nn.Module,), {})())
    with pytest.raises(ValueError, match=f"token fusion does not support {name}: {reason}") as error:
        comfy.patch_with_preset(other)
    assert SUPPORTED in str(error.value)
    assert other.model_options == {"transformer_options": {}}


def test_levels_above_1_are_refused(comfy, flux):
    with pytest.raises(ValueError, match="levels is 2, and Flux has one resolution"):
        comfy.patch_with_preset(flux, levels=2)


def test_comfyui_without_override_is_refused(comfy, flux):
    del comfy.comfy_attention.wrap_attn
    with pytest.raises(ValueError, match="need a newer ComfyUI, with optimized_attention_override"):
        comfy.patch_with_preset(flux)


def test_changed_structure_is_refused(comfy, flux):
    del flux.model.diffusion_model.double_blocks
    with pytest.raises(ValueError, match=r"Flux is not as in ComfyUI 0\.8\.0"):
        comfy.patch_with_preset(flux)


# --- in the program itself --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_in_comfyui("../comfy_transformers/comfyui_transformers.py", tmp_path_factory.mktemp("comfyui"))


@pytest.mark.parametrize("kind", ["sd3", "flux", "chroma", "qwen", "flux2", "lumina", "z-image"])
def test_comfyui_checks_pass(results, kind):
    if kind in ("flux2", "lumina", "z-image") and kind not in results:
        pytest.skip("this ComfyUI cannot run it on merged tokens")
    assert "error" not in results[kind], results[kind]["error"]
    assert [name for name, passed in results[kind]["checks"].items() if passed is not True] == []
    assert results[kind]["changed"] > 1e-3


@pytest.mark.parametrize("kind", ["sd3", "flux", "qwen"])
def test_comfyui_prediction_matches_diffusers(results, kind):
    """One call with the same weights. Both match on a block's input; float32 sums have another order."""
    distances = results[kind]["diffusers"]
    assert distances["plain"] < 1e-4
    for method, distance in distances["merged"].items():
        assert distance < 1e-4, method
    assert distances["effect"] > 1e-1


def test_comfyui_refuses_what_it_cannot_reach(results):
    """Lumina 2 only in versions that do not show the tokens of its blocks."""
    reasons = {"pixart": "token fusion does not support PixArtMS: ", "lumina": "NextDiT is not as in ComfyUI 0.8.0"}
    assert "pixart" in results["refused"]
    for kind, refused in results["refused"].items():
        assert refused["message"].startswith(reasons[kind])
        assert refused["unchanged"] is True
