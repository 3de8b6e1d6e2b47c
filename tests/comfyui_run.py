"""Runs the nodes in ComfyUI, on a CPU, and prints what it found as JSON. See test_hosts_comfyui.py.

Models are ComfyUI's own classes at small widths with random weights, sampled by its own sampler; and the embedded
model's UNet in its layout.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import comfyui_torchvision  # noqa: F401
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)
import comfy.options  # noqa: E402  (its command line is left unread)
from comfy.cli_args import args  # noqa: E402

args.cpu = True  # before it looks for a device
import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

CPU = torch.device("cpu")
COMMON = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "use_spatial_transformer": True,
          "legacy": False, "dtype": torch.float32}  # fmt: skip
SHAPES = {
    "sd15": {**COMMON, "num_res_blocks": [2] * 4, "channel_mult": (1, 2, 2, 2), "transformer_depth": [1] * 6 + [0] * 2,
             "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "context_dim": 32,
             "adm_in_channels": None, "use_linear_in_transformer": False},
    "sdxl": {**COMMON, "num_res_blocks": [2] * 3, "channel_mult": (1, 2, 2), "transformer_depth": [0, 0, 2, 2, 10, 10],
             "transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3, "transformer_depth_middle": 10,
             "context_dim": 64, "adm_in_channels": 32 + 6 * 256, "num_classes": "sequential",
             "use_linear_in_transformer": True},
}  # fmt: skip


def nodes():
    """The two nodes, as the program loads them from custom_nodes/."""
    import asyncio

    spec = importlib.util.spec_from_file_location("custom_nodes_tofu", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_nodes_tofu"] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    fuse, show = asyncio.run(extension.get_node_list())
    return (lambda *a, **o: fuse.execute(*a, **o).result[0]), (lambda *a, **o: show.execute(*a, **o).result[0])


def random_model(kind):
    base = comfy.supported_models.SD15 if kind == "sd15" else comfy.supported_models.SDXL
    config = type("Small", (base,), {"unet_extra_config": {"num_heads": 4, "num_head_channels": -1}})(SHAPES[kind])
    config.set_inference_dtype(torch.float32, None)
    model = (comfy.model_base.BaseModel if kind == "sd15" else comfy.model_base.SDXL)(config).eval()
    g = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():  # the program leaves them as memory was
        if weight.ndim > 1:
            weight.data = torch.randn(weight.shape, generator=g) / weight[0].numel() ** 0.5
        else:
            weight.data = torch.full_like(weight, float(name.endswith("weight")))
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def sample(model, kind, h=16, w=16, steps=3):
    latent, g = torch.zeros(1, 4, h, w), torch.Generator().manual_seed(2)
    width = SHAPES[kind]["context_dim"]
    words = [
        [
            [
                torch.randn(1, 7, width, generator=g),
                {"pooled_output": torch.randn(1, 32, generator=g)} if kind == "sdxl" else {},
            ]
        ]
        for _ in range(2)
    ]
    noise = comfy.sample.prepare_noise(latent, 1)
    return comfy.sample.sample(model, noise, steps, 5.0, "euler", "normal", *words, latent, disable_pbar=True, seed=1)


def look(kind, fuse):
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    import tofu_sd.hosts.comfyui as adapter
    from tofu_sd.hosts.ldm import find_sites

    def given(output):
        return output[0] if isinstance(output, tuple) else output.result[0]

    model = random_model(kind)
    plain = sample(model, kind)
    told = []
    adapter.logger.info = told.append
    half, three = fuse(model, ratio=0.5), fuse(model, ratio=0.75, keys_only=True, proportional=True)
    first = sample(half, kind)
    other = sample(three, kind)
    drawn = [sample(fuse(model, grid_seed=3), kind) for _ in range(2)]
    tiled = given(HyperTile.execute(model=half, tile_size=64, swap_size=1, max_depth=0, scale_depth=False))
    small = given(PatchModelAddDownscale.execute(half, 3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"))
    late = sample(fuse(model, start_percent=0.5), kind)
    laws = {
        "ratio 0 is bit-equal": torch.equal(sample(fuse(model, ratio=0.0, proportional=True), kind), plain),
        "the model beside it is bit-equal": torch.equal(sample(model, kind), plain),
        "two clones at once": torch.equal(sample(half, kind), first) and torch.equal(sample(three, kind), other),
        "the same seed": torch.equal(*drawn) and not torch.equal(drawn[0], first),
        "odd latents run": sample(half, kind, 17, 23).shape == (1, 4, 17, 23),
        "HyperTile beside it": bool(sample(tiled, kind).isfinite().all()),
        "Deep Shrink beside it": bool(sample(small, kind, 32, 32).isfinite().all()),
        "the window": not (torch.equal(late, plain) or torch.equal(late, first)),
    }
    assert len(find_sites(model.model.diffusion_model)) == (16 if kind == "sd15" else 70)
    return {"headline": told[0], "changed": float((first - plain).abs().max()), "laws": laws}


class Widths(float):
    """A multiple of the first level's channels that is no whole number, of which the channels are."""

    def __mul__(self, other):
        return int(float(self) * other)

    __rmul__ = __mul__


class SixteenGroups(comfy.ops.disable_weight_init):
    """The program's layers but for the number of groups, which it has fixed at 32."""

    class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
        def __init__(self, num_groups, *rest, **more):
            super().__init__(16, *rest, **more)


def embedded():
    """How far the program's UNet with the embedded model's weights is from diffusers', plain and fused."""
    import tofu_sd
    from tofu_sd import TokenFusion, demo
    from tofu_sd.hosts.comfyui import plain
    from tofu_sd.hosts.patcher import patch_model

    pipe = demo.load()
    unet, (first, *rest) = pipe.unet, pipe.unet.config.block_out_channels
    shape = {
        **COMMON, "model_channels": first, "num_res_blocks": [2] * 3,
        "channel_mult": (1, *(Widths(width / first) for width in rest)), "transformer_depth": [1] * 4 + [0] * 2,
        "transformer_depth_output": [1] * 6 + [0] * 3, "transformer_depth_middle": 1,
        "context_dim": unet.config.cross_attention_dim, "use_linear_in_transformer": False,
    }  # fmt: skip
    own = UNetModel(**shape, num_heads=2, operations=SixteenGroups, device=CPU).eval()
    names = comfy.utils.unet_to_diffusers(shape)
    weights = unet.state_dict()
    own.load_state_dict({names[name]: weight for name, weight in weights.items()})
    patcher = comfy.model_patcher.ModelPatcher(torch.nn.Module(), load_device=CPU, offload_device=CPU)
    patcher.model.diffusion_model = own
    words = pipe.encode_prompt("A high-quality photograph of a golden torus in the desert", "cpu", 1, True)
    context = torch.cat(words[::-1])
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    t = torch.tensor([500.0, 500.0])

    def there(model):
        options = {**model.model_options["transformer_options"], "cond_or_uncond": [1, 0], "sigmas": torch.ones(2)}
        with torch.no_grad():
            return model.model.diffusion_model(x, t, context=context, transformer_options=options)

    def here():
        with torch.no_grad():
            return unet(x, t[0], encoder_hidden_states=context).sample

    def distance(a, b):
        return float((a - b).abs().max())

    base, fused = here(), {}
    methods = [
        TokenFusion(0.5), TokenFusion(0.75), TokenFusion(0.5, early="mean", late="mean", proportional=True, window=8),
        TokenFusion(0.75, early="mean", late="mean", proportional=True, keys_only=True), TokenFusion(0.5, levels=2),
    ]  # fmt: skip
    for fusion in methods:
        with tofu_sd.patched(unet, fusion, match_on="normed"):
            expected = here()
        fused[fusion.key] = distance(there(patch_model(patcher, fusion, plain)[0]), expected)
        effect = distance(expected, base)
    return {"plain": distance(there(patcher), base), "fused": fused, "effect": effect}


if __name__ == "__main__":
    fuse, show = nodes()
    found = {kind: look(kind, fuse) for kind in SHAPES}
    try:
        found["embedded"] = embedded()
    finally:
        print(json.dumps(found))
