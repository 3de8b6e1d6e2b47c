"""Token Fusion in ComfyUI and Forge with other nodes, in several threads, and in compiled models.

Other nodes run unchanged. A block that another node changes too stays unmerged, and one warning is logged.
"""

from __future__ import annotations

import threading
import types

import pytest
import tiny
import torch
from patcher_host import BasicTransformerBlock, ForgePatcher, OlderPatcher, Patcher, SpatialTransformer, UNetModel
from patcher_host import attention as own
from torch import nn

from tofu_sd import TokenFusionConfig
from tofu_sd.hosts import ldm
from tofu_sd.hosts.programs.model_patcher import patch_model, patches_of, record_model_maps

FAITHFUL = {"early": "mean", "late": "mean", "proportional": True}


@pytest.fixture(scope="module")
def unet():
    return tiny.sd15_unet()


@pytest.fixture(params=[Patcher, ForgePatcher], ids=["ComfyUI", "Forge"])
def patcher(request, unet):
    return request.param(UNetModel(unet))


def merge(patcher, ratio=0.5, **options):
    return patch_model(patcher, TokenFusionConfig.of(ratio, **options), own, lambda share: 10 * (1 - share))[0]


def call(patcher, h=16, w=16, t=500, seed=1, **more):
    unet = patcher.model.diffusion_model.unet
    return patcher.predict(tiny.noise(2, 4, h, w, seed=seed), t, tiny.inputs(unet)["encoder_hidden_states"], **more)


def merged_places(patcher, *size, **more):
    """Returns the places of the blocks that one call merges."""
    places = []
    recording, _ = record_model_maps(patcher, lambda place, map, h, w: places.append(place))
    call(recording, *size, **more)
    return places


# --- which blocks are eligible ----------------------------------------------------------------------------------------


class MotionBlock(nn.Module):
    """Attention over frames under its own names, as in AnimateDiff's motion modules."""

    def __init__(self):
        super().__init__()
        self.attention_blocks = nn.ModuleList()


class TimeBlock(BasicTransformerBlock):
    """A block over frames with the names of a block over a map."""


class Container(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(blocks)


class MotionModule(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def block_of(unet):
    return unet.down_blocks[0].attentions[0].transformer_blocks[0]


@pytest.mark.parametrize("kind", ["without norm1", "no layers", "temporal by its module", "temporal by its name"])
def test_motion_modules_are_not_eligible_blocks(unet, kind):
    model = UNetModel(unet)
    before = ldm.find_places(model)
    other = {
        "without norm1": lambda: Container([MotionBlock()]),
        "no layers": lambda: Container([nn.Module()]),
        "temporal by its module": lambda: MotionModule(Container([BasicTransformerBlock(block_of(unet))])),
        "temporal by its name": lambda: Container([TimeBlock(block_of(unet))]),
    }[kind]()
    if kind == "temporal by its name":
        holder = nn.Module()
        holder.time_stack = other
        other = holder
    for stage in (model.input_blocks[1], model.output_blocks[9], model.middle_block):
        stage.append(other)
    assert list(ldm.find_places(model)) == list(before)


def test_config_changes_with_motion_modules_left_in_the_model(unet):
    model = Patcher(UNetModel(unet))
    merge(model)
    for number in (1, 2, 4, 10):
        model.model.diffusion_model.input_blocks[number].append(Container([MotionBlock()]))
    _, summary = patch_model(merge(model), TokenFusionConfig(0.25), own)
    assert "on 5 of 16 transformer blocks" in summary.headline


def test_temporal_blocks_with_as_many_tokens_as_the_map_are_not_merged(unet):
    """Stable Video Diffusion also calls the patches for its time stack, with the place of the preceding block."""
    model = Patcher(UNetModel(unet))
    transformer = next(m for m in model.model.diffusion_model.input_blocks[1] if isinstance(m, SpatialTransformer))
    transformer.time_stack = nn.ModuleList()
    patches = patches_of(merge(model))
    q = tiny.noise(16, 16, 16)  # 16 tokens of 16 frames: space and time have the same shape
    block_options = {"block": ("input", 1), "block_index": 0, "activations_shape": [16, 16, 4, 4]}
    assert patches.before(q, q, q, dict(block_options))[0].shape == (16, 8, 16)
    assert patches.before(q, q, q, dict(block_options))[0] is q
    q = tiny.noise(32, 16, 16)
    assert patches.before(q, q, q, dict(block_options))[0] is q


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_middle_block_is_never_merged(patcher, levels):
    model = merge(patcher, levels=levels)
    places = merged_places(model, 64, 64)
    assert len(places) == {1: 5, 2: 10, 4: 15}[levels]
    assert not any(side == "middle" for side, _, _ in places)
    _, summary = patch_model(patcher, TokenFusionConfig(0.5, levels=levels), own)
    assert f"on {len(places)} of 16 transformer blocks" in summary.headline
    assert "middle" not in str(summary)
    unet = UNetModel(patcher.model.diffusion_model.unet)
    assert all(site.level > 3 for (side, _, _), site in ldm.find_places(unet).items() if side == "middle")


# --- nodes that replace self-attention --------------------------------------------------------------------------------


def count_calls(calls):
    def replacement(q, k, v, options):
        calls.append((q.shape[1], options["block"]))
        return own(q, k, v, options["n_heads"], options)

    return replacement


def replace_attention_at(options, function, place):
    """Replaces attention in the options of one model call, as guidance nodes do."""
    options = dict(options)
    replacements = options["patches_replace"] = dict(options.get("patches_replace", {}))
    replacements["attn1"] = {**replacements.get("attn1", {}), place: function}
    return options


@pytest.mark.parametrize("options", [{}, FAITHFUL], ids=["plain", "proportional"])
@pytest.mark.parametrize("place", [("input", 1), ("input", 1, 0), ("output", 10)])
@pytest.mark.parametrize("order", ["before", "after", "sampling"])
def test_replaced_self_attention_runs_on_the_whole_map(patcher, order, place, options, caplog):
    calls = []
    if order == "before":
        other = patcher.clone()
        other.set_model_attn1_replace(count_calls(calls), *place)
        model = merge(other, **options)
    else:
        model = merge(patcher, **options)
        usual = call(model)
        if order == "after":
            model = model.clone()
            model.set_model_attn1_replace(count_calls(calls), *place)
        else:
            transformer_options = model.model_options["transformer_options"]
            model = model.clone()
            model.model_options["transformer_options"] = replace_attention_at(
                transformer_options, count_calls(calls), place
            )
    result = call(model)
    assert [tokens for tokens, _ in calls] == [256]
    assert len(merged_places(model)) == 4
    assert caplog.text.count("another node replaces its self-attention") == 2  # the second is the recording clone's
    call(model)
    assert caplog.text.count("another node replaces its self-attention") == 2
    assert len(merged_places(merge(patcher, **options))) == 5
    if order != "before":
        assert not torch.equal(result, usual)


@pytest.mark.parametrize("order", ["before", "after"])
def test_attention_replaced_by_another_node_is_kept(patcher, order):
    calls, other = [], patcher.clone()
    for number in (1, 2):
        other.set_model_attn1_replace(count_calls(calls), "input", number)
    model = merge(other, **FAITHFUL)
    replacements = model.model_options["transformer_options"]["patches_replace"]["attn1"]
    ours = {
        place for place, function in replacements.items() if getattr(function, "__self__", None) is patches_of(model)
    }
    assert ours == {("output", 9), ("output", 10), ("output", 11)}
    call(merge(model, ratio=0.25, **FAITHFUL) if order == "after" else model)
    assert [block for _, block in calls] == [("input", 1), ("input", 2)]


def test_replaced_attention_in_older_programs_raises(unet):
    other = OlderPatcher(UNetModel(unet))
    other.set_model_attn1_replace(count_calls([]), "input", 1)
    with pytest.raises(ValueError, match="another patch has replaced self-attention in this model"):
        merge(other, **FAITHFUL)


def test_guidance_in_the_middle_block_keeps_other_blocks_merged(patcher):
    calls = []
    model = merge(patcher, levels=4, **FAITHFUL)
    model.set_model_attn1_replace(count_calls(calls), "middle", 0)
    assert len(merged_places(model, 64, 64)) == 15
    assert [tokens for tokens, _ in calls] == [64]


# --- nodes that add to the tokens or change them ----------------------------------------------------------------------


def add_whole_map(scale):
    """Adds a whole map to the queries, as LLLite does."""

    def patch(q, k, v, options):
        return q + scale * tiny.noise(1, 256, 1, seed=3) if q.shape[1] == 256 or scale else q, k, v

    return patch


@pytest.mark.parametrize("where", ["before", "after"])
def test_patch_that_adds_a_whole_map_acts_in_either_order(patcher, where):
    def only_at_the_top(q, k, v, options):
        return add_whole_map(0.5)(q, k, v, options) if options["block"] in (("input", 1), ("output", 11)) else (q, k, v)

    if where == "before":
        first = patcher.clone()
        first.set_model_attn1_patch(only_at_the_top)
        model = merge(first)
    else:
        model = merge(patcher)
        model.set_model_attn1_patch(only_at_the_top)
    assert len(merged_places(model)) == 5
    reference = patcher.clone()
    reference.set_model_attn1_patch(only_at_the_top)
    assert torch.equal(call(model), call(merge(reference)))
    assert not torch.equal(call(model), call(merge(patcher)))


def test_output_patch_gets_the_whole_map(patcher):
    sizes, model = set(), merge(patcher)
    earlier = patcher.clone()
    for other in (model, earlier):
        other.set_model_attn1_output_patch(lambda out, options: sizes.add(out.shape[1]) or out)
    call(model)
    assert sizes == {256, 64, 16, 4}
    sizes.clear()
    call(merge(earlier))
    assert sizes == {256, 64, 16, 4}


@pytest.mark.parametrize("order", ["before", "after"])
def test_tiled_blocks_are_not_merged(patcher, order, caplog):
    def tile(q, k, v, options):
        return (q.reshape(8, 64, -1), k, v) if q.shape[1] == 256 else (q, k, v)

    def untile(out, options):
        return out.reshape(2, 256, -1) if out.shape[0] == 8 else out

    def tiled(model):
        model = model.clone()
        model.set_model_attn1_patch(lambda q, k, v, o: tuple(tile(x, x, x, o)[0] for x in (q, k, v)))
        model.set_model_attn1_output_patch(untile)
        return model

    alone = call(tiled(patcher))
    assert torch.equal(call(merge(tiled(patcher)) if order == "before" else tiled(merge(patcher))), alone)
    assert "another node changes the tokens of its self-attention first" in caplog.text


@pytest.mark.parametrize("layer", ["block", "attn1", "to_q", "to_out"])
def test_block_with_replaced_forward_is_not_merged(patcher, layer, caplog):
    """Reference ControlNets replace `forward` and add the tokens of a whole map inside the block."""
    model = merge(patcher)
    block = next(b for b in patcher.model.diffusion_model.modules() if isinstance(b, BasicTransformerBlock))
    changed = {"block": block, "attn1": block.attn1, "to_q": block.attn1.to_q, "to_out": block.attn1.to_out}[layer]
    original = changed.forward
    try:
        changed.forward = lambda *args: original(*args)
        assert len(merged_places(model)) == 4
        assert "another node replaces a `forward` in it" in caplog.text
        changed.forward = original  # the node restores it
        assert len(merged_places(model)) == 5
    finally:
        del changed.forward
    assert len(merged_places(model)) == 5


# --- clones -----------------------------------------------------------------------------------------------------------


def test_recording_on_a_clone_leaves_the_model_unchanged(patcher):
    model = merge(patcher)
    clone, records = model.clone(), []
    usual = call(model)
    recording, _ = record_model_maps(model, lambda *record: records.append(record))
    assert torch.equal(call(recording), usual)
    assert len(records) == 5
    for other in (model, clone, model.clone()):
        assert patches_of(other).on_map is None
        assert torch.equal(call(other), usual)
    assert len(records) == 5


def test_failing_record_callback_leaves_the_model_unchanged(patcher):
    model = merge(patcher)

    def fail(*record):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        call(record_model_maps(model, fail)[0])
    assert torch.equal(call(model), call(merge(patcher)))


def test_clones_that_share_options_keep_their_own_config(patcher):
    """Newer programs share lists and functions between clones."""
    model = merge(patcher, 0.5, **FAITHFUL)
    half = call(model)
    shallow = model.clone()
    shallow.model_options = {**model.model_options}
    quarter = merge(shallow, 0.25)
    assert not torch.equal(call(quarter), half)
    assert torch.equal(call(quarter), call(merge(patcher, 0.25)))
    assert torch.equal(call(model), half)


# --- several threads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, FAITHFUL, {"share_across_blocks": True}, {"match_interval": 2}, {"seed": 3}, {"start": 0.4}, {"levels": 2}],
)
def test_two_threads_in_one_block_are_independent(patcher, options):
    """With several devices both threads are between the first and last patch of a block at the same time."""
    sizes, schedule = {"A": (16, 16), "B": (12, 20)}, torch.tensor([9.0, 5.0, 1.0])
    steps = [(900, 1), (500, 2)]
    model = merge(patcher, **options)

    def generate(name, model):
        return [call(model, *sizes[name], t=t, seed=seed, sample_sigmas=schedule) for t, seed in steps]

    alone = {name: generate(name, merge(patcher, **options)) for name in sizes}
    barrier, results = threading.Barrier(2, timeout=60), {}
    shared = model.clone()

    def meet(q, k, v, options):
        barrier.wait()
        return q, k, v

    def meet_after(out, options):
        barrier.wait()
        return out

    shared.model_options["transformer_options"]["patches"]["attn1_patch"].insert(0, meet)
    shared.model_options["transformer_options"]["patches"]["attn1_output_patch"].append(meet_after)
    threads = [threading.Thread(target=lambda n=name: results.update({n: generate(n, shared)})) for name in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in sizes:
        assert all(torch.equal(a, b) for a, b in zip(results[name], alone[name], strict=True)), name


def test_interleaved_calls_in_one_thread_keep_their_maps(patcher):
    patches = patches_of(merge(patcher))
    x, y = tiny.noise(2, 256, 16, seed=1), tiny.noise(1, 64, 16, seed=2)
    block_options = [{"block": ("input", 1), "activations_shape": [len(z), 16, s, s]} for z, s in ((x, 16), (y, 8))]
    a = patches.before(x, x, x, block_options[0])[0]
    b = patches.before(y, y, y, block_options[1])[0]
    assert (a.shape[1], b.shape[1]) == (128, 32)
    assert patches.after(a, block_options[0]).shape == x.shape
    assert patches.after(b, block_options[1]).shape == y.shape


# --- noise levels -----------------------------------------------------------------------------------------------------


def test_start_and_end_follow_the_sampling_at_run_time(unet):
    """A node after Token Fusion may change the sampling."""
    model = Patcher(UNetModel(unet))
    late = merge(model, start=0.6)  # in its first sampling, sigma 5 lies before the window
    assert torch.equal(call(late), call(model))
    late.model.model_sampling = types.SimpleNamespace(percent_to_sigma=lambda share: 100 * (1 - share))
    assert torch.equal(call(late), call(merge(model)))


# --- compiled models --------------------------------------------------------------------------------------------------


class CompilingPatcher(Patcher):
    """A model compiled without guards on its patches, as ComfyUI's own node compiles."""

    def __init__(self, unet):
        super().__init__(unet)
        self.compiled = torch.compile(
            unet, backend="eager",
            options={"guard_filter_fn": lambda guards: ["options" not in guard.name for guard in guards]},
        )  # fmt: skip

    def _apply(self, x, t, context, options, added):
        self.model.diffusion_model, before = self.compiled, self.model.diffusion_model
        try:
            return super()._apply(x, t, context, options, added)
        finally:
            self.model.diffusion_model = before


@pytest.fixture
def compiled(unet):
    torch._dynamo.reset()
    yield CompilingPatcher(UNetModel(unet))
    torch._dynamo.reset()


SETTINGS = {"plain": None, "half": (0.5, {}), "most": (0.75, {}), "weighted": (0.5, FAITHFUL)}


@pytest.mark.parametrize(
    "order",
    [("plain", "half", "plain"), ("half", "most", "half"), ("half", "plain", "half"), ("half", "weighted", "plain")],
    ids="-".join,
)
def test_compiled_model_follows_its_config_whatever_ran_before(compiled, unet, order):
    expected = {
        name: call(
            Patcher(UNetModel(unet)) if setting is None else merge(Patcher(UNetModel(unet)), setting[0], **setting[1])
        )
        for name, setting in SETTINGS.items()
    }
    models = {
        name: compiled if setting is None else merge(compiled, setting[0], **setting[1])
        for name, setting in SETTINGS.items()
    }
    for name in order:
        assert torch.allclose(call(models[name]), expected[name], atol=1e-5), name
    assert (expected["plain"] - expected["half"]).abs().max() > 1e-3


def test_compiled_model_follows_start_and_end(compiled):
    model = merge(compiled, start=0.6)
    places = [len(merged_places(model, t=t)) for t in (900, 300)]
    assert places == [0, 5]


def test_autocast_state_is_restored_after_a_call(patcher):
    def fail(*record):
        assert isinstance(patcher, ForgePatcher) or not torch.is_autocast_cache_enabled()
        raise InterruptedError

    with pytest.raises(InterruptedError):
        call(record_model_maps(merge(patcher), fail)[0])
    assert torch.is_autocast_cache_enabled()
