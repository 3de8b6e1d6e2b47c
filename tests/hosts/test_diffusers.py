"""The patch combined with other diffusers features: each combination acts and equals the oracle's merging."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import accelerate
import pytest
import tiny
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from oracle import oracle
from torch import Tensor, nn

import tofu_sd

CPU = torch.device("cpu")
Call = dict[str, Any]


def bit_equal(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors are bit-equal and finite."""
    return bool(torch.equal(a, b)) and bool(a.isfinite().all())


# --- pipelines --------------------------------------------------------------------------------------------------------

IMAGE = tiny.noise(1, 3, 128, 128).sigmoid()
MASK = torch.ones(1, 1, 128, 128).tril()


def _lcm() -> Any:
    pipe = tiny.sd15_pipe(with_unet={"time_cond_proj_dim": 8})
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


PIPELINES: dict[str, tuple[Callable[[], Any], Call]] = {
    "text-to-image": (tiny.sd15_pipe, {}),
    "without guidance": (tiny.sd15_pipe, {"guidance_scale": 1.0}),
    "three images at once": (tiny.sd15_pipe, {"prompt": ["a fox", "a cat", "a dog"], "guidance_scale": 1.0}),
    "three images, guided": (tiny.sd15_pipe, {"num_images_per_prompt": 3}),
    "136 x 200 pixels": (tiny.sd15_pipe, {"height": 136, "width": 200}),
    "img2img": (
        lambda: tiny.sd15_pipe(StableDiffusionImg2ImgPipeline),
        {"image": IMAGE, "strength": 0.6, "num_inference_steps": 4},
    ),
    "inpaint, 4 channels": (
        lambda: tiny.sd15_pipe(StableDiffusionInpaintPipeline),
        {"image": IMAGE, "mask_image": MASK, "height": 128, "width": 128, "strength": 1.0},
    ),
    "inpaint, 9 channels": (
        lambda: tiny.sd15_pipe(StableDiffusionInpaintPipeline, with_unet={"in_channels": 9}),
        {"image": IMAGE, "mask_image": MASK, "height": 128, "width": 128, "strength": 1.0},
    ),
    "ControlNet": (
        lambda: tiny.sd15_pipe(StableDiffusionControlNetPipeline, controlnet=tiny.controlnet()),
        {"image": IMAGE},
    ),
    "two ControlNets": (
        lambda: tiny.sd15_pipe(
            StableDiffusionControlNetPipeline, controlnet=[tiny.controlnet(), tiny.controlnet(seed=4)]
        ),
        {"image": [IMAGE, IMAGE]},
    ),
    "latent consistency, 2 steps": (_lcm, {"guidance_scale": 3.0}),
    "perturbed attention guidance": (
        lambda: tiny.sd15_pipe(StableDiffusionPAGPipeline, pag_applied_layers=["down_blocks.0", "up_blocks.3"]),
        {"pag_scale": 2.0},
    ),
    "SDXL": (tiny.sdxl_pipe, {}),
    "SDXL inpaint": (
        lambda: tiny.sdxl_pipe(StableDiffusionXLInpaintPipeline),
        {"image": IMAGE, "mask_image": MASK, "height": 128, "width": 128, "strength": 1.0},
    ),
    "SDXL img2img": (
        lambda: tiny.sdxl_pipe(StableDiffusionXLImg2ImgPipeline),
        {"image": IMAGE, "strength": 0.6, "num_inference_steps": 4},
    ),
}


FORMS: dict[str, Call] = {
    "tofu": {},
    "tofu+p": {"proportional": True},
    "kv:tofu+p": {"kv_only": True, "proportional": True},
    "tofu, normed": {"match_on": "normed"},
}
forms = pytest.mark.parametrize("form", FORMS)
OWN_KEYS = ("perturbed attention guidance", "fused QKV")  # their processors select the keys themselves


@forms
@pytest.mark.parametrize("name", PIPELINES)
def test_patched_pipeline_equals_the_oracle_and_is_restored(name: str, form: str) -> None:
    """Pipelines call the UNet in different ways; none may bypass merging."""
    build, call = PIPELINES[name]
    if name in OWN_KEYS and "proportional" in FORMS[form]:
        pytest.skip("refused, as another test shows")
    pipe = build()
    plain = tiny.images(pipe, **call)
    with oracle(pipe.unet, **FORMS[form]):
        expected = tiny.images(pipe, **call)
    assert not bit_equal(plain, expected)
    assert bit_equal(tiny.images(tofu_sd.apply_patch(pipe, 0.5, **FORMS[form]), **call), expected)
    assert bit_equal(tiny.images(tofu_sd.remove_patch(pipe), **call), plain)


@pytest.mark.parametrize("option", ["proportional", "kv_only"])
def test_processor_with_its_own_keys_raises(option: str) -> None:
    """Perturbed attention splits its batch and ignores the keys it gets: the option would fail or do nothing."""
    build, call = PIPELINES["perturbed attention guidance"]
    pipe = tofu_sd.apply_patch(build(), 0.5, **{option: True})
    with pytest.raises(RuntimeError, match=rf"{option} does not work with PAG\w+, which uses keys of its own"):
        tiny.images(pipe, **call)


# --- features enabled before or after the patch -----------------------------------------------------------------------


def _lora(pipe: Any) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in"], init_lora_weights=False)
    torch.manual_seed(5)
    pipe.unet.add_adapter(config)


def _ip_adapter(pipe: Any) -> None:
    pipe.unet._load_ip_adapter_weights([tiny.ip_adapter_weights(pipe.unet)])
    processor = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.processor
    assert isinstance(processor, IPAdapterAttnProcessor2_0)


IP_CALL = {"ip_adapter_image_embeds": [tiny.noise(2, 1, 8)]}
IP_MASKS = {"cross_attention_kwargs": {"ip_adapter_masks": [MASK[None, :, 0]]}}


class _DoubleOutput(ModelHook):
    """Calls the original forward and changes its output, as cache and guidance hooks do."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.fn_ref.original_forward(*args, **kwargs)


def _hook_on_the_feed_forward(pipe: Any) -> None:
    for _, block in _top(pipe.unet):
        HookRegistry.check_if_exists_or_initialize(block.ff).register_hook(_DoubleOutput(), "twice")


def _chunked(pipe: Any, dim: int = 1) -> None:
    for _, block in _top(pipe.unet):
        block.set_chunk_feed_forward(4 if dim else 1, dim=dim)


def _replaced_forwards(pipe: Any) -> None:
    """Replaces `forward` on the instances of the UNet, its stages and its transformers, as DeepCache does."""

    def replace(module: nn.Module) -> None:
        original = module.forward
        module.forward = lambda *args, **kwargs: original(*args, **kwargs)  # type: ignore[method-assign]

    for module in (
        pipe.unet,
        *pipe.unet.down_blocks,
        *pipe.unet.up_blocks,
        *(spatial_module for spatial_module, _ in _top(pipe.unet)),
    ):
        replace(module)


def _top(unet: Any) -> list[tuple[Any, Any]]:
    """Returns (transformer, its block) pairs at the highest resolution."""
    return [(a, a.transformer_blocks[0]) for a in (*unet.down_blocks[0].attentions, *unet.up_blocks[3].attentions)]


FEATURES: dict[str, tuple[Callable[[Any], Any], Call]] = {
    "LoRA": (_lora, {}),
    "IP-Adapter": (_ip_adapter, IP_CALL),
    "IP-Adapter with masks": (_ip_adapter, {**IP_CALL, **IP_MASKS}),
    "attention slicing": (lambda pipe: pipe.enable_attention_slicing(1), {}),
    "fused QKV": (lambda pipe: pipe.unet.fuse_qkv_projections(), {}),
    "another processor": (lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()), {}),
    "chunked feed-forward": (_chunked, {}),
    "feed-forward a sample at a time": (partial(_chunked, dim=0), {}),
    "FreeU": (lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6), {}),
    "sequential offload": (lambda pipe: accelerate.cpu_offload(pipe.unet, execution_device=CPU), {}),
    "model offload": (lambda pipe: accelerate.cpu_offload_with_hook(pipe.unet, CPU), {}),
    "group offload by block": (
        lambda pipe: apply_group_offloading(pipe.unet, CPU, CPU, "block_level", num_blocks_per_group=1),
        {},
    ),
    "group offload by leaf": (lambda pipe: apply_group_offloading(pipe.unet, CPU, CPU, "leaf_level"), {}),
    "layerwise casting": (lambda pipe: apply_layerwise_casting(pipe.unet, torch.bfloat16, torch.float32), {}),
    "layerwise casting, norms too": (
        lambda pipe: apply_layerwise_casting(pipe.unet, torch.bfloat16, torch.float32, skip_modules_pattern=None),
        {},
    ),
    "a hook on the feed-forward": (_hook_on_the_feed_forward, {}),
    "replaced forwards": (_replaced_forwards, {}),
}


@pytest.mark.parametrize(
    ("order", "form"),
    [("feature first", "tofu"), ("patch first", "tofu"), ("feature first", "tofu+p"), ("patch first", "kv:tofu+p")],
)
@pytest.mark.parametrize("name", FEATURES)
def test_feature_and_patch_combine_in_either_order(name: str, order: str, form: str) -> None:
    """Users load adapters and enable offloading before or after the patch. Neither may undo the other."""
    enable, call = FEATURES[name]
    if name in OWN_KEYS and "kv_only" in FORMS[form]:
        pytest.skip("refused, as another test shows")
    pipe = tiny.sd15_pipe()
    if order == "patch first":
        tofu_sd.apply_patch(pipe, 0.5, **FORMS[form])
    enable(pipe)
    if order == "feature first":
        tofu_sd.apply_patch(pipe, 0.5, **FORMS[form])
    merged = tiny.images(pipe, **call)
    tofu_sd.remove_patch(pipe)
    plain = tiny.images(pipe, **call)
    with oracle(pipe.unet, **FORMS[form]):
        expected = tiny.images(pipe, **call)
    assert not bit_equal(plain, expected)
    assert bit_equal(merged, expected)


@pytest.mark.parametrize("name", ["LoRA", "IP-Adapter", "IP-Adapter with masks", "another processor", "FreeU"])
def test_features_change_the_output(name: str) -> None:
    """Otherwise the previous test would show nothing."""
    enable, call = FEATURES[name]
    pipe = tiny.sd15_pipe()
    plain = tiny.images(pipe)
    if name == "another processor":
        assert isinstance(_top(pipe.unet)[0][1].attn1.processor, AttnProcessor2_0)
        enable(pipe)
        assert isinstance(_top(pipe.unet)[0][1].attn1.processor, AttnProcessor)
    else:
        enable(pipe)
        assert not bit_equal(tiny.images(pipe, **call), plain)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("IP-Adapter with masks", "merge_crossattn"),
        ("chunked feed-forward", "merge_mlp"),
        ("feed-forward a sample at a time", "merge_mlp"),
    ],
)
def test_layer_that_needs_all_tokens_runs_unmerged(name: str, option: str) -> None:
    """Masks and chunks need all tokens: such a layer runs unmerged, the others stay merged."""
    enable, call = FEATURES[name]
    pipe = tiny.sd15_pipe()
    enable(pipe)
    usual = tiny.images(tofu_sd.apply_patch(pipe, 0.5), **call)
    assert bit_equal(tiny.images(tofu_sd.apply_patch(pipe, 0.5, **{option: True}), **call), usual)
    pipe = tiny.sd15_pipe()
    usual = tiny.images(tofu_sd.apply_patch(pipe, 0.5))
    assert not bit_equal(tiny.images(tofu_sd.apply_patch(pipe, 0.5, **{option: True})), usual)


def test_hook_on_a_patched_layer_works_after_removal() -> None:
    """A cache hook set after the patch holds the patched layer's method. It must still work without the patch."""
    plain, unet = tiny.sd15_unet(), tofu_sd.apply_patch(tiny.sd15_unet(), 0.5)
    for model in (plain, unet):
        for _, block in _top(model):
            HookRegistry.check_if_exists_or_initialize(block.attn1).register_hook(_DoubleOutput(), "twice")
    assert not bit_equal(tiny.predict(unet), tiny.predict(plain))
    assert bit_equal(tiny.predict(tofu_sd.remove_patch(unet)), tiny.predict(plain))


# --- ControlNet -------------------------------------------------------------------------------------------------------


def test_controlnet_is_patched_only_explicitly() -> None:
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(StableDiffusionControlNetPipeline, controlnet=tiny.controlnet()), 0.5)
    assert not any("_tofu" in vars(module) for module in pipe.controlnet.modules())
    call = {"image": IMAGE}
    unet_only = tiny.images(pipe, **call)
    tofu_sd.apply_patch(pipe.controlnet, 0.5)
    both = tiny.images(pipe, **call)
    tofu_sd.remove_patch(pipe)
    tofu_sd.remove_patch(pipe.controlnet)
    assert isinstance(pipe.controlnet, ControlNetModel)
    with oracle(pipe.unet), oracle(pipe.controlnet):
        assert bit_equal(both, tiny.images(pipe, **call))
    assert not bit_equal(both, unet_only)


def _check_against_oracle(unet: Any, call: Call) -> None:
    """Checks that the patch equals the oracle, and that removing it restores the model."""

    def run() -> Tensor:
        with torch.no_grad():
            return unet(**call).sample

    plain = run()
    with oracle(unet):
        expected = run()
    assert not bit_equal(plain, expected)
    tofu_sd.apply_patch(unet, 0.5)
    assert bit_equal(run(), expected)
    tofu_sd.remove_patch(unet)
    assert bit_equal(run(), plain)


def test_controlnet_xs_merges_its_unet_and_not_its_control() -> None:
    """Its stages hold two of each layer, under their own names."""
    unet = tiny.lively(
        UNetControlNetXSModel(
            sample_size=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D",
            "CrossAttnUpBlock2D"), block_out_channels=(16, 16), ctrl_block_out_channels=(8, 8), norm_num_groups=4,
            cross_attention_dim=16, num_attention_heads=2, ctrl_num_attention_heads=2,
            ctrl_conditioning_embedding_out_channels=(4, 8), ctrl_conditioning_channels=3,
        ),
        0,
    )  # fmt: skip
    call = {"sample": tiny.noise(2, 4, 16, 16), "timestep": 500, "encoder_hidden_states": tiny.noise(2, 7, 16)}
    call["controlnet_cond"] = tiny.noise(2, 3, 32, 32)
    _check_against_oracle(unet, call)


# --- UNets without a pipeline -----------------------------------------------------------------------------------------


def _motion() -> Any:
    options = {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")}
    options |= {"up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "block_out_channels": (16, 16)}
    return tiny.lively(
        UNetMotionModel(
            sample_size=16, layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, num_attention_heads=2,
            motion_num_attention_heads=2, **options,
        ),
        0,
    )  # fmt: skip


def test_video_unet_merges_only_spatial_blocks() -> None:
    """A motion module's tokens are frames of one position: merging them over a map would mix space and time."""
    unet = _motion()
    call = {"sample": tiny.noise(1, 4, 3, 16, 16), "timestep": 10, "encoder_hidden_states": tiny.noise(3, 7, 16)}
    _check_against_oracle(unet, call)
    names = [row.name for row in tofu_sd.summary(tofu_sd.apply_patch(unet, 0.5)).rows]
    assert names
    assert not any("motion" in name for name in names)


@pytest.mark.parametrize(
    ("h", "w"), [(17, 13), (16, 16), (1, 16), (16, 1), (2, 2), (1, 1), (3, 50), (75, 128)], ids=lambda side: str(side)
)
def test_merging_equals_the_oracle_at_any_latent_size(h: int, w: int) -> None:
    """Odd sides and sides smaller than a cell; a map of one token has nothing to merge."""
    unet = tiny.shallow_unet()
    plain = tiny.predict(unet, h, w, batch=1)
    with tofu_sd.patched(unet, 0.5):
        merged = tiny.predict(unet, h, w, batch=1)
    if min(h, w) > 1:  # at side 1 a cell is 1 x 2, so at most half can merge; the oracle has no such limit
        with oracle(unet):
            assert bit_equal(merged, tiny.predict(unet, h, w, batch=1))
    assert bit_equal(merged, plain) == (h * w == 1)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_merging_equals_the_oracle_at_an_odd_full_hd_latent_in_sdxl(ratio: float) -> None:
    """135 x 240 is 68 x 120 at the first attention: the map is the layer's input, not half the latent."""
    unet = tiny.sdxl_unet(layers=(1, 1, 1))
    with tofu_sd.patched(unet, ratio):
        merged = tiny.predict(unet, 135, 240, batch=1)
        assert tofu_sd.summary(unet, (135, 240)).rows[0].size == (68, 120)
    with oracle(unet, ratio):
        assert bit_equal(merged, tiny.predict(unet, 135, 240, batch=1))


@pytest.mark.parametrize("make", [tiny.sd15_unet, tiny.sdxl_unet], ids=["SD 1.5", "SDXL"])
def test_patch_merges_the_blocks_of_the_highest_resolution_of_sd15_and_sdxl(make: Callable[[], Any]) -> None:
    """5 of 16 and 10 of 70: the highest resolution with attention, which in SDXL is not the latent's."""
    unet = make()
    summary = tofu_sd.summary(tofu_sd.apply_patch(unet, 0.5))
    assert (len(summary.rows), summary.blocks) == ((5, 16) if make is tiny.sd15_unet else (10, 70))
    reductions = [row.reduction for row in summary.rows]
    down = 2 if make is tiny.sd15_unet else 4
    assert reductions == ["prune"] * down + ["mlerp"] * (len(reductions) - down)


def test_arguments_work_by_keyword_and_by_position() -> None:
    """Pipelines pass the sample by position; ControlNet pipelines and user code pass it by name."""
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5)
    call = tiny.inputs(unet)
    with torch.no_grad():
        placed = unet(call["sample"], call["timestep"], call["encoder_hidden_states"]).sample
    assert bit_equal(placed, tiny.predict(unet))


@pytest.mark.parametrize("options", [{}, {"kv_only": True}, {"proportional": True}, {"merge_mlp": True}])
def test_gradient_checkpointing_keeps_the_gradients(options: Call) -> None:
    """A checkpointed block runs again in the backward pass and has to merge the same tokens."""
    unet = tofu_sd.apply_patch(tiny.shallow_unet().train(), 0.5, **options)

    def gradients() -> list[Tensor]:
        unet.zero_grad()
        unet(**tiny.inputs(unet)).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in unet.parameters() if parameter.grad is not None]

    whole = gradients()
    unet.enable_gradient_checkpointing()
    assert whole
    assert all(bit_equal(a, b) for a, b in zip(whole, gradients(), strict=True))
    tofu_sd.remove_patch(unet)
    assert not all(bit_equal(a, b) for a, b in zip(whole, gradients(), strict=True))


def gligen() -> tuple[Any, Call]:
    """Returns a UNet with GLIGEN's gated self-attention (open gates) and its boxes."""
    unet = tiny.shallow_unet(attention_type="gated")
    for name, parameter in unet.named_parameters():
        if "alpha_" in name:
            parameter.data.fill_(0.7)
    boxes = {
        "boxes": torch.tensor([[[0.1, 0.1, 0.6, 0.6], [0.5, 0.5, 0.9, 0.9]]]).repeat(2, 1, 1),
        "positive_embeddings": tiny.noise(2, 2, 16),
        "masks": torch.ones(2, 2),
    }
    return unet, {"cross_attention_kwargs": {"gligen": boxes}}


def test_gligen_keeps_its_boxes() -> None:
    """A reimplemented block forward would lose GLIGEN's layer; the patch keeps diffusers' block."""
    unet, call = gligen()
    plain = tiny.predict(unet, **call)
    boxless = tiny.predict(unet)
    with tofu_sd.patched(unet, 0.0):
        assert bit_equal(tiny.predict(unet, **call), plain)
    with tofu_sd.patched(unet, 0.5):
        merged, merged_boxless = tiny.predict(unet, **call), tiny.predict(unet)
    with oracle(unet):
        assert bit_equal(merged, tiny.predict(unet, **call))
    assert not bit_equal(merged, plain)
    assert not bit_equal(plain, boxless)
    assert not bit_equal(merged, merged_boxless)


def test_kv_only_with_fused_qkv_raises() -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, kv_only=True)
    separate = tiny.predict(unet)
    unet.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r"kv_only .* unfuse_qkv_projections\(\)"):
        tiny.predict(unet)
    unet.unfuse_qkv_projections()
    assert bit_equal(tiny.predict(unet), separate)


@pytest.mark.parametrize("enable", [lambda unet: unet.set_attn_processor(AttnProcessor()), lambda unet: None])
def test_proportional_attention_works_with_upcast_attention(enable: Callable[[Any], Any]) -> None:
    """Stable Diffusion 2 upcasts its scores; a bias in the tokens' dtype could not be added to them."""
    unet = tiny.shallow_unet(upcast_attention=True).to(torch.bfloat16)
    enable(unet)
    call = {name: value.bfloat16() if value.ndim else value for name, value in tiny.inputs(unet).items()}
    weighted = tiny.predict(tofu_sd.apply_patch(unet, 0.5, proportional=True), **call)
    assert weighted.isfinite().all()
    assert not bit_equal(weighted, tiny.predict(tofu_sd.apply_patch(unet, 0.5), **call))


def test_only_cross_attention_blocks_are_skipped() -> None:
    """The upscaler's attn1 attends to the text: its keys are not tokens of a map."""
    unet = tiny.shallow_unet(only_cross_attention=(True, False))
    with pytest.raises(ValueError, match="no eligible block"):
        # without a mid block, all blocks of this UNet have only cross-attention
        tofu_sd.apply_patch(tiny.shallow_unet(only_cross_attention=True, mid_block_type=None), 0.5)
    names = [row.name for row in tofu_sd.summary(tofu_sd.apply_patch(unet, 0.5)).rows]
    assert names == ["mid_block.attentions.0.transformer_blocks.0"]


def test_pipeline_from_pipe_shares_the_patch() -> None:
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(), 0.5)
    other = tiny.quiet(StableDiffusionPipeline.from_pipe(pipe))
    assert other.unet is pipe.unet
    assert tofu_sd.summary(other).config is not None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_merging_equals_the_oracle_in_any_dtype_and_memory_layout(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    unet = tiny.shallow_unet().to(dtype, memory_format=layout)
    call = {name: value.to(dtype) if value.ndim else value for name, value in tiny.inputs(unet).items()}
    plain = tiny.predict(unet, **call)
    with oracle(unet):
        expected = tiny.predict(unet, **call)
    merged = tiny.predict(tofu_sd.apply_patch(unet, 0.5), **call)
    assert merged.dtype == dtype
    assert bit_equal(merged, expected)
    assert not bit_equal(merged, plain)
