"""Bad input names the value and the limit, and leaves the model as it was: bit-equal, unmarked or patched as before."""

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
    SD3Transformer2DModel,
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
    "a number for a reduction": ({"early": 3}, ValueError, "unknown reduction 3; known: prune, mean, mlerp"),
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
    "nothing to fuse": ({"merge_attn": False}, ValueError, "all False: nothing would be merged"),
    "max_downsample 3": ({"max_downsample": 3}, ValueError, "max_downsample is 3; it must be 1, 2, 4 or 8"),
    "levels twice": ({"max_downsample": 2, "levels": 2}, ValueError, "set only one of levels and max_downsample"),
}


@pytest.mark.parametrize("patched_before", [False, True], ids=["unpatched", "patched before"])
@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_are_named_and_change_nothing(name: str, patched_before: bool) -> None:
    options, error, message = REFUSED[name]
    unet = tiny.shallow_unet()
    if patched_before:
        tofu_sd.apply_patch(unet, 0.25, kv_only=True)
    before, fusion = tiny.predict(unet), tofu_sd.summary(unet).config
    structure = anatomy(unet)
    with pytest.raises(error, match=message):
        tofu_sd.apply_patch(unet, **options)
    assert torch.equal(tiny.predict(unet), before)
    assert tofu_sd.summary(unet).config == fusion
    if not patched_before:
        assert anatomy(unet) == structure


def _dit() -> Any:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, patch_size=2,
        norm_num_groups=4,
    )  # fmt: skip


def _sd3() -> Any:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip


def kandinsky_unet() -> UNet2DConditionModel:
    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    }
    return tiny.shallow_unet(**blocks)


def _unconditional() -> UNet2DModel:
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    return UNet2DModel(sample_size=8, norm_num_groups=4, block_out_channels=(8,), attention_head_dim=4, **blocks)


@pytest.mark.parametrize("make", [_dit, _sd3, kandinsky_unet, _unconditional])
def test_a_model_without_an_eligible_block_says_what_was_looked_for(make: Any) -> None:
    model = make()
    before = anatomy(model)
    looked = rf"no eligible block in {type(model).__name__}: looked in .*Transformer2DModel.*DiT.*Kandinsky"
    with pytest.raises(ValueError, match=looked):
        tofu_sd.apply_patch(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("verb", [tofu_sd.apply_patch, tofu_sd.remove_patch, tofu_sd.summary])
def test_a_pipeline_without_a_unet_says_so(verb: Any) -> None:
    pipe = DiTPipeline(transformer=_dit(), vae=tiny.vae(), scheduler=tiny.sd15_parts()["scheduler"])
    with pytest.raises(TypeError, match="DiTPipeline has no `unet`"):
        verb(pipe)


def test_a_pipeline_whose_unet_is_another_kind() -> None:
    pipe = KandinskyV22Pipeline(unet=kandinsky_unet(), scheduler=tiny.sd15_parts()["scheduler"], movq=tiny.vae())
    with pytest.raises(ValueError, match="no eligible block in UNet2DConditionModel"):
        tofu_sd.apply_patch(pipe)


def placed(unet: Any) -> Tensor:
    """A prediction with the arguments by place, as tomesd needs them."""
    with torch.no_grad():
        return unet(*tiny.inputs(unet).values()).sample


def test_a_block_wrapped_by_tomesd_is_refused() -> None:
    """Both would merge; tomesd's block would hand the patched attention tokens of no map."""
    tomesd = pytest.importorskip("tomesd")
    unet = tiny.shallow_unet()
    tomesd.apply_patch(unet, ratio=0.5, use_rand=False)
    before, structure = placed(unet), anatomy(unet)
    with pytest.raises(RuntimeError, match=r"down_blocks\.0\.attentions\.0\.transformer_blocks\.0 .*already wrapped"):
        tofu_sd.apply_patch(unet)
    assert anatomy(unet) == structure
    assert torch.equal(placed(unet), before)


def test_tomesd_on_top_of_the_patch_merges_alone() -> None:
    """Tokens that are no map's pass through: the patch stands aside rather than break."""
    tomesd = pytest.importorskip("tomesd")
    unet, other = tiny.shallow_unet(), tiny.shallow_unet()
    plain = placed(other)
    tomesd.apply_patch(tofu_sd.apply_patch(unet, 0.5), ratio=0.5, use_rand=False)
    tomesd.apply_patch(other, ratio=0.5, use_rand=False)
    assert torch.equal(placed(unet), placed(other))
    assert not torch.equal(placed(unet), plain)


def _doubled(unet: Any) -> None:
    """What a cache does: the attention's forward is replaced on the instance by one that calls what it found."""
    attn = unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1
    original = attn.forward
    attn.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)


@pytest.mark.parametrize("verb", ["apply_patch", "patched"])
def test_an_attention_with_a_forward_of_its_own_is_refused(verb: str) -> None:
    """It would run before the class's own: fusion would be passed over in silence."""
    unet = tiny.shallow_unet()
    _doubled(unet)
    before, names = tiny.predict(unet), anatomy(unet)
    use = tofu_sd.apply_patch if verb == "apply_patch" else lambda *args: tofu_sd.patched(*args).__enter__()
    with pytest.raises(RuntimeError, match=r"up_blocks\.1\..*attn layer has a `forward` of its own"):
        use(unet, 0.25)
    assert torch.equal(tiny.predict(unet), before)
    assert {n: cls for n, (cls, _) in anatomy(unet).items()} == {n: cls for n, (cls, _) in names.items()}


def test_what_came_after_the_patch_stays_when_the_patch_changes() -> None:
    """It holds the patched forward, as the message above asks for: another ratio goes through it too."""
    unet, fresh = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5), tofu_sd.apply_patch(tiny.shallow_unet(), 0.25)
    _doubled(unet)
    _doubled(fresh)
    assert torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.25)), tiny.predict(fresh))


def test_a_missing_timestep_is_the_models_own_error() -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, seed=1)
    with pytest.raises(TypeError, match="timestep"):
        unet(tiny.noise(1, 4, 16, 16))


def test_an_interrupt_while_patching_puts_the_earlier_patch_back(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5)
    before = tiny.predict(unet)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tofu_sd.api, "summarize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tofu_sd.apply_patch(unet, 0.25)
    assert torch.equal(tiny.predict(unet), before)


def test_a_layer_of_another_class_is_refused() -> None:
    class Other(torch.nn.LayerNorm):
        pass

    unet = tiny.shallow_unet()
    unet.down_blocks[0].attentions[0].transformer_blocks[0].norm1.__class__ = Other
    with pytest.raises(RuntimeError, match=r"norm layer is a .*Other, not a plain LayerNorm"):
        tofu_sd.apply_patch(unet)
    assert not any("_tofu" in vars(module) or module._forward_pre_hooks for module in unet.modules())


def test_an_interrupt_while_the_patch_is_put_on_leaves_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny.sd15_unet()
    plain = tiny.predict(unet)
    classes = [type(module) for module in unet.modules()]

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(unet.up_blocks[3].attentions[1], "register_forward_pre_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tofu_sd.apply_patch(unet, 0.5)
    monkeypatch.undo()
    assert [type(module) for module in unet.modules()] == classes
    assert not any(module._forward_pre_hooks or "_tofu" in vars(module) for module in unet.modules())
    assert torch.equal(tiny.predict(unet), plain)
    assert not torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.5)), plain)
