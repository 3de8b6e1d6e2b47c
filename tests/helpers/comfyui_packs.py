"""Runs the nodes in ComfyUI beside node packs of other people, on a CPU, and prints what it found as JSON.

The packs are read from a folder, as the program reads custom_nodes/. See test_hosts_comfyui_packs.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import comfyui_run  # the program, with a CPU
import comfyui_torchvision  # noqa: F401
import torch
import twins
from comfyui_run import CPU, SHAPES, node, sample

PACKS = Path(sys.argv[1])


def pack(name):
    """Loads a pack; under which name."""
    folder = PACKS / name
    spec = importlib.util.spec_from_file_location(
        f"pack_{len(name)}", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return spec.name


class Log:
    """What Token Fusion says meanwhile."""

    def __enter__(self):
        import tofu_sd.hosts.programs.attention_patches as patcher

        self.lines, self.logger, self.warning = [], patcher.logger, patcher.logger.warning
        self.logger.warning = self.lines.append
        return self.lines

    def __exit__(self, *error):
        self.logger.warning = self.warning


def fused_places(model):
    """A patched model's clone, and the places that are fused, which fill as it runs."""
    from tofu_sd.hosts.programs.model_patcher import record_model_maps

    places = set()
    clone, _ = record_model_maps(model, lambda place, *rest: places.add(place))
    return clone, places


# --- AnimateDiff-Evolved ----------------------------------------------------------------------------------------------


def animated(fuse):
    """A random motion module of small widths, and our node's ratio changed between runs."""
    name = pack("ComfyUI-AnimateDiff-Evolved")
    kinds = sys.modules[name].NODE_CLASS_MAPPINGS
    motion = sys.modules[f"{name}.animatediff.motion_module_ad"]
    injection = sys.modules[f"{name}.animatediff.model_injection"]
    whole = motion.MotionModule
    motion.MotionModule = lambda channels, *rest, **more: whole(channels // 10, *rest, **more)  # 32 for 320
    shape = {**SHAPES["sd15"], "channel_mult": (1, 2, 4, 4)}  # its widths are fixed as multiples of 320
    block = "motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks"
    told = {f"{side}_blocks.3.{block}.{n}.pos_encoder.pe": torch.zeros(1, 24, 32)
            for side in ("down", "up") for n in range(2)}  # fmt: skip
    told[f"mid_block.{block}.0.pos_encoder.pe"] = torch.zeros(1, 24, 32)
    info = motion.normalize_ad_state_dict(dict(told), "small")[1]
    module = twins.randomize(motion.AnimateDiffModel(told, info))
    patcher = injection.create_MotionModelPatcher(module, load_device=CPU, offload_device=CPU)
    moving = node(kinds["ADE_ApplyAnimateDiffModelSimple"])(motion_model=patcher)

    def animate(model):
        return node(kinds["ADE_UseEvolvedSampling"])(model=model, beta_schedule="autoselect", m_models=moving)

    before, SHAPES["sd15"] = SHAPES["sd15"], shape
    model = comfyui_run.random_model("sd15")
    SHAPES["sd15"] = before

    def draw(model):
        return sample(model, "sd15", steps=2, frames=4)

    calls = []
    module.down_blocks[0].motion_modules[0].register_forward_hook(lambda *rest: calls.append(1))
    plain, still = draw(animate(model)), draw(fuse(model))
    drawn, kept, inside = {}, [], []  # as the program keeps what a node gave
    for ratio in (0.5, 0.75, 0.25):
        inside += model.model.diffusion_model.modules()
        kept.append(animate(fuse(model, ratio=ratio)))
        drawn[ratio] = draw(kept[-1])
    clone, places = fused_places(fuse(animate(model)))
    last = draw(clone)
    parts = {"context_length": 4, "context_overlap": 2}
    windows = node(kinds["ADE_StandardUniformContextOptions"])(**parts, context_stride=1)

    def slide(model):
        options = {"beta_schedule": "autoselect", "m_models": moving, "context_options": windows}
        return sample(node(kinds["ADE_UseEvolvedSampling"])(model=model, **options), "sd15", steps=2, frames=6)

    slid = slide(fuse(model))
    return {
        "motion runs": len(calls) >= 2 * 5,
        "modules stay in the model": any(type(m) is motion.VanillaTemporalModule for m in inside),
        "in parts": bool(slid.isfinite().all()) and not torch.equal(slid, slide(model)),
        "in parts the same again": torch.equal(slide(fuse(model)), slid),
        "ratios differ": len({tensor.sum().item() for tensor in (plain, still, *drawn.values())}) == 5,
        "either order": torch.equal(last, drawn[0.5]),
        "the same again": torch.equal(draw(animate(fuse(model, ratio=0.75))), drawn[0.75]),
        "without it": torch.equal(draw(animate(model)), plain),
        "blocks": len(places),
    }


# --- guidance that replaces self-attention ----------------------------------------------------------------------------


def guided(fuse):
    """How often the replacement is called: without our node, after it, and before it."""
    nodes = sys.modules[f"{pack('sd-perturbed-attention')}.pag_nodes"]
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
    found = {}
    for name, add in guides.items():
        own.set_model_options_patch_replace = replaced if add is built_in else replace
        for preset in ("faithful", "tofu"):
            ours = {"preset": preset, "levels": 4} if name.endswith("all") else {"preset": preset}
            patched = {"alone": add(model), "after": add(fuse(model, **ours)), "before": fuse(add(model), **ours)}
            said, drawn = {}, {}
            for order, one in patched.items():
                calls.clear()
                with Log() as lines:
                    drawn[order] = sample(one, "sd15", 32, 32, steps=2)
                said[order] = {"calls": len(calls), "sizes": sorted(set(calls)), "said": lines}
            plain = sample(fuse(model, **ours), "sd15", 32, 32, steps=2)
            found[f"{name}, {preset}"] = {
                **said, "finite": all(bool(x.isfinite().all()) for x in drawn.values()),
                "either order": torch.equal(drawn["after"], drawn["before"]),
                "acts": not torch.equal(drawn["after"], plain),
                "fuses": not torch.equal(drawn["after"], drawn["alone"]),
            }  # fmt: skip
    own.set_model_options_patch_replace = replace
    return found


# --- whatever else that pack has --------------------------------------------------------------------------------------


def steered(fuse):
    """Its nodes that leave self-attention to the block: each alone, after ours and before it."""
    pag = sys.modules[f"{pack('sd-perturbed-attention')}.pag_nodes"]
    from tofu_sd.hosts.programs.model_patcher import patches_of

    ours, found = {"preset": "faithful"}, {}
    model = comfyui_run.random_model("sd15")
    words = [[torch.randn(1, 7, SHAPES["sd15"]["context_dim"], generator=torch.Generator().manual_seed(5)), {}]]
    given = {
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
    plain, fused = sample(model, "sd15", steps=2), sample(fuse(model, **ours), "sd15", steps=2)
    for name, (module, kind, options) in given.items():
        if (module := sys.modules.get(f"{pag.__package__}.{module}")) is None:
            continue  # an older pack

        def add(model, make=node(getattr(module, kind)), options=options):  # noqa: B008
            return make(model=model, **options)

        def draw(model, make):
            """What is drawn, how many blocks were fused, and what was said."""
            assert torch.equal(sample(model, "sd15", steps=2), plain)  # which unwraps what TPG wraps, too
            made = make(model)
            places = set()
            if patches_of(made):
                made, places = fused_places(made)
            with Log() as lines:
                return sample(made, "sd15", steps=2), len(places), lines

        alone, *_ = draw(model, add)
        after, blocks, said = draw(model, lambda model: add(fuse(model, **ours)))
        before, *again = draw(model, lambda model: fuse(add(model), **ours))
        found[name] = {
            "finite": bool(after.isfinite().all()), "either order": torch.equal(after, before),
            "said in either": [blocks, said] == again, "blocks": blocks, "said": said,
            "acts": not torch.equal(after, fused) and not torch.equal(alone, plain),
            "fuses": not torch.equal(after, alone), "without it": torch.equal(draw(model, add)[0], alone),
        }  # fmt: skip
    return found


# --- reference-only ---------------------------------------------------------------------------------------------------


def referenced(fuse):
    """Advanced-ControlNet's, and keys that are doubled by what another picture has (as ReferenceOnlySimple does)."""
    name = pack("ComfyUI-Advanced-ControlNet")
    make = node(sys.modules[f"{name}.adv_control.nodes_reference"].ReferenceControlNetNode)
    apply = sys.modules[f"{name}.adv_control.nodes_main"].AdvancedControlNetApply.execute
    wrapper = sys.modules[f"{name}.adv_control.control_reference"].ReferencePreprocWrapper
    model = comfyui_run.random_model("sd15")
    found = {}
    hint = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    for kind in ("reference_attn", "reference_adain", "reference_attn+adain"):
        for strength in (1.0, 0.5):
            net = make(reference_type=kind, style_fidelity=0.5, ref_weight=1.0)

            def control(positive, negative, net=net, strength=strength):
                return apply(positive, negative, net, wrapper(condhint=hint), strength, 0.0, 1.0).result

            def draw(model, control=control):
                return sample(model, "sd15", steps=2, words=control)

            plain, alone = sample(model, "sd15", steps=2), draw(model)
            clone, places = fused_places(fuse(model, preset="faithful"))
            with Log() as lines:
                both = draw(clone)
            found[f"{kind}, {strength}"] = {
                "acts": not torch.equal(alone, plain), "finite": bool(both.isfinite().all()), "said": lines,
                "fused": len(places), "as without": torch.equal(both, alone),
                "without it": torch.equal(draw(model), alone) and torch.equal(sample(model, "sd15", steps=2), plain),
            }  # fmt: skip

    def doubled(q, k, v, options):
        k = torch.cat([k, k[:1].expand_as(k)], dim=1)
        return q, k, k

    for order in ("before", "after"):
        one = model.clone() if order == "before" else fuse(model, preset="faithful")
        one.set_model_attn1_patch(doubled)
        one = fuse(one, preset="faithful") if order == "before" else one
        clone, places = fused_places(one)
        alone = model.clone()
        alone.set_model_attn1_patch(doubled)
        with Log() as lines:
            both = sample(clone, "sd15", steps=2)
        same = torch.equal(both, sample(alone, "sd15", steps=2))
        found[f"doubled keys, {order}"] = {"as without": same, "said": lines, "fused": len(places)}
    return found


if __name__ == "__main__":
    fuse, show = comfyui_run.nodes()
    parts = {"animated": animated, "guided": guided, "steered": steered, "referenced": referenced}
    print(json.dumps({name: parts[name](fuse) for name in sys.argv[2:] or parts}))
