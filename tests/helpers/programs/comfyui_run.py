"""Runs the nodes in ComfyUI, on a CPU, and prints the results as JSON. See tests/hosts/test_comfyui.py.

The models are ComfyUI's own classes at small widths with random weights, run by ComfyUI's sampler, and the embedded
model's UNet in ComfyUI's layout.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import comfyui_torchvision  # noqa: F401
import diffusers_reference
import torch

ROOT = Path(__file__).resolve().parents[3]
torch.set_num_threads(1)
import comfy.options  # noqa: E402  (ComfyUI must not parse this command line)
from comfy.cli_args import args  # noqa: E402

args.cpu = True  # before ComfyUI selects a device
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


def node(kind):
    """Returns a node of either interface as a function that returns its first output."""

    def call(*values, **options):
        run = kind.execute if hasattr(kind, "define_schema") else getattr(kind(), kind.FUNCTION)
        outputs = run(*values, **options)
        return (outputs if isinstance(outputs, tuple) else outputs.result)[0]

    return call


def nodes():
    """Returns the two nodes, loaded as ComfyUI loads them from custom_nodes/."""
    import asyncio

    spec = importlib.util.spec_from_file_location("custom_nodes_tofu", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_nodes_tofu"] = module
    spec.loader.exec_module(module)
    if hasattr(module, "comfy_entrypoint"):
        kinds = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    else:
        kinds = module.NODE_CLASS_MAPPINGS.values()
    return [node(kind) for kind in kinds]


def random_model(kind):
    base = comfy.supported_models.SD15 if kind == "sd15" else comfy.supported_models.SDXL
    config = type("Small", (base,), {"unet_extra_config": {"num_heads": 4, "num_head_channels": -1}})(SHAPES[kind])
    config.set_inference_dtype(torch.float32, None)
    model = (comfy.model_base.BaseModel if kind == "sd15" else comfy.model_base.SDXL)(config).eval()
    diffusers_reference.randomize(model)  # ComfyUI leaves the weights uninitialized
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def sample(model, kind, h=16, w=16, steps=3, callback=None, frames=1, words=None):
    """Samples with ComfyUI's own sampler and the global generator at seed 0.

    Args:
        words: a function that replaces both prompts.
    """
    torch.manual_seed(0)
    latent, g, add = torch.zeros(frames, 4, h, w), torch.Generator().manual_seed(2), words
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
    words = add(*words) if add else words
    noise = comfy.sample.prepare_noise(latent, 1)
    return comfy.sample.sample(
        model, noise, steps, 5.0, "euler", "normal", *words, latent, disable_pbar=True, seed=1, callback=callback
    )


def run_checks(kind, patch):
    import tofu_sd.hosts.comfyui as adapter
    from tofu_sd.hosts.ldm import find_places

    model = random_model(kind)
    plain, messages = sample(model, kind), []
    generator_state = torch.get_rng_state()
    adapter.logger.info = messages.append
    half, three = patch(model, ratio=0.5), patch(model, ratio=0.75, kv_only=True, proportional=True)
    first = sample(half, kind)
    other = sample(three, kind)
    images = [sample(patch(model, grid_seed=3), kind) for _ in range(2)]
    same_generator = torch.equal(torch.get_rng_state(), generator_state)
    late = sample(patch(model, start_percent=0.5), kind)
    checks = {
        "ratio 0 is bit-equal": torch.equal(sample(patch(model, ratio=0.0, proportional=True), kind), plain),
        "two clones at once": torch.equal(sample(half, kind), first) and torch.equal(sample(three, kind), other),
        "the same seed": torch.equal(*images) and not torch.equal(images[0], first),
        "the global generator is unchanged": same_generator,
        "odd latents run": sample(half, kind, 17, 23).shape == (1, 4, 17, 23),
        "the window": not (torch.equal(late, plain) or torch.equal(late, first)),
        **check_other_nodes(kind, patch, model),
        **check_guidance(kind, patch, model),
        **(check_compiled(kind, patch, model) if kind == "sd15" else {}),
        **check_interrupt(kind, half, first),
        "the unpatched model is bit-equal": torch.equal(sample(model, kind), plain),
    }
    assert len(find_places(model.model.diffusion_model)) == (16 if kind == "sd15" else 70)
    changed = float((first - plain).abs().max())
    return {
        "headline": messages[0],
        "changed": changed,
        "checks": checks,
        "diffusers": compare_with_diffusers(kind, model),
    }


def check_other_nodes(kind, patch, model):
    """Checks combinations with ComfyUI's own nodes, in both orders."""
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
    from comfy_extras.nodes_tomesd import TomePatchModel

    from tofu_sd.hosts.programs.model_patcher import patches_of

    size = 32 if kind == "sd15" else 64  # HyperTile's tiles are smaller than the largest map with attention
    depth = 0 if kind == "sd15" else 1

    def tiled(model):
        return node(HyperTile)(model=model, tile_size=64, swap_size=1, max_depth=depth, scale_depth=False)

    def shrunk(model):  # within the merged blocks, to a size that is no halved latent
        block = 1 if kind == "sd15" else 3
        return node(PatchModelAddDownscale)(model, block, 1.6, 0.0, 1.0, True, "bicubic", "bicubic")

    def merged(model):
        return node(TomePatchModel)(model=model, ratio=0.5)

    def generate(model):
        return sample(model, kind, size, size, steps=1)

    def both_act(together, *alone):
        return bool(together.isfinite().all()) and not any(torch.equal(together, one) for one in alone)

    half = patch(model)
    plain, ours = generate(model), generate(half)
    tiles, small, tome = generate(tiled(model)), generate(shrunk(model)), generate(merged(model))
    two = patch(model, levels=2)
    maps, watched = set(), patch(shrunk(model))
    patches_of(watched).on_map = lambda place, map, h, w: maps.add((h, w))
    merged_and_small = generate(watched)
    return {
        # a block that HyperTile tiles stays unmerged, in either order
        "HyperTile after it": torch.equal(generate(tiled(half)), tiles) and not torch.equal(tiles, plain),
        "HyperTile before it": torch.equal(generate(patch(tiled(model))), tiles),
        "HyperTile on other blocks": both_act(generate(tiled(two)), tiles, generate(two)),
        "with Deep Shrink": both_act(merged_and_small, ours, small)
        and torch.equal(generate(shrunk(half)), merged_and_small) and maps == {(32, 32), (20, 20)},
        # the built-in merging does nothing on SDXL
        "with the built-in merging tokens are merged once": all(
            torch.equal(generate(both), tome if kind == "sd15" else ours)
            for both in (merged(half), patch(merged(model)))
        )
        and torch.equal(tome, plain) == (kind == "sdxl"),
    }  # fmt: skip


def check_guidance(kind, patch, model):
    """Checks guidance that replaces self-attention, and a sampling that is changed after the patch."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    def pag(model):
        return node(PerturbedAttentionGuidance)(model=model, scale=3.0)

    def sag(model):
        return node(SelfAttentionGuidance)(model=model, scale=0.5, blur_sigma=2.0)

    def lcm(model):
        return node(ModelSamplingDiscrete)(model=model, sampling="lcm", zsnr=True)

    def generate(model):
        return sample(model, kind, 32, 32, steps=2)

    whole = patch(model, preset="faithful", levels=4)
    window = {"start_percent": 0.3, "end_percent": 0.8}
    ours, guides = generate(whole), {"PAG": pag, "SAG": sag}
    return {
        **{f"{name} acts with four levels": not torch.equal(generate(guide(whole)), ours)
           and torch.equal(generate(guide(whole)), generate(patch(guide(model), preset="faithful", levels=4)))
           for name, guide in guides.items()},
        "the window is that of the sampling": torch.equal(
            generate(lcm(patch(model, **window))), generate(patch(lcm(model), **window))
        ),
    }  # fmt: skip


def check_compiled(kind, patch, model):
    """Checks a model compiled without guards on its patches, as ComfyUI's newer node compiles."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def fast(model):
        clone = model.clone()
        options = {"guard_filter_fn": lambda guards: ["transformer_options" not in guard.name for guard in guards]}
        set_torch_compile_wrapper(model=clone, backend="eager", options=options)
        return clone

    def generate(model):
        return sample(model, kind, steps=1)

    models = {"plain": model, "half": patch(model), "most": patch(model, ratio=0.75),
              "weighted": patch(model, preset="faithful")}  # fmt: skip
    expected = {name: generate(one) for name, one in models.items()}
    checks = {}
    for order in (("plain", "half", "plain"), ("half", "most", "half"), ("weighted", "half", "weighted"),
                  ("half", "plain")):  # fmt: skip
        torch._dynamo.reset()
        same = [torch.allclose(generate(fast(models[name])), expected[name], atol=1e-4) for name in order]
        checks[f"compiled, {' then '.join(order)}"] = all(same)
    return checks


def check_interrupt(kind, half, first):
    """Checks the image after an interrupted one."""
    from comfy.model_management import InterruptProcessingException

    def callback(step, *rest):
        if step == 1:
            raise InterruptProcessingException

    try:
        sample(half, kind, callback=callback)
    except InterruptProcessingException:
        return {"the same image after an interrupt": torch.equal(sample(half, kind), first)}
    return {"the same image after an interrupt": False}


def predict_all(patcher, x, t, context, y=None):
    """Returns the predictions of ComfyUI's UNet: unpatched and with every method."""
    from tofu_sd.hosts.comfyui import plain
    from tofu_sd.hosts.programs.model_patcher import patch_model

    models = {"plain": patcher} | {f.slug: patch_model(patcher, f, plain)[0] for f in diffusers_reference.methods()}
    step_options, predictions = {"cond_or_uncond": [1, 0], "sigmas": torch.ones(2)}, {}
    for name, model in models.items():
        options = {**model.model_options["transformer_options"], **step_options}
        with torch.no_grad():
            predictions[name] = model.model.diffusion_model(x, t, context=context, y=y, transformer_options=options)
    return predictions


def compare_with_diffusers(kind, model):
    """Returns the distances between one call of the model and diffusers with the same weights."""
    inputs = diffusers_reference.inputs(kind)
    predictions = predict_all(model, inputs["x"], inputs["t"], inputs["context"], inputs.get("y"))
    return diffusers_reference.distances(kind, model.model.diffusion_model.state_dict(), predictions, match_on="normed")


class Widths(float):
    """A fractional multiple of the first level's channels; the product is an integer."""

    def __mul__(self, other):
        return int(float(self) * other)

    __rmul__ = __mul__


class SixteenGroups(comfy.ops.disable_weight_init):
    """ComfyUI's layers with 16 groups; ComfyUI fixes the number at 32."""

    class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
        def __init__(self, num_groups, *rest, **more):
            super().__init__(16, *rest, **more)


def embedded():
    """Returns the distances between ComfyUI's UNet and diffusers' with the embedded model's weights."""
    from tofu_sd import demo

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

    def generate():
        with torch.no_grad():
            return unet(x, 500.0, encoder_hidden_states=context).sample

    predictions = predict_all(patcher, x, torch.tensor([500.0, 500.0]), context)
    return diffusers_reference.compare(unet, generate, predictions, match_on="normed")


if __name__ == "__main__":
    patch, show = nodes()
    every = partial(patch, min_tokens=0)  # otherwise it depends on the machine's load where tokens merge
    results = {kind: run_checks(kind, every) for kind in SHAPES}
    try:
        results["embedded"] = embedded()
    finally:
        print(json.dumps(results))
