"""Runs the nodes on diffusion transformers in ComfyUI, on a CPU, and prints the results as JSON.

The models are ComfyUI's own classes with few layers and random weights, run by ComfyUI's sampler. See
tests/hosts/test_comfyui_transformers.py.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import traceback

import torch

from comfyui_run import CPU, ROOT, nodes  # isort: skip  (sets ComfyUI up)
import comfy.model_base
import comfy.model_detection
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.lumina.model import NextDiT

TEXT, WIDTH = 7, 32  # tokens of a prompt and their channels
FLUX = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 16, "context_in_dim": WIDTH,
        "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False}  # fmt: skip
NEWER = "txt_ids_dims" in FluxParams.__dataclass_fields__
if NEWER:
    FLUX["txt_ids_dims"] = []
SD3 = {"input_size": None, "patch_size": 2, "in_channels": 16, "depth": 3, "adm_in_channels": 32,
       "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 192}},
       "pos_embed_scaling_factor": None, "pos_embed_max_size": 48, "num_patches": 48 * 48, "qk_norm": "rms",
       "x_block_self_attn_layers": [0, 1], "context_size": WIDTH}  # fmt: skip
CHROMA = {**FLUX, "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 32,
          "hidden_dim": 32, "n_layers": 1}  # fmt: skip
CHROMA = {key: CHROMA[key] for key in ("image_model", *ChromaParams.__dataclass_fields__)}
QWEN = {"image_model": "qwen_image", "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6)}  # fmt: skip
FLUX2 = {**FLUX, "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None,
         "axes_dim": [4, 4, 4, 4], "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True,
         "qkv_bias": False, "ops_bias": False, "default_ref_method": "index"}  # fmt: skip
NEXT = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 32, "n_layers": 3, "n_refiner_layers": 1,
        "n_heads": 2, "n_kv_heads": 1, "cap_feat_dim": WIDTH, "axes_dims": [4, 6, 6],
        "axes_lens": [32, 32, 32]}  # fmt: skip
SHOWN = "pad_tokens_multiple" in inspect.signature(NextDiT).parameters  # newer versions show the tokens of its blocks
SHAPES = {
    "sd3": ("SD3", SD3, (16,)),
    "flux": ("Flux", FLUX, (16,)),
    "chroma": ("Chroma", CHROMA, (16,)),
    "qwen": ("QwenImage", QWEN, (16, 1)),
}
"""Name of ComfyUI's classes, options, and the channels (and frames) of the latent."""
if NEWER:
    SHAPES["flux2"] = ("Flux2", FLUX2, (128,))
if SHOWN:
    SHAPES["lumina"] = ("Lumina2", NEXT, (16,))
    wide = {"dim": 256, "axes_dims": [32, 48, 48]}  # its embedding of the timestep has 256 channels
    SHAPES["z-image"] = ("ZImage", {**NEXT, **wide, "pad_tokens_multiple": 32, "z_image_modulation": True}, (16,))
PIXART = {"in_channels": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "input_size": 16, "caption_channels": WIDTH}
REFUSED = {"lumina": ("Lumina2", NEXT), "pixart": ("PixArtSigma", PIXART)}
PATCHED = {"preset": "custom", "ratio": 0.5, "min_tokens": 0}


def random_model(kind):
    """Returns a model with random weights."""
    name, shape, *_ = SHAPES.get(kind) or REFUSED[kind]
    config = getattr(comfy.supported_models, name)({**shape, "dtype": torch.float32})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in (*model.parameters(), *model.diffusion_model.buffers()):
        parameter.data = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def words(kind, seed, **more):
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 32 if kind == "sd3" else 16, generator=generator)
    return [[torch.randn(1, TEXT, WIDTH, generator=generator), {"pooled_output": pooled, **more}]]


def sample(model, kind, h=24, w=32, steps=2, callback=None, frames=1, **more):
    """Samples with ComfyUI's own sampler, with guidance. more: entries of both prompts."""
    latent = torch.zeros(frames, *SHAPES[kind][2], h, w)
    noise = comfy.sample.prepare_noise(latent, 1)
    return comfy.sample.sample(
        model, noise, steps, 5.0, "euler", "normal", words(kind, 2, **more), words(kind, 3, **more), latent,
        disable_pbar=True, seed=1, callback=callback,
    )  # fmt: skip


class Log:
    """Collects what Token Fusion logs."""

    def __enter__(self):
        import tofu_sd.hosts.programs.base_patches as patches

        self.logger, self.lines = patches.logger, []
        self.before = self.logger.warning, self.logger.info
        self.logger.warning = self.logger.info = self.lines.append
        return self.lines

    def __exit__(self, *error):
        self.logger.warning, self.logger.info = self.before


def with_option(model, name, value):
    """Returns a clone with another node's entry in its options."""
    clone = model.clone()
    clone.model_options["transformer_options"][name] = value
    return clone


def run_checks(kind, patch, show):
    model = random_model(kind)
    plain = sample(model, kind)
    with Log() as lines:
        half = patch(model, **PATCHED)
    first = sample(half, kind)
    mean = patch(model, **PATCHED, early="mean", late="mean", kv_only=True)
    other = sample(mean, kind)
    images, names = show(half, words(kind, 2), {"samples": torch.zeros(1, *SHAPES[kind][2], 24, 32)})
    late = sample(patch(model, **PATCHED, start_percent=0.5), kind)
    zero = patch(model, **{**PATCHED, "ratio": 0.0})
    checks = {
        "ratio 0 is bit-equal": torch.equal(sample(zero, kind), plain),
        "two clones at once": torch.equal(sample(half, kind), first) and torch.equal(sample(mean, kind), other),
        "the window": not (torch.equal(late, plain) or torch.equal(late, first)),
        "a kept map": bool(sample(patch(model, **PATCHED, match_interval=2), kind).isfinite().all()),
        "odd latents run": sample(half, kind, 17, 23).shape[-2:] == (17, 23),
        "several images": bool(sample(half, kind, frames=2).isfinite().all()),
        "maps are shown": len(images) == len(names.splitlines()),
        **check_override(kind, patch, model, first),
        **({} if kind in ("lumina", "z-image") else check_replaced_blocks(kind, patch, model)),
        **check_interrupt(kind, half, first),
        "the unpatched model is bit-equal": torch.equal(sample(model, kind), plain)
        and not model.model_options["transformer_options"],
    }
    if kind in ("flux", "flux2", "qwen"):
        checks |= check_references(kind, model, half)
    if kind == "flux":
        checks |= check_mask(patch, model) | check_compiled(patch, model)
    return {"headline": lines[-1], "changed": float((first - plain).abs().max()), "checks": checks}


def check_override(kind, patch, model, expected):
    """Checks that another node's attention is kept and called, and that the text stays unchanged."""
    calls = []

    def override(function, q, k, v, *args, **kwargs):
        calls.append((q, k, v, bool(kwargs.get("skip_reshape"))))
        return function(q, k, v, *args, **kwargs)

    def run(model):
        calls.clear()
        return sample(model, kind, steps=1), list(calls)

    option = "optimized_attention_override", override
    _, full = run(with_option(model, *option))
    after, merged = run(with_option(patch(model, **PATCHED), *option))
    before, _ = run(patch(with_option(model, *option), **PATCHED))

    def text(call):
        *tensors, split = call
        return [(x.transpose(1, 2) if split else x.flatten(2))[:, :TEXT] for x in tensors]

    def length(call):
        return call[0].shape[2 if call[3] else 1]

    pairs = [pair for pair in zip(full, merged, strict=True) if length(pair[0]) != length(pair[1])]
    own = sample(patch(model, **PATCHED), kind, steps=1)
    return {
        "image tokens are merged": {length(a) - length(b) for a, b in pairs} == {384 if kind == "flux2" else 96},
        "either order is the same": torch.equal(before, after),
        "the override gives the same image": torch.allclose(after, own, atol=1e-4),
        "text is bit-equal": all(map(torch.equal, *map(text, pairs[0]))),
    }


def check_replaced_blocks(kind, patch, model):
    """Checks that a function of another node that replaces a block is kept and called."""
    seen = []

    def passing(args, extra):
        seen.append(args["img"].shape)
        return extra["original_block"](args)

    def skipping(args, extra):
        return args

    def replaced(model, function):
        clone = model.clone()
        clone.set_model_patch_replace(function, "dit", "double_block", 1)
        return clone

    half = patch(model, **PATCHED)
    ours = sample(half, kind, steps=1)
    both = sample(replaced(half, passing), kind, steps=1)
    calls = len(seen)
    same = [
        sample(one, kind, steps=1) for one in (replaced(half, skipping), patch(replaced(model, skipping), **PATCHED))
    ]
    return {
        "another block replacement is called": calls > 0 and torch.equal(both, ours),
        "a skipped block is skipped in either order": torch.equal(*same) and not torch.equal(same[0], ours),
    }


def check_references(kind, model, half):
    """Checks an image with a reference image, whose tokens follow the image."""
    reference = {"reference_latents": [torch.ones(1, *SHAPES[kind][2], 10, 14)]}
    with Log() as lines:
        images = [sample(one, kind, **reference) for one in (model, half)]
    return {
        "reference images": not torch.equal(*images) and not torch.equal(images[1], sample(half, kind)),
        "reference images skip no block": not lines,
    }


def check_mask(patch, model):
    """Checks that an attention mask leaves attention as it is, and that the log says so."""
    mask = {"attention_mask": torch.rand(1, TEXT + 192, TEXT + 192), "attention_mask_img_shape": (12, 16)}
    with Log() as lines:
        same = torch.equal(sample(model, "flux", **mask), sample(patch(model, **PATCHED), "flux", **mask))
    return {"a mask is refused": same and any("an attention mask hides tokens" in line for line in lines)}


def check_interrupt(kind, half, first):
    from comfy.model_management import InterruptProcessingException

    def callback(step, *rest):
        raise InterruptProcessingException

    with contextlib.suppress(InterruptProcessingException):
        sample(half, kind, callback=callback)
    return {"the same image after an interrupt": torch.equal(sample(half, kind), first)}


def check_compiled(patch, model):
    """Checks a model compiled without guards on its patches, as ComfyUI's newer node compiles."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def fast(model):
        clone = model.clone()
        options = {"guard_filter_fn": lambda guards: ["transformer_options" not in guard.name for guard in guards]}
        set_torch_compile_wrapper(model=clone, backend="eager", options=options)
        return clone

    models = [model, patch(model, **PATCHED), patch(model, **{**PATCHED, "ratio": 0.75}), model]
    expected = [sample(one, "flux", steps=1) for one in models]
    torch._dynamo.reset()
    images = [sample(fast(one), "flux", steps=1) for one in models]
    return {"compiled": all(torch.allclose(a, b, atol=1e-4) for a, b in zip(images, expected, strict=True))}


# --- against diffusers ------------------------------------------------------------------------------------------------


def configs():
    from tofu_sd import TokenFusionConfig
    from tofu_sd.recipes import RECIPES

    some = [TokenFusionConfig(0.5, late="prune"), TokenFusionConfig(0.75, kv_only=True), RECIPES["asymmetric"]]
    return [TokenFusionConfig.of(one, proportional=True, min_tokens=0) for one in some]


def predict(patcher, config, x, t, context, **more):
    """Returns one prediction of ComfyUI's model, with a configuration or None."""
    import tofu_sd.hosts.comfyui as host
    from tofu_sd.hosts.programs.model_patcher import patch_transformer, patches_of
    from tofu_sd.hosts.programs.transformer_families import family_of

    model = patcher.model.diffusion_model

    def execute(x, t, concat, context, control, options, **more):
        return model(x, t, context=context, control=control, transformer_options=options, **more)

    with torch.no_grad():
        if config is None:
            return execute(x, t, None, context, None, {}, **more)
        patched, _ = patch_transformer(patcher, family_of(model), config, host.plain)
        return patches_of(patched).around_model(execute, x, t, None, context, None, {}, **more)


def compare_with_diffusers(kind):
    """Returns the distances between one call of ComfyUI's model and diffusers' with the same weights."""
    sys.path.append(str(ROOT))
    import tofu_sd
    from eval.families import tiny

    h, w = 12, 16
    x = torch.randn(2, *SHAPES[kind][2], 2 * h, 2 * w, generator=torch.Generator().manual_seed(5))
    if kind == "sd3":
        size = {"attention_head_dim": 64, "num_attention_heads": 3, "caption_projection_dim": 192, "in_channels": 16,
                "out_channels": 16, "pos_embed_max_size": 48}  # fmt: skip
        theirs, inputs = tiny.sd35(**size), tiny.sd3_inputs(h, w)
        call, t = {"y": inputs["pooled_projections"]}, inputs["timestep"]
    elif kind == "flux":
        theirs, inputs = tiny.flux(in_channels=64), tiny.flux_inputs(h, w)
        call, t = {"y": inputs["pooled_projections"]}, inputs["timestep"]
    else:
        theirs, inputs = tiny.qwen_image(in_channels=64, out_channels=16), tiny.qwen_image_inputs(h, w)
        call, t = {}, inputs["timestep"]
        inputs["encoder_hidden_states_mask"] = torch.ones(2, TEXT, dtype=torch.bool)
    patcher = random_model(kind)
    weights = {name: weight.clone() for name, weight in theirs.state_dict().items()}  # the conversion changes them
    weights = comfy.model_detection.convert_diffusers_mmdit(dict(weights)) or weights
    patcher.model.diffusion_model.load_state_dict(weights)
    inputs["hidden_states"] = x if kind == "sd3" else packed(x)
    context = inputs["encoder_hidden_states"]

    def reference():
        with torch.no_grad():
            out = theirs(**inputs).sample
        return out if kind == "sd3" else unpacked(out, x)

    def distance(a, b):
        return float((a - b).abs().max())

    base, merged, effects = reference(), {}, []
    for config in configs():
        with tofu_sd.patched(theirs, config):
            expected = reference()
        merged[config.slug] = distance(predict(patcher, config, x, t, context, **call), expected)
        effects.append(distance(expected, base))
    plain = distance(predict(patcher, None, x, t, context, **call), base)
    return {"plain": plain, "merged": merged, "effect": min(effects)}


def packed(x):
    """Returns a latent [B, C, (1,) H, W] as tokens [B, H W / 4, 4 C]."""
    x = x.flatten(1, 2) if x.ndim == 5 else x
    return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(x, like):
    """Returns tokens as a latent like another: the inverse of `packed`."""
    h, w = (side // 2 for side in like.shape[-2:])
    x = x.unflatten(2, (-1, 2, 2)).unflatten(1, (h, w)).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(like.shape)


def refuse(patch, kind):
    """Returns the error message for a model that is not supported."""
    model = random_model(kind)
    try:
        patch(model)
    except ValueError as error:
        return {"message": str(error), "unchanged": not model.model_options["transformer_options"]}


if __name__ == "__main__":
    patch, show = nodes()
    show_node = sys.modules["tofu_sd.hosts.comfyui"].show
    kinds = sys.argv[1:] or list(SHAPES)
    results = {}
    for kind in kinds:
        try:
            results[kind] = run_checks(kind, patch, show_node)
            if kind in ("sd3", "flux", "qwen"):
                results[kind]["diffusers"] = compare_with_diffusers(kind)
        except Exception:  # the other families still count
            results[kind] = {"error": traceback.format_exc()[-1500:]}
    results["refused"] = {kind: refuse(patch, kind) for kind in REFUSED if kind not in SHAPES}
    print(json.dumps(results))
