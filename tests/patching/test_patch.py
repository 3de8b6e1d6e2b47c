"""apply_patch, remove_patch and patched: undoing, copies, reproducibility, step windows and block selection."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from anatomy import anatomy
from diffusers import (
    UNet2DConditionModel,
)
from torch import Tensor

import tofu_sd
from tofu_sd import TokenFusionConfig
from tofu_sd.core.reductions import mean

OPTIONS: dict[str, dict[str, Any]] = {
    "tofu": {},
    "proportional": {"proportional": True},
    "kv_only": {"kv_only": True},
    "mean everywhere": {"early": "mean", "late": "mean"},
    "random destinations": {"seed": 3},
    "all layers": {"merge_crossattn": True, "merge_mlp": True},
    "mlp alone": {"merge_attn": False, "merge_mlp": True},
    "two levels": {"levels": 2},
    "normed": {"match_on": "normed"},
    "step window": {"start": 0.2, "end": 0.8},
    "windows": {"window": 3},
    "soft matching": {"temperature": 0.1, "early": "mean", "late": "mean", "window": 3, "sy": 1},
    "min_tokens": {"min_tokens": 100, "levels": 2},
    "shared maps": {"share_across_blocks": True, "match_interval": 2, "levels": 2},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


# --- ratio 0, and undo ------------------------------------------------------------------------------------------------


@options
def test_ratio_0_equals_baseline_exactly(options: dict[str, Any]) -> None:
    unet = tiny.sd15_unet()
    baseline = tiny.predict(unet)
    assert torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.0, **options)), baseline)
    assert not torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.5, **options)), baseline)


@options
def test_remove_patch_undoes_every_change(options: dict[str, Any]) -> None:
    unet = tiny.sd15_unet()
    baseline, before = tiny.predict(unet), anatomy(unet)
    tofu_sd.apply_patch(unet, 0.5, **options)
    tiny.predict(unet)
    assert anatomy(unet) != before
    tofu_sd.remove_patch(unet)
    assert anatomy(unet) == before
    assert torch.equal(tiny.predict(unet), baseline)


def test_remove_patch_of_an_unpatched_model_changes_nothing() -> None:
    unet = tiny.shallow_unet()
    before = anatomy(unet)
    assert tofu_sd.remove_patch(unet) is unet
    assert anatomy(unet) == before


def test_patched_undoes_the_patch_after_an_exception() -> None:
    unet = tiny.shallow_unet()
    before = anatomy(unet)
    with pytest.raises(ValueError, match="unpack"), tofu_sd.patched(unet, 0.5):
        tiny.predict(unet, encoder_hidden_states=torch.zeros(2))
    assert anatomy(unet) == before


def test_interrupted_call_leaves_no_stale_map() -> None:
    """After a forward that fails between matching and the last use of the map, the next call must not use that map."""
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, merge_mlp=True)
    expected = tiny.predict(unet)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]

    def fail(*args: Any) -> None:
        raise InterruptedError

    handle = block.attn1.to_q.register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError):
        tiny.predict(unet, seed=9)
    handle.remove()
    assert torch.equal(tiny.predict(unet), expected)


def test_patched_restores_the_outer_patch() -> None:
    unet = tiny.shallow_unet()
    baseline = tiny.predict(unet)
    with tofu_sd.patched(unet, 0.5):
        outer, before = tiny.predict(unet), anatomy(unet)
        with tofu_sd.patched(unet, 0.25, kv_only=True):
            assert not torch.equal(tiny.predict(unet), outer)
        assert tofu_sd.summary(unet).config == TokenFusionConfig(0.5)
        assert torch.equal(tiny.predict(unet), outer)
        assert {n: cls for n, (cls, _) in anatomy(unet).items()} == {n: cls for n, (cls, _) in before.items()}
    assert torch.equal(tiny.predict(unet), baseline)


def test_second_apply_patch_replaces_the_first() -> None:
    """The same patch twice equals one; of two different patches only the last applies."""
    unet, new_unet = tiny.shallow_unet(), tiny.shallow_unet()
    tofu_sd.apply_patch(tofu_sd.apply_patch(unet, 0.5), 0.5)
    assert torch.equal(tiny.predict(unet), tiny.predict(tofu_sd.apply_patch(new_unet, 0.5)))
    tofu_sd.apply_patch(unet, TokenFusionConfig(0.25, early=mean, merge_mlp=True))
    tofu_sd.apply_patch(unet, 0.3, kv_only=True)
    assert torch.equal(tiny.predict(unet), tiny.predict(tofu_sd.apply_patch(new_unet, 0.3, kv_only=True)))
    assert anatomy(tofu_sd.remove_patch(unet)).keys() == anatomy(tofu_sd.remove_patch(new_unet)).keys()


def test_apply_patch_returns_its_argument() -> None:
    pipe = tiny.sd15_pipe()
    assert tofu_sd.apply_patch(pipe) is pipe
    assert tofu_sd.apply_patch(pipe.unet) is pipe.unet
    with tofu_sd.patched(pipe) as inside:
        assert inside is pipe


# --- copies -----------------------------------------------------------------------------------------------------------


def _pickled(unet: Any) -> Any:
    return pickle.loads(pickle.dumps(unet))


def _saved(unet: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(unet, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"merge_mlp": True}], ids=str)
def test_copy_is_patched_and_independent(copied: Callable[[Any], Any], options: dict[str, Any]) -> None:
    unet = tiny.shallow_unet()
    baseline = tiny.predict(unet)
    merged = tiny.predict(tofu_sd.apply_patch(unet, 0.5, **options))
    other = copied(unet)
    assert torch.equal(tiny.predict(other), merged)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert torch.equal(tiny.predict(unet), merged)
    assert not torch.equal(tiny.predict(other), merged)

    another = copied(unet)
    tofu_sd.remove_patch(unet)
    assert torch.equal(tiny.predict(another), merged)
    assert torch.equal(tiny.predict(unet), baseline)
    assert torch.equal(tiny.predict(tofu_sd.remove_patch(another)), baseline)
    assert not any("_tofu" in vars(module) or module._forward_pre_hooks for module in another.modules())


def test_saved_model_is_unpatched(tmp_path: Path) -> None:
    """Files load where tofu_sd is not installed."""
    unet = tiny.shallow_unet()
    baseline, names = tiny.predict(unet), list(unet.state_dict())
    tofu_sd.apply_patch(unet, 0.5)
    assert list(unet.state_dict()) == names
    unet.save_pretrained(tmp_path)
    assert not any(b"tofu" in file.read_bytes() for file in tmp_path.iterdir())
    assert torch.equal(tiny.predict(UNet2DConditionModel.from_pretrained(tmp_path).eval()), baseline)


# --- reproducibility --------------------------------------------------------------------------------------------------

SEEDED = pytest.mark.parametrize("options", [{}, {"seed": 3}], ids=["top left", "random destinations"])


@SEEDED
def test_image_is_independent_of_earlier_images(options: dict[str, Any]) -> None:
    pipe = tofu_sd.apply_patch(tiny.sd15_pipe(), 0.5, **options)
    first = tiny.images(pipe, seed=1)
    tiny.images(pipe, seed=2, height=136, width=200, num_inference_steps=3)
    torch.rand(7)
    assert torch.equal(tiny.images(pipe, seed=1), first)
    assert torch.equal(tiny.images(tofu_sd.apply_patch(tiny.sd15_pipe(), 0.5, **options), seed=1), first)


@SEEDED
def test_image_is_independent_of_its_batch(options: dict[str, Any]) -> None:
    """The unpatched model has this property on one thread here (first assertion), so merging must keep it."""
    unet = tiny.shallow_unet()

    def predict_alone_and_in_batch() -> tuple[Tensor, Tensor]:
        call = tiny.inputs(unet, batch=3)
        one = {k: v[1:2] if v.ndim else v for k, v in call.items()}
        return tiny.predict(unet, **one), tiny.predict(unet, **call)[1:2]

    alone, together = predict_alone_and_in_batch()
    # rounding of a matrix product may depend on the batch size
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    exact = torch.equal(alone, together)
    tofu_sd.apply_patch(unet, 0.5, **options)
    merged, merged_in_batch = predict_alone_and_in_batch()
    assert torch.equal(merged, merged_in_batch) if exact else (merged - merged_in_batch).abs().max() < 1e-4
    assert not torch.equal(merged, alone)


@SEEDED
def test_global_rng_is_unchanged(options: dict[str, Any]) -> None:
    unet = tiny.shallow_unet()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    tofu_sd.apply_patch(unet, 0.5, **options)
    tiny.predict(unet)
    tofu_sd.remove_patch(unet)
    assert torch.equal(torch.get_rng_state(), state)


def test_destinations_depend_on_seed_and_step() -> None:
    unet = tiny.shallow_unet()

    def run(seed: int | None, t: float | Tensor) -> Tensor:
        with tofu_sd.patched(unet, 0.5, seed=seed):
            tiny.predict(unet, t=5)  # another step in between
            return tiny.predict(unet, timestep=t)

    assert torch.equal(run(3, 500), run(3, torch.tensor(500)))
    assert torch.equal(run(3, 500), run(3, torch.tensor([500, 500])))
    assert not torch.equal(run(3, 500), run(4, 500))
    assert not torch.equal(run(3, 500), run(None, 500))
    # another step gives other destinations
    tracker = tofu_sd.patching.step_tracker.StepTracker(TokenFusionConfig(seed=3))
    parts = []
    for t in (500, 499):
        tracker.start_step(torch.tensor(t))
        grid = tracker.grid(16, 16, torch.device("cpu"))
        assert grid is not None
        parts.append(grid.parts.dst)
    assert not torch.equal(*parts)


# --- block selection and options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "blocks"), [(1, 5), (2, 10), (3, 15), (4, 16), (9, 16)])
def test_levels_select_deeper_resolutions(levels: int, blocks: int) -> None:
    assert len(tofu_sd.summary(tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, levels=levels)).rows) == blocks


@pytest.mark.parametrize(("limit", "blocks"), [(1, 5), (2, 10), (4, 15), (8, 16)])
def test_max_downsample_selects_the_blocks_of_tomesd(limit: int, blocks: int) -> None:
    assert len(tofu_sd.summary(tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, max_downsample=limit)).rows) == blocks


@pytest.mark.parametrize(("limit", "blocks"), [(1, 10), (2, 10), (4, 70)])
def test_max_downsample_1_merges_in_sdxl(limit: int, blocks: int) -> None:
    """tomesd's default of 1 merges nothing in SDXL, whose first attention runs at half the latent size."""
    assert len(tofu_sd.summary(tofu_sd.apply_patch(tiny.sdxl_unet(), 0.5, max_downsample=limit)).rows) == blocks


LOG = """
import logging, sys
sys.path.insert(0, {tests!r})
import tiny, tofu_sd
from tofu_sd.utils import show_log
{setup}
logger = logging.getLogger("tofu_sd")
assert [type(handler) for handler in logger.handlers][:1] == [logging.NullHandler]
tofu_sd.apply_patch(tiny.sd15_unet(), 0.5)
"""


@pytest.mark.parametrize(
    ("setup", "shown"),
    [
        ("", False),
        ("logging.basicConfig(level=logging.INFO)", True),
        ("logging.basicConfig()", False),
        ("show_log()", True),
        ("show_log(); show_log(); logging.basicConfig(level=logging.INFO); logging.getLogger().handlers.clear()", True),
        ("logging.getLogger('tofu_sd').setLevel(logging.WARNING); show_log()", False),
    ],
)
def test_log_reports_the_patch_at_info_level_only(setup: str, shown: bool) -> None:
    code = LOG.format(tests=str(Path(__file__).parents[1] / "helpers"), setup=setup)
    stderr = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    expected = "UNet2DConditionModel: tofu-r50 on 5 of 16 transformer blocks, tokens 256 -> 128 at a 16 x 16 latent"
    lines = [line.removeprefix("INFO:tofu_sd:") for line in stderr.splitlines() if "tofu" in line]
    assert lines == [expected] * shown


def test_use_rand_sets_the_seed() -> None:
    unet = tiny.shallow_unet()
    for options, seed in (
        ({"use_rand": True}, 0),
        ({"use_rand": True, "seed": 5}, 5),
        ({"use_rand": False, "seed": 5}, None),
        ({"ratio": TokenFusionConfig(seed=7), "use_rand": True}, 7),
        ({"ratio": TokenFusionConfig(seed=7), "use_rand": False}, None),
        ({"ratio": TokenFusionConfig(seed=7)}, 7),
    ):
        config = tofu_sd.summary(tofu_sd.apply_patch(unet, **options)).config
        assert config is not None
        assert config.seed == seed
    rand = tiny.predict(tofu_sd.apply_patch(unet, 0.5, use_rand=True))
    assert torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.5, seed=0)), rand)
    assert not torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.5, use_rand=False)), rand)


def test_depth_split_separates_prune_from_mlerp() -> None:
    """Eq. 7 counts all 16 blocks; the first level has blocks 0 and 1 (down) and 13 to 15 (up)."""
    for split, early in ((0, 0), (1, 1), (14, 3), (16, 5)):
        unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, depth_split=split)
        expected = ["prune"] * early + ["mlerp"] * (5 - early)
        assert [row.reduction for row in tofu_sd.summary(unet).rows] == expected
    assert [row.depth for row in tofu_sd.summary(unet).rows] == [0, 1, 13, 14, 15]


def test_proportional_attention_over_equal_tokens_equals_full_attention() -> None:
    """With log(n_i) on the key logits, merged identical tokens count as much as separate ones."""
    unet = tiny.shallow_unet()
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    distinct = tiny.noise(1, 4, 16)
    x = distinct[:, torch.arange(64) // 2 % 4]  # every 2 x 2 cell of an 8 x 8 grid contains one token four times
    spatial_module = unet.down_blocks[0].attentions[0]
    baseline = attn.attn1(x)
    merged = {}
    for proportional in (False, True):
        tofu_sd.apply_patch(unet, 0.4, proportional=proportional, match_on="normed")
        hook = next(iter(spatial_module._forward_pre_hooks.values()))
        hook(spatial_module, (torch.empty(1, 16, 8, 8),), {})
        merged[proportional] = attn.attn1(x)
    torch.testing.assert_close(merged[True], baseline, rtol=0, atol=1e-5)  # float32 rounding of 64 terms
    assert (merged[False] - baseline).abs().max() > 1e-3


def test_record_maps_changes_nothing() -> None:
    unet = tiny.sd15_unet()
    with pytest.raises(ValueError, match="UNet2DConditionModel is not patched"), tofu_sd.record_maps(unet):
        pass
    tofu_sd.apply_patch(unet, 0.5, levels=2)
    before = [{*vars(module)} for module in unet.modules()]
    baseline = tiny.predict(unet, 16, 12)
    with tofu_sd.record_maps(unet) as records:
        assert torch.equal(tiny.predict(unet, 16, 12), baseline)
        tiny.predict(unet, 8, 8, batch=1)
    rows = tofu_sd.summary(unet, (16, 12)).rows
    assert [(record.block, record.call, record.h, record.w) for record in records[:10]] == [
        (r.name, 0, *r.size) for r in rows
    ]
    assert [record.map.kept_idx.shape for record in records[:10]] == [(2, r.after) for r in rows]
    assert [(record.call, record.map.group_idx.shape[0]) for record in records[10:]] == [(1, 1)] * 10
    tiny.predict(unet)
    assert len(records) == 20
    assert [{*vars(module)} for module in unet.modules()] == before


def test_record_maps_contexts_nest() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5)
    with tofu_sd.record_maps(unet) as outer:
        with tofu_sd.record_maps(unet) as inner:
            tiny.predict(unet)
        tiny.predict(unet)
    assert (len(outer), len(inner)) == (10, 5)


def test_record_maps_records_shared_maps_in_every_block() -> None:
    unet = tiny.sd15_unet()
    with tofu_sd.patched(unet, 0.5, share_across_blocks=True), tofu_sd.record_maps(unet) as records:
        tiny.predict(unet)
    assert len(records) == 5
    assert all(torch.equal(record.map.group_idx, records[0].map.group_idx) for record in records)
