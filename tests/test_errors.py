"""Errors state value and limit, and leave the model unchanged: bit-equal, and unpatched or patched as before."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import tiny
import torch
from anatomy import anatomy
from diffusers import (
    DiTPipeline,
    DiTTransformer2DModel,
    KandinskyV22Pipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

import tofu_sd
from tofu_sd.core.reductions import mean

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ratio below 0": ({"ratio": -0.1}, ValueError, r"ratio is -0\.1; it must be a number from 0 to 0\.75"),
    "ratio above the cells' limit": ({"ratio": 0.8}, ValueError, r"ratio is 0\.8; .* 0\.75: one token in each 2 x 2"),
    "ratio above a smaller cell's": ({"ratio": 0.6, "sy": 1}, ValueError, r"0\.6; .* 0\.5: one token in each 2 x 1"),
    "ratio NaN": ({"ratio": math.nan}, ValueError, r"ratio is nan; it must be a number from 0 to 0\.75"),
    "ratio infinite": ({"ratio": math.inf}, ValueError, r"ratio is inf; it must be a number from 0 to 0\.75"),
    "ratio a word": ({"ratio": "half"}, ValueError, r"ratio is 'half'; it must be a number from 0 to 0\.75"),
    "ratio True": ({"ratio": True}, ValueError, r"ratio is True; it must be a number"),
    "unknown option": ({"depth_spilt": 6}, TypeError, r"unknown option 'depth_spilt' \(did you mean 'depth_split'\?\)"),
    "unknown reduction": ({"late": "mlrp"}, ValueError, r"unknown reduction 'mlrp' \(did you mean 'mlerp'\?\)"),
    "levels 0": ({"levels": 0}, ValueError, "levels is 0; it must be an integer >= 1"),
    "sx 1.5": ({"sx": 1.5}, ValueError, r"sx is 1\.5; it must be an integer >= 1"),
    "sx 0": ({"sx": 0}, ValueError, "sx is 0; it must be an integer >= 1"),
    "a flag that is a word": ({"proportional": "no"}, ValueError, "proportional is 'no'; it must be True or False"),
    "a number for a reduction": (
        {"early": 3},
        ValueError,
        "unknown reduction 3; known: prune, mean, mlerp",
    ),
    "a reduction without a name": ({"late": functools.partial(mean)}, ValueError, "partial.* has no name of its own"),
    "tomesd's option": ({"max_downsampel": 2}, TypeError, r"did you mean 'max_downsample'\?\).*use_rand"),
    "start after end": ({"start": 0.6, "end": 0.4}, ValueError, r"start is 0\.6 and end is 0\.4: start must"),
    "end above 1": ({"end": 1.5}, ValueError, r"end is 1\.5; it must be a number from 0 to 1"),
    "negative seed": ({"seed": -1}, ValueError, "seed is -1; it must be None or an integer from 0 to 2147483647"),
    "depth_split -1": (
        {"depth_split": -1},
        ValueError,
        "depth_split is -1; it must be None, 'auto' or an integer >= 0",
    ),
    "match_on keys": ({"match_on": "keys"}, ValueError, "match_on is 'keys'; it must be 'hidden' or 'normed'"),
    "nothing to merge": ({"merge_attn": False}, ValueError, "all False: nothing would be merged"),
    "max_downsample 3": ({"max_downsample": 3}, ValueError, "max_downsample is 3; it must be 1, 2, 4 or 8"),
    "levels twice": ({"max_downsample": 2, "levels": 2}, ValueError, "set only one of levels and max_downsample"),
}


@pytest.mark.parametrize("patched_before", [False, True], ids=["unpatched", "patched before"])
@pytest.mark.parametrize("name", REFUSED)
def test_invalid_options_raise_with_their_value_and_change_nothing(name: str, patched_before: bool) -> None:
    options, error, message = REFUSED[name]
    unet = tiny.shallow_unet()
    if patched_before:
        tofu_sd.apply_patch(unet, 0.25, kv_only=True)
    before, config = tiny.predict(unet), tofu_sd.summary(unet).config
    structure = anatomy(unet)
    with pytest.raises(error, match=message):
        tofu_sd.apply_patch(unet, **options)
    assert torch.equal(tiny.predict(unet), before)
    assert tofu_sd.summary(unet).config == config
    if not patched_before:
        assert anatomy(unet) == structure


def _tiny_dit() -> Any:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, patch_size=2,
        norm_num_groups=4,
    )  # fmt: skip


def kandinsky_unet() -> UNet2DConditionModel:
    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    }
    return tiny.shallow_unet(**blocks)


def _unconditional_unet() -> UNet2DModel:
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    return UNet2DModel(sample_size=8, norm_num_groups=4, block_out_channels=(8,), attention_head_dim=4, **blocks)


@pytest.mark.parametrize("make", [kandinsky_unet, _unconditional_unet])
def test_model_without_eligible_blocks_raises_with_the_supported_classes(make: Any) -> None:
    model = make()
    before = anatomy(model)
    expected = rf"no eligible block in {type(model).__name__}: looked in .*Transformer2DModel.*Kandinsky"
    with pytest.raises(ValueError, match=expected):
        tofu_sd.apply_patch(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("function", [tofu_sd.apply_patch, tofu_sd.remove_patch, tofu_sd.summary])
def test_pipeline_with_an_unsupported_transformer_raises(function: Any) -> None:
    pipe = DiTPipeline(transformer=_tiny_dit(), vae=tiny.vae(), scheduler=tiny.sd15_parts()["scheduler"])
    with pytest.raises(TypeError, match="does not support DiTTransformer2DModel: where its tokens lie is not known"):
        function(pipe)


def test_pipeline_with_unsupported_unet_raises() -> None:
    pipe = KandinskyV22Pipeline(unet=kandinsky_unet(), scheduler=tiny.sd15_parts()["scheduler"], movq=tiny.vae())
    with pytest.raises(ValueError, match="no eligible block in UNet2DConditionModel"):
        tofu_sd.apply_patch(pipe)


def predict_positional(unet: Any) -> Tensor:
    """A prediction with positional arguments, as tomesd requires."""
    with torch.no_grad():
        return unet(*tiny.inputs(unet).values()).sample


def test_block_wrapped_by_tomesd_raises() -> None:
    """Both would merge; the block of tomesd would pass tokens of no h x w grid to the patched attention."""
    tomesd = pytest.importorskip("tomesd")
    unet = tiny.shallow_unet()
    tomesd.apply_patch(unet, ratio=0.5, use_rand=False)
    before, structure = predict_positional(unet), anatomy(unet)
    with pytest.raises(RuntimeError, match=r"down_blocks\.0\.attentions\.0\.transformer_blocks\.0 .*already wrapped"):
        tofu_sd.apply_patch(unet)
    assert anatomy(unet) == structure
    assert torch.equal(predict_positional(unet), before)


def test_tomesd_applied_after_the_patch_disables_its_merging() -> None:
    """Tokens of no h x w grid pass through unmerged: the patch skips them instead of raising an error."""
    tomesd = pytest.importorskip("tomesd")
    unet, other = tiny.shallow_unet(), tiny.shallow_unet()
    baseline = predict_positional(other)
    tomesd.apply_patch(tofu_sd.apply_patch(unet, 0.5), ratio=0.5, use_rand=False)
    tomesd.apply_patch(other, ratio=0.5, use_rand=False)
    assert torch.equal(predict_positional(unet), predict_positional(other))
    assert not torch.equal(predict_positional(unet), baseline)


def _replace_forward(unet: Any) -> None:
    """Replaces the forward of one attention instance by a wrapper around it, as caches do."""
    attn = unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1
    original = attn.forward
    attn.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)


@pytest.mark.parametrize("function", ["apply_patch", "patched"])
def test_attention_with_replaced_forward_raises(function: str) -> None:
    """It would run instead of the forward of the class, and merging would silently be skipped."""
    unet = tiny.shallow_unet()
    _replace_forward(unet)
    before, names = tiny.predict(unet), anatomy(unet)
    use = tofu_sd.apply_patch if function == "apply_patch" else lambda *args: tofu_sd.patched(*args).__enter__()
    with pytest.raises(RuntimeError, match=r"up_blocks\.1\..*attn layer has a `forward` of its own"):
        use(unet, 0.25)
    assert torch.equal(tiny.predict(unet), before)
    assert {n: cls for n, (cls, _) in anatomy(unet).items()} == {n: cls for n, (cls, _) in names.items()}


def test_forward_replaced_after_the_patch_stays_after_a_new_patch() -> None:
    """The wrapper contains the patched forward, as the message above asks; another ratio takes effect through it."""
    unet, new_unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5), tofu_sd.apply_patch(tiny.shallow_unet(), 0.25)
    _replace_forward(unet)
    _replace_forward(new_unet)
    assert torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.25)), tiny.predict(new_unet))


def test_missing_timestep_raises_the_error_of_the_model() -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, seed=1)
    with pytest.raises(TypeError, match="timestep"):
        unet(tiny.noise(1, 4, 16, 16))


def test_interrupted_apply_patch_restores_the_previous_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5)
    before = tiny.predict(unet)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tofu_sd.api, "summarize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tofu_sd.apply_patch(unet, 0.25)
    assert torch.equal(tiny.predict(unet), before)


def test_norm_layer_of_another_class_raises() -> None:
    class Other(torch.nn.LayerNorm):
        pass

    unet = tiny.shallow_unet()
    unet.down_blocks[0].attentions[0].transformer_blocks[0].norm1.__class__ = Other
    with pytest.raises(RuntimeError, match=r"norm layer is a .*Other, not a plain LayerNorm"):
        tofu_sd.apply_patch(unet)
    assert not any("_tofu" in vars(module) or module._forward_pre_hooks for module in unet.modules())


def test_interrupted_apply_patch_is_undone_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny.sd15_unet()
    baseline = tiny.predict(unet)
    classes = [type(module) for module in unet.modules()]

    def interrupt(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unet.up_blocks[3].attentions[1], "register_forward_pre_hook", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tofu_sd.apply_patch(unet, 0.5)
    assert [type(module) for module in unet.modules()] == classes
    assert not any(module._forward_pre_hooks or "_tofu" in vars(module) for module in unet.modules())
    assert torch.equal(tiny.predict(unet), baseline)
    assert not torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.5)), baseline)
