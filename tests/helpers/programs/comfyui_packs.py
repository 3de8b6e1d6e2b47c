"""Runs the nodes in ComfyUI with third-party node packs, on a CPU, and prints the results as JSON.

The packs are loaded from a folder, as ComfyUI loads custom_nodes/. See tests/hosts/test_comfyui_packs.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import comfyui_run  # sets ComfyUI up for a CPU
import comfyui_torchvision  # noqa: F401
import diffusers_reference
import torch
from comfyui_run import CPU, SHAPES, node, sample

PACKS = Path(sys.argv[1])


def load_pack(name):
    """Loads a pack and returns its module name."""
    folder = PACKS / name
    spec = importlib.util.spec_from_file_location(
        f"pack_{len(name)}", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return spec.name


class Log:
    """Collects the warnings of Token Fusion."""

    def __enter__(self):
        import tofu_sd.hosts.programs.base_patches as patcher

        self.lines, self.logger, self.warning = [], patcher.logger, patcher.logger.warning
        self.logger.warning = self.lines.append
        return self.lines

    def __exit__(self, *error):
        self.logger.warning = self.warning


def record_merged_blocks(model):
    """Returns a clone of a patched model, and the set of merged blocks that fills as it runs."""
    from tofu_sd.hosts.programs.model_patcher import record_model_maps

    places = set()
    clone, _ = record_model_maps(model, lambda place, *rest: places.add(place))
    return clone, places


# --- AnimateDiff-Evolved ----------------------------------------------------------------------------------------------


def run_animatediff(patch_model):
    """Changes the ratio between runs with a small random motion module."""
    name = load_pack("ComfyUI-AnimateDiff-Evolved")
    kinds = sys.modules[name].NODE_CLASS_MAPPINGS
    motion = sys.modules[f"{name}.animatediff.motion_module_ad"]
    injection = sys.modules[f"{name}.animatediff.model_injection"]
    whole = motion.MotionModule
    motion.MotionModule = lambda channels, *rest, **more: whole(channels // 10, *rest, **more)  # 32 for 320
    shape = {**SHAPES["sd15"], "channel_mult": (1, 2, 4, 4)}  # its widths are fixed as multiples of 320
    block = "motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks"
    weights = {f"{side}_blocks.3.{block}.{n}.pos_encoder.pe": torch.zeros(1, 24, 32)
            for side in ("down", "up") for n in range(2)}  # fmt: skip
    weights[f"mid_block.{block}.0.pos_encoder.pe"] = torch.zeros(1, 24, 32)
    info = motion.normalize_ad_state_dict(dict(weights), "small")[1]
    module = diffusers_reference.randomize(motion.AnimateDiffModel(weights, info))
    patcher = injection.create_MotionModelPatcher(module, load_device=CPU, offload_device=CPU)
    motion_model = node(kinds["ADE_ApplyAnimateDiffModelSimple"])(motion_model=patcher)

    def animate(model):
        return node(kinds["ADE_UseEvolvedSampling"])(model=model, beta_schedule="autoselect", m_models=motion_model)

    before, SHAPES["sd15"] = SHAPES["sd15"], shape
    model = comfyui_run.random_model("sd15")
    SHAPES["sd15"] = before

    def generate(model):
        return sample(model, "sd15", steps=2, frames=4)

    calls = []
    module.down_blocks[0].motion_modules[0].register_forward_hook(lambda *rest: calls.append(1))
    plain, patched_only = generate(animate(model)), generate(patch_model(model))
    images, models, layers = {}, [], []  # ComfyUI keeps the outputs of nodes
    for ratio in (0.5, 0.75, 0.25):
        layers += model.model.diffusion_model.modules()
        models.append(animate(patch_model(model, ratio=ratio)))
        images[ratio] = generate(models[-1])
    clone, places = record_merged_blocks(patch_model(animate(model)))
    last = generate(clone)
    parts = {"context_length": 4, "context_overlap": 2}
    windows = node(kinds["ADE_StandardUniformContextOptions"])(**parts, context_stride=1)

    def slide(model):
        options = {"beta_schedule": "autoselect", "m_models": motion_model, "context_options": windows}
        return sample(node(kinds["ADE_UseEvolvedSampling"])(model=model, **options), "sd15", steps=2, frames=6)

    slid = slide(patch_model(model))
    return {
        "motion runs": len(calls) >= 2 * 5,
        "modules stay in the model": any(type(m) is motion.VanillaTemporalModule for m in layers),
        "in parts": bool(slid.isfinite().all()) and not torch.equal(slid, slide(model)),
        "in parts the same again": torch.equal(slide(patch_model(model)), slid),
        "ratios differ": len({tensor.sum().item() for tensor in (plain, patched_only, *images.values())}) == 5,
        "either order": torch.equal(last, images[0.5]),
        "the same again": torch.equal(generate(animate(patch_model(model, ratio=0.75))), images[0.75]),
        "restored": torch.equal(generate(animate(model)), plain),
        "blocks": len(places),
    }


# --- guidance that replaces self-attention ----------------------------------------------------------------------------


def run_guidance(patch_model):
    """Counts calls of the replaced attention: without Token Fusion, after it, and before it."""
    nodes = sys.modules[f"{load_pack('sd-perturbed-attention')}.pag_nodes"]
    kinds, calls = nodes.NODE_CLASS_MAPPINGS, []

    def counted(function):
        def call(q, k, v, options, *rest, **more):
            calls.append((q.shape[1], k.shape[1]))
            return function(q, k, v, options, *rest, **more)

        return call

    nodes.perturbed_attention = counted(nodes.perturbed_attention)
    smooth = nodes.seg_attention_wrapper
    nodes.seg_attention_wrapper = lambda *rest: counted(smooth(*rest))
    import comfy.model_patcher as own
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    replace = own.set_model_options_patch_replace

    def replaced(options, patch, *rest, **more):
        return replace(options, patch if hasattr(patch, "__self__") else counted(patch), *rest, **more)

    def built_in(model):
        return node(PerturbedAttentionGuidance)(model=model, scale=3.0)

    def guide(kind, **more):
        return lambda model: node(kinds[kind])(model=model, **more)

    model = comfyui_run.random_model("sd15")
    guides = {"PAG, built in": built_in}
    for where, blocks in {"middle": "", "one": "d0", "all": "d0-5,m0,u0-8", "by number": "d0.0,u8.0"}.items():
        guides[f"PAG, {where}"] = guide("PerturbedAttention", unet_block_list=blocks)
        guides[f"SEG, {where}"] = guide("SmoothedEnergyGuidanceAdvanced", unet_block_list=blocks)
    results = {}
    for name, add in guides.items():
        own.set_model_options_patch_replace = replaced if add is built_in else replace
        for preset in ("faithful", "tofu"):
            ours = {"preset": preset, "levels": 4} if name.endswith("all") else {"preset": preset}
            patched = {
                "alone": add(model),
                "after": add(patch_model(model, **ours)),
                "before": patch_model(add(model), **ours),
            }
            runs, images = {}, {}
            for order, one in patched.items():
                calls.clear()
                with Log() as lines:
                    images[order] = sample(one, "sd15", 32, 32, steps=2)
                runs[order] = {"calls": len(calls), "sizes": sorted(set(calls)), "messages": lines}
            plain = sample(patch_model(model, **ours), "sd15", 32, 32, steps=2)
            results[f"{name}, {preset}"] = {
                **runs, "finite": all(bool(x.isfinite().all()) for x in images.values()),
                "either order": torch.equal(images["after"], images["before"]),
                "acts": not torch.equal(images["after"], plain),
                "merges": not torch.equal(images["after"], images["alone"]),
            }  # fmt: skip
    own.set_model_options_patch_replace = replace
    return results


# --- the other nodes of that pack -------------------------------------------------------------------------------------


def run_other_guidance(patch_model):
    """Runs each node alone, after Token Fusion and before it. None replaces self-attention."""
    pag = sys.modules[f"{load_pack('sd-perturbed-attention')}.pag_nodes"]
    from tofu_sd.hosts.programs.model_patcher import patches_of

    ours, results = {"preset": "faithful"}, {}
    model = comfyui_run.random_model("sd15")
    words = [[torch.randn(1, 7, SHAPES["sd15"]["context_dim"], generator=torch.Generator().manual_seed(5)), {}]]
    other_nodes = {
        "NAG": ("nag_nodes", "NormalizedAttentionGuidance", {"negative": words}),
        "PLADIS": ("pladis_nodes", "Pladis", {}),
        "TPG, one": ("tpg_nodes", "TokenPerturbationGuidance", {"unet_block_list": "d0"}),
        "TPG, all": ("tpg_nodes", "TokenPerturbationGuidance", {"unet_block_list": "d0-5,m0,u0-8"}),
        "SWG": ("pag_nodes", "SlidingWindowGuidanceAdvanced", {"tile_width": 64, "tile_height": 64,
                                                               "tile_overlap": 32}),
        "FDG": ("fdg_nodes", "FrequencyDecoupledGuidance", {"strength_high": 12.0}),
        "Momentum": ("mg_nodes", "MomentumGuidance", {"momentum": 0.5, "ema": 0.6}),
        "SMC": ("smc_nodes", "SlidingModeControlCFG", {"lambda": 6.0, "k": 0.1}),
    }  # fmt: skip
    plain, merged = sample(model, "sd15", steps=2), sample(patch_model(model, **ours), "sd15", steps=2)
    for name, (module, kind, options) in other_nodes.items():
        if (module := sys.modules.get(f"{pag.__package__}.{module}")) is None:
            continue  # an older pack

        def add(model, make=node(getattr(module, kind)), options=options):  # noqa: B008
            return make(model=model, **options)

        def generate(model, make):
            """Returns the image, the number of merged blocks, and the warnings."""
            assert torch.equal(sample(model, "sd15", steps=2), plain)  # this also unwraps the blocks that TPG wraps
            patched = make(model)
            places = set()
            if patches_of(patched):
                patched, places = record_merged_blocks(patched)
            with Log() as lines:
                return sample(patched, "sd15", steps=2), len(places), lines

        alone, *_ = generate(model, add)
        after, blocks, messages = generate(model, lambda model: add(patch_model(model, **ours)))
        before, *other_order = generate(model, lambda model: patch_model(add(model), **ours))
        results[name] = {
            "finite": bool(after.isfinite().all()), "either order": torch.equal(after, before),
            "the same messages in either order": [blocks, messages] == other_order,
            "blocks": blocks, "messages": messages,
            "acts": not torch.equal(after, merged) and not torch.equal(alone, plain),
            "merges": not torch.equal(after, alone), "restored": torch.equal(generate(model, add)[0], alone),
        }  # fmt: skip
    return results


# --- reference-only ---------------------------------------------------------------------------------------------------


def run_reference(patch_model):
    """Runs Advanced-ControlNet's nodes, and keys doubled with another image's (as ReferenceOnlySimple does)."""
    name = load_pack("ComfyUI-Advanced-ControlNet")
    make = node(sys.modules[f"{name}.adv_control.nodes_reference"].ReferenceControlNetNode)
    apply = sys.modules[f"{name}.adv_control.nodes_main"].AdvancedControlNetApply.execute
    wrapper = sys.modules[f"{name}.adv_control.control_reference"].ReferencePreprocWrapper
    model = comfyui_run.random_model("sd15")
    results = {}
    hint = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    for kind in ("reference_attn", "reference_adain", "reference_attn+adain"):
        for strength in (1.0, 0.5):
            net = make(reference_type=kind, style_fidelity=0.5, ref_weight=1.0)

            def control(positive, negative, net=net, strength=strength):
                return apply(positive, negative, net, wrapper(condhint=hint), strength, 0.0, 1.0).result

            def generate(model, control=control):
                return sample(model, "sd15", steps=2, words=control)

            plain, alone = sample(model, "sd15", steps=2), generate(model)
            clone, places = record_merged_blocks(patch_model(model, preset="faithful"))
            with Log() as lines:
                both = generate(clone)
            results[f"{kind}, {strength}"] = {
                "acts": not torch.equal(alone, plain), "finite": bool(both.isfinite().all()), "messages": lines,
                "merged": len(places), "same as without Token Fusion": torch.equal(both, alone),
                "restored": torch.equal(generate(model), alone) and torch.equal(sample(model, "sd15", steps=2), plain),
            }  # fmt: skip

    def doubled(q, k, v, options):
        k = torch.cat([k, k[:1].expand_as(k)], dim=1)
        return q, k, k

    for order in ("before", "after"):
        one = model.clone() if order == "before" else patch_model(model, preset="faithful")
        one.set_model_attn1_patch(doubled)
        one = patch_model(one, preset="faithful") if order == "before" else one
        clone, places = record_merged_blocks(one)
        alone = model.clone()
        alone.set_model_attn1_patch(doubled)
        with Log() as lines:
            both = sample(clone, "sd15", steps=2)
        same = torch.equal(both, sample(alone, "sd15", steps=2))
        results[f"doubled keys, {order}"] = {
            "same as without Token Fusion": same,
            "messages": lines,
            "merged": len(places),
        }
    return results


if __name__ == "__main__":
    patch_model, show = comfyui_run.nodes()
    patch_model = partial(patch_model, min_tokens=0)  # otherwise it depends on the machine's load where tokens merge
    parts = {
        "animatediff": run_animatediff,
        "guidance": run_guidance,
        "other_guidance": run_other_guidance,
        "reference": run_reference,
    }
    print(json.dumps({name: parts[name](patch_model) for name in sys.argv[2:] or parts}))
