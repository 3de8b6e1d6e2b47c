"""Contexts that exit in any order, wrapped models, and the processors, kernels and exports that raise."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from anatomy import anatomy
from diffusers import StableDiffusionAttendAndExcitePipeline, StableDiffusionSAGPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import Tensor, nn

import tofu_sd
from tofu_sd import TokenFusionConfig
from tofu_sd.patching.patch import patch_of

# --- contexts ---------------------------------------------------------------------------------------------------------


def current_ratio(unet: Any) -> float | None:
    patch = patch_of(unet)
    return None if patch is None else patch.config.ratio


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("before", [None, 0.1])
def test_patched_contexts_may_exit_in_any_order(before: float | None, order: tuple[int, ...]) -> None:
    """The latest active context applies; after the last exit the model is unchanged."""
    unet = tiny.shallow_unet()
    if before is not None:
        tofu_sd.apply_patch(unet, before)
    original, ratios = anatomy(unet), [0.25, 0.5, 0.75]
    contexts = [tofu_sd.patched(unet, r) for r in ratios]
    for context, r in zip(contexts, ratios, strict=True):
        context.__enter__()
        assert current_ratio(unet) == r
    active = [0, 1, 2]
    for index in order:
        contexts[index].__exit__(None, None, None)
        active.remove(index)
        assert current_ratio(unet) == (ratios[active[-1]] if active else before)
    if before is None:
        assert anatomy(unet) == original
    assert not hasattr(unet, "_tofu_contexts")


def test_failing_patched_context_keeps_outer_contexts() -> None:
    unet = tiny.shallow_unet()
    with tofu_sd.patched(unet, 0.5):
        with pytest.raises(ValueError, match="ratio is 2"), tofu_sd.patched(unet, 2):
            pass
        assert current_ratio(unet) == 0.5
    assert current_ratio(unet) is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_record_maps_contexts_may_exit_in_any_order(order: tuple[int, int]) -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5)
    recordings = [tofu_sd.record_maps(unet) for _ in range(2)]
    records = [recording.__enter__() for recording in recordings]
    tiny.predict(unet)
    recordings[order[0]].__exit__(None, None, None)
    tiny.predict(unet)
    recordings[order[1]].__exit__(None, None, None)
    tiny.predict(unet)
    assert (len(records[order[0]]), len(records[order[1]])) == (3, 6)


# --- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "torch.compile": lambda unet: torch.compile(unet, backend="eager"),
    "PEFT": lambda unet: peft.get_peft_model(unet, peft.LoraConfig(target_modules=["to_q"])),
    "torch.compile of DataParallel": lambda unet: torch.compile(nn.DataParallel(unet), backend="eager"),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", WRAPPERS)
def test_patch_and_undo_work_through_a_wrapper_or_directly(name: str) -> None:
    unet = tiny.shallow_unet()
    wrapped = WRAPPERS[name](unet)
    for first, second in ((wrapped, unet), (unet, wrapped)):
        tofu_sd.apply_patch(first, 0.5)
        assert current_ratio(unet) == 0.5
        assert "on 3 of 4 transformer blocks" in tofu_sd.summary(second).headline
        tofu_sd.remove_patch(second)
        assert current_ratio(unet) is None


def test_patch_is_found_inside_a_custom_module() -> None:
    class Step(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5)
    holder = Step(unet)
    assert "on 3 of 4 transformer blocks" in tofu_sd.summary(holder).headline
    with tofu_sd.record_maps(holder) as records:
        tiny.predict(unet)
    assert len(records) == 3
    tofu_sd.remove_patch(holder)
    assert current_ratio(unet) is None


def test_multi_controlnet_raises_with_its_name() -> None:
    nets = MultiControlNetModel([tiny.controlnet(), tiny.controlnet()])
    with pytest.raises(TypeError, match=r"MultiControlNetModel holds 2 models: patch each of its `nets`"):
        tofu_sd.apply_patch(nets, 0.5)
    for net in nets.nets:
        tofu_sd.apply_patch(net, 0.5)


def test_exported_unet_raises_with_its_class_name() -> None:
    class Exported:
        unet = object()

    with pytest.raises(TypeError, match=r"the `unet` of Exported is a builtins\.object and no torch module .*ONNX"):
        tofu_sd.apply_patch(Exported(), 0.5)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_positional_arguments_follow_tomesd() -> None:
    positional = patch_of(tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, 2, 4, 2, False, True, False, True))
    assert positional is not None
    assert positional.config == TokenFusionConfig(0.5, levels=2, sx=4, sy=2, merge_mlp=True)
    with pytest.raises(TypeError, match="max_downsample is given by position and by name"):
        tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, 1, max_downsample=2)
    with pytest.raises(TypeError, match="8 arguments after the ratio; tomesd has 7"):
        tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, *range(8))


@pytest.mark.parametrize("latent", [(0, 0), (-8, -8), (64,)])
def test_latent_without_area_raises(latent: Any) -> None:
    with pytest.raises(ValueError, match="it must be a height and a width of at least 1"):
        tofu_sd.summary(tofu_sd.apply_patch(tiny.shallow_unet(), 0.5), latent)


def test_summary_counts_calls_and_maps() -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, match_interval=2)
    assert tofu_sd.summary(unet).observed == []
    call = tiny.inputs(unet)
    for t in (900, 700, 500):
        tiny.predict(unet, **{**call, "timestep": torch.tensor(t)})
    assert tofu_sd.summary(unet).observed == ["  so far: 3 calls of a block, 3 of them on merged tokens, 2 maps made"]
    tofu_sd.apply_patch(unet, 0.5, threshold=1.5)
    tiny.predict(unet)
    assert str(tofu_sd.summary(unet)).endswith("0 maps made: these options have merged nothing")


# --- processors and kernels -------------------------------------------------------------------------------------------


@pytest.fixture
def replace_attention(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    return lambda function: monkeypatch.setattr(F, "scaled_dot_product_attention", function)


ORIGINAL_ATTENTION = F.scaled_dot_product_attention


def ignores_masks(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, **more: Any) -> Tensor:
    return ORIGINAL_ATTENTION(q, k, v)


def without_mask_parameter(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    return ORIGINAL_ATTENTION(q, k, v)


def applies_masks(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    return ORIGINAL_ATTENTION(q, k, v, **more)


@pytest.mark.parametrize("function", [ignores_masks, without_mask_parameter])
def test_attention_function_that_ignores_masks_raises_under_proportional(
    function: Any, replace_attention: Callable[[Any], None]
) -> None:
    """Raises before and after the patch; without proportional attention the function may run."""
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, proportional=True)
    replace_attention(function)
    message = rf"{function.__name__}, which replaces scaled_dot_product_attention, ignores masks"
    with pytest.raises(RuntimeError, match=message):
        tiny.predict(unet)
    with pytest.raises(RuntimeError, match=message):
        tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, proportional=True)


def test_attention_function_that_applies_masks_is_accepted(replace_attention: Callable[[Any], None]) -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, proportional=True)
    expected = tiny.predict(unet)
    replace_attention(applies_masks)
    assert torch.equal(tiny.predict(unet), expected)


class Counting(AttnProcessor2_0):
    """Detects cross-attention by encoder_hidden_states, as tools for attention maps of words do."""

    def __init__(self) -> None:
        super().__init__()
        self.cross: list[bool] = []

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *a: Any, **m: Any
    ) -> Tensor:
        self.cross.append(encoder_hidden_states is not None)
        return super().__call__(attn, hidden_states, encoder_hidden_states, *a, **m)


class ProcessorWithoutMask(AttnProcessor):
    """Ignores its mask."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *a: Any, **m: Any
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states)


def test_processor_gets_no_encoder_hidden_states_in_self_attention() -> None:
    unet, processor = tiny.shallow_unet(), Counting()
    unet.set_attn_processor(processor)
    tiny.predict(tofu_sd.apply_patch(unet, 0.5))
    assert processor.cross == [False, True] * 4


@pytest.mark.parametrize(
    ("processor", "options", "message"),
    [
        (Counting(), {"kv_only": True}, "kv_only .* by which Counting may take it for cross-attention"),
        (Counting(), {"merge_crossattn": True}, "merge_crossattn gives Counting fewer queries"),
        (ProcessorWithoutMask(), {"proportional": True}, "as an attention mask, which ProcessorWithoutMask ignores"),
    ],
)
def test_incompatible_processors_raise_with_their_name(processor: Any, options: Any, message: str) -> None:
    """Raises at apply_patch, or in the first forward for a processor that is set later."""
    unet = tiny.shallow_unet()
    tofu_sd.apply_patch(unet, 0.5, **options)
    unet.set_attn_processor(processor)
    with pytest.raises(RuntimeError, match=message):
        tiny.predict(unet)
    tofu_sd.remove_patch(unet)
    with pytest.raises(RuntimeError, match=message):
        tofu_sd.apply_patch(unet, 0.5, **options)
    assert current_ratio(unet) is None


@pytest.mark.parametrize("options", [{"kv_only": True}, {"merge_crossattn": True}], ids=str)
def test_attend_and_excite_raises_and_names_the_option(options: dict[str, Any]) -> None:
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(StableDiffusionAttendAndExcitePipeline), 0.5, **options)
    call = {"token_indices": [1, 2], "max_iter_to_alter": 1, "attn_res": (16, 16), "num_inference_steps": 2}
    with pytest.raises(RuntimeError, match=r"leave (kv_only|merge_crossattn) off"):
        pipe("a fox", output_type="latent", **call)


def test_sag_pipeline_blocks_that_store_attention_maps_are_not_merged() -> None:
    """Self-attention guidance stores the attention map of the middle block and reads it as an image."""
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(StableDiffusionSAGPipeline), 0.5, levels=4)
    assert torch.isfinite(tiny.images(pipe)).all()
    rows = {row.name: row.counts.merged for row in tofu_sd.summary(pipe).rows}
    assert rows["mid_block.attentions.0.transformer_blocks.0"] > 0  # in calls without the processor of the pipeline
    assert min(rows.values()) > 0


# --- export -----------------------------------------------------------------------------------------------------------


class Step(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        out: Tensor = self.unet(x, t, c, return_dict=False)[0]
        return out


INPUTS = tiny.noise(2, 4, 16, 16), torch.tensor(500.0), tiny.noise(2, 7, 16)


@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"share_across_blocks": True}, {"kv_only": True}], ids=str)
def test_torch_export_supports_a_patched_model(options: dict[str, Any]) -> None:
    step = Step(tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, **options))
    with torch.no_grad():
        assert torch.equal(torch.export.export(step, INPUTS).module()(*INPUTS), step(*INPUTS))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_and_onnx_export_raise() -> None:
    """A trace would contain the matching of one size; without the patch both work."""
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.jit\.trace would keep .*remove_patch"):
        torch.jit.trace(Step(unet), INPUTS)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"cannot be exported to ONNX: call tofu_sd\.remove_patch"):
        torch.onnx.export(Step(unet), INPUTS, io.BytesIO(), dynamo=False)
    tofu_sd.remove_patch(unet)
    with torch.no_grad():
        traced = torch.jit.trace(Step(unet), INPUTS, check_trace=False)
        assert torch.equal(traced(*INPUTS), Step(unet)(*INPUTS))
