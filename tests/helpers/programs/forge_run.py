"""Runs the adapter in the UNet of Forge, Forge Neo, Forge Classic or reForge, on a CPU. See
tests/hosts/test_forge.py.

The predictions are written to a folder, the results are printed as JSON.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import comfyui_torchvision  # noqa: F401
import diffusers_reference
import torch

torch.set_num_threads(1)
FOLDER = sys.argv[1]
NEO = Path("modules_forge/packages").is_dir()  # Forge Neo has other names for both options
sys.argv = ["forge", *(["--cpu", "--force-fp32"] if NEO else ["--always-cpu", "--all-in-fp32"])]
COMMON = {"in_channels": 4, "model_channels": 32, "out_channels": 4, "num_heads": 4, "use_spatial_transformer": True}
# the settings that Forge Neo's and Forge Classic's own merging reads
SETTINGS = types.SimpleNamespace(token_merging_stride=2, token_merging_downsample=1, token_merging_no_rand=False)
if Path("backend").is_dir():
    if NEO:  # Forge Neo has no settings before a full start
        from modules import shared

        shared.opts = SETTINGS
    from backend.attention import attention_function
    from backend.misc.tomesd import TomePatcher
    from backend.nn.unet import IntegratedUNet2DConditionModel as UNetModel
    from backend.patcher.unet import UnetPatcher
else:
    from ldm_patched.modules.args_parser import args

    args.always_cpu = args.all_in_fp32 = True  # reForge parses its command line only in a full start
    try:
        from ldm_patched.contrib.nodes_tomesd import TomePatcher
    except ImportError:  # Forge Classic, whose merging reads the settings
        sys.modules["modules.shared"] = types.SimpleNamespace(opts=SETTINGS)
        from ldm_patched.modules.tomesd import TomePatcher
    from ldm_patched.ldm.modules.attention import optimized_attention as attention_function
    from ldm_patched.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from modules_forge.unet_patcher import UnetPatcher

    COMMON |= {"image_size": 32, "legacy": False}
from safetensors.torch import save_file  # noqa: E402

from tofu_sd import TokenFusionConfig  # noqa: E402
from tofu_sd.hosts.programs.model_patcher import patch_model  # noqa: E402

SHAPES = {
    "sd15": {**COMMON, "num_res_blocks": [2] * 4, "channel_mult": (1, 2, 2, 2), "transformer_depth": [1] * 6 + [0] * 2,
             "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "context_dim": 32},
    "sdxl": {**COMMON, "num_res_blocks": [2] * 3, "channel_mult": (1, 2, 2), "transformer_depth": [0, 0, 2, 2, 10, 10],
             "transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3, "transformer_depth_middle": 10,
             "context_dim": 64, "use_linear_in_transformer": True, "num_classes": "sequential",
             "adm_in_channels": 32 + 6 * 256},
}  # fmt: skip


class Holder(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.diffusion_model = unet


def plain(q, k, v, heads, options):
    return attention_function(q, k, v, heads)


def run_checks(kind, folder):
    unet = diffusers_reference.randomize(UNetModel(**SHAPES[kind]))
    cpu = torch.device("cpu")
    patcher = UnetPatcher(Holder(unet), load_device=cpu, offload_device=cpu)

    def predict(model, h=16, w=16, sigma=5.0):
        inputs = diffusers_reference.inputs(kind)
        x = torch.randn(2, 4, h, w, generator=torch.Generator().manual_seed(1)) if h else inputs["x"]
        step_options = {"cond_or_uncond": [1, 0], "sigmas": torch.full((2,), sigma)}
        options = {**model.model_options.get("transformer_options", {}), **step_options}
        with torch.no_grad():
            return model.model.diffusion_model(
                x, inputs["t"], context=inputs["context"], y=inputs.get("y"), transformer_options=options
            )

    def merge(model=patcher, ratio=0.5, **options):
        return patch_model(model, TokenFusionConfig.of(ratio, **options), plain, lambda percent: 10 * (1 - percent))[0]

    before, half, weighted = predict(patcher), merge(), merge(proportional=True, early="mean", late="mean")
    headline = patch_model(patcher, TokenFusionConfig(0.5), plain)[1].headline
    first = predict(half)
    shrunk = merge().clone()

    def shrink(h, options):
        return torch.nn.functional.interpolate(h, scale_factor=0.5) if options["block"][1] == 3 else h

    def grow(h, skip, options):
        return torch.nn.functional.interpolate(h, size=skip.shape[-2:]), skip

    shrunk.set_model_input_block_patch_after_skip(shrink)
    shrunk.set_model_output_block_patch(grow)
    predictions = {f.slug: predict(patch_model(patcher, f, plain)[0], 0) for f in diffusers_reference.methods()}
    weights = {f"weights.{name}": weight.contiguous() for name, weight in unet.state_dict().items()}
    save_file({**weights, **predictions, "plain": predict(patcher, 0)}, f"{folder}/{kind}")
    built_in = TomePatcher().patch(patcher, 0.5)
    checks = {
        "ratio 0 is bit-equal": torch.equal(predict(merge(ratio=0.0, proportional=True)), before),
        "the unpatched model is bit-equal": torch.equal(predict(patcher), before),
        "two clones at once": torch.equal(predict(half), first) and not torch.equal(predict(weighted), first),
        "the same seed": torch.equal(predict(merge(seed=3)), predict(merge(seed=3))),
        "odd latents run": predict(half, 17, 13).shape == (2, 4, 17, 13),
        "a map made smaller in between": bool(predict(shrunk, 32, 32).isfinite().all()),
        "the window": torch.equal(predict(merge(start=0.6)), before) and torch.equal(predict(merge(start=0.4)), first),
        # the built-in merging does nothing on SDXL
        "with the built-in merging tokens are merged once": merges_after(built_in, merge, predict) == (kind == "sdxl"),
    }
    return {"headline": headline, "changed": float((first - before).abs().max()), "checks": checks}


def merges_after(built_in, merge, predict):
    """Returns whether Token Fusion merges: after the built-in merging of queries it gets no full map."""
    records = []
    model = merge(built_in)
    patches = model.model_options["transformer_options"]["patches"]["attn1_patch"][-1].__self__
    patches.on_map = lambda *record: records.append(record)
    predict(model)
    return bool(records)


if __name__ == "__main__":
    print(json.dumps({kind: run_checks(kind, FOLDER) for kind in SHAPES}))
