"""Recipe TOME is tomesd 0.1.3 (use_rand=False): published ToMe for Stable Diffusion, equal up to rounding."""

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


def predict(unet: Any, h: int, w: int) -> Tensor:
    """Runs one noise prediction with positional arguments: tomesd reads the latent size from the first.

    float64 keeps the order of additions from deciding between two almost equal matches.
    """
    with torch.no_grad():
        return unet.double()(*(v.double() if v.ndim else v for v in tiny.inputs(unet, h, w).values())).sample


@pytest.mark.parametrize(("h", "w"), [(16, 16), (17, 13), (24, 40), (33, 32)])
@pytest.mark.parametrize(
    ("ratio", "layers"), [(0.25, {}), (0.75, {}), *((0.5, layers) for layers in LAYERS)], ids=lambda value: str(value)
)
def test_tome_recipe_equals_tomesd(h: int, w: int, ratio: float, layers: dict[str, Any]) -> None:
    unet = tiny.sd15_unet()
    baseline = predict(unet, h, w)
    ours = predict(tofu_sd.apply_patch(unet, named("tome", ratio), **layers), h, w)
    theirs = predict(tomesd.apply_patch(tofu_sd.remove_patch(unet), ratio=ratio, use_rand=False, **layers), h, w)
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=1e-11
    )  # float64 differs by 1e-14; the documented limit is 1e-5
    assert (ours - baseline).abs().max() > 1e-3


def test_tomesd_call_works_with_only_the_import_changed() -> None:
    unet, other = tiny.sd15_unet(), tiny.sd15_unet()
    call = {"ratio": 0.5, "max_downsample": 2, "sx": 2, "sy": 2, "merge_attn": True, "merge_crossattn": False}
    call |= {"merge_mlp": False, "use_rand": False}
    ours = predict(tofu_sd.apply_patch(unet, **call, early="mean", late="mean"), 16, 16)
    theirs = predict(tomesd.apply_patch(other, **call), 16, 16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)  # as above
