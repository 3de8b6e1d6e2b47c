"""Runs the adapter in AUTOMATIC1111's UNets, on a CPU. See tests/hosts/test_ldm.py.

These are ldm's (SD 1.x, 2.x) and sgm's (SDXL), from its repositories/. The predictions are written to a folder, the
results are printed as JSON.
"""

from __future__ import annotations

import json
import sys

import diffusers_reference
import torch
from safetensors.torch import save_file

from tofu_sd.hosts import ldm

torch.set_num_threads(1)
COMMON = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 2, "num_heads": 4,
          "use_spatial_transformer": True, "use_checkpoint": True}  # fmt: skip


def unet(kind):
    if kind == "sd15":
        from ldm.modules.diffusionmodules.openaimodel import UNetModel

        return UNetModel(image_size=32, **COMMON, attention_resolutions=[4, 2, 1], channel_mult=(1, 2, 2, 2),
                         context_dim=32, legacy=False)  # fmt: skip
    from sgm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**COMMON, attention_resolutions=[4, 2], channel_mult=(1, 2, 2), transformer_depth=[1, 2, 10],
                     context_dim=64, adm_in_channels=32 + 6 * 256, num_classes="sequential",
                     use_linear_in_transformer=True, legacy=False)  # fmt: skip


def run_checks(kind, folder):
    model, inputs = diffusers_reference.randomize(unet(kind)), diffusers_reference.inputs(kind)

    def predict():
        with torch.no_grad():
            return model(inputs["x"], timesteps=inputs["t"], context=inputs["context"], y=inputs.get("y"))

    def state():
        return [(name, type(module), sorted(vars(module)), len(module._forward_pre_hooks))
                for name, module in model.named_modules()]  # fmt: skip

    before, predictions = state(), {"plain": predict()}
    headlines = []
    for config in diffusers_reference.methods():
        headlines.append(ldm.apply(model, config).headline)
        predictions[config.slug] = predict()
        ldm.restore(model)
    save_file({f"weights.{k}": v.contiguous() for k, v in model.state_dict().items()} | predictions, f"{folder}/{kind}")
    checks = {
        "restored it is bit-equal": torch.equal(predict(), predictions["plain"]),
        "nothing is left": state() == before,
    }
    return {"headline": headlines[0], "class": type(model).__module__, "checks": checks}


if __name__ == "__main__":
    print(json.dumps({kind: run_checks(kind, sys.argv[1]) for kind in diffusers_reference.UNETS}))
