"""Recipe TOME is tomesd 0.1.3 (use_rand=False): the published ToMe for Stable Diffusion, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import tofu_sd
from tofu_sd.recipes import named

tomesd = pytest.importorskip("tomesd")


LAYERS: list[dict[str, Any]] = [{}, {"merge_mlp": True}, {"merge_crossattn": True}]
LAYERS += [{"merge_mlp": True, "merge_crossattn": True}, {"merge_attn": False, "merge_mlp": True}]


def tomesd_predicts(unet: Any, h: int, w: int, **options: Any) -> Tensor:
    """One noise prediction, arguments by place: tomesd reads the latent's size from the first of them."""
    tomesd.apply_patch(unet, use_rand=False, **options)
    with torch.no_grad():
        return unet(*tiny.inputs(unet, h, w).values()).sample


@pytest.mark.parametrize(("h", "w"), [(16, 16), (17, 13), (24, 40), (33, 32)])
@pytest.mark.parametrize(
    ("ratio", "layers"), [(0.25, {}), (0.75, {}), *((0.5, layers) for layers in LAYERS)], ids=lambda value: str(value)
)
def test_tome_is_tomesd(h: int, w: int, ratio: float, layers: dict[str, Any]) -> None:
    unet = tiny.sd15_unet()
    plain = tiny.predict(unet, h, w)
    ours = tiny.predict(tofu_sd.apply_patch(unet, named("tome", ratio), **layers), h, w)
    theirs = tomesd_predicts(tofu_sd.remove_patch(unet), h, w, ratio=ratio, **layers)
    # sums over a group are taken in another order, which float32 rounds at 1e-7 of outputs near 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


def test_tomesds_call_works_with_the_import_changed() -> None:
    unet, other = tiny.sd15_unet(), tiny.sd15_unet()
    call = {"ratio": 0.5, "max_downsample": 2, "sx": 2, "sy": 2, "merge_attn": True, "merge_crossattn": False}
    call |= {"merge_mlp": False}
    ours = tiny.predict(tofu_sd.apply_patch(unet, **call, use_rand=False, early="mean", late="mean"))
    torch.testing.assert_close(ours, tomesd_predicts(other, 16, 16, **call), rtol=0, atol=1e-5)  # as above
