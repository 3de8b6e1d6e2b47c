"""Queries and keys/values reduced differently by one map (kv_early, kv_late; the recipe `asymmetric`)."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from anatomy import anatomy
from torch import Tensor

import tofu_sd
from tofu_sd import TokenFusionConfig, recipes
from tofu_sd.config import BlockReductions
from tofu_sd.core.reductions import mean, mlerp, prune
from tofu_sd.core.token_map import TokenMap
from tofu_sd.patching.block_state import BlockState

SEPARATE = {"early": "mlerp", "late": "mlerp", "kv_early": "mean", "kv_late": "prune", "proportional": True}


def attention(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    mask = None if bias is None else bias.unsqueeze(1)
    return F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None], attn_mask=mask)[:, 0]


def merged_attention(x: Tensor, map: TokenMap, config: TokenFusionConfig) -> Tensor:
    """Runs BlockState.run_attention on x by a given map, with attention without projections."""
    state = BlockState(config, config.reductions_at(0, down_path=1))
    state.current.map = map

    def merged(queries: Tensor, keys: Tensor | None, map: Any) -> Tensor:
        return attention(queries, queries if keys is None else keys, state.key_bias(x, map, sdpa=True))

    return state.run_attention(x, lambda: attention(x, x), merged, lambda: True)


def pairs_map(x: Tensor) -> TokenMap:
    """Merges each token with its neighbour."""
    B, N, _ = x.shape
    return TokenMap(torch.arange(0, N, 2).expand(B, -1), (torch.arange(N) // 2).expand(B, -1))


def layer_inputs(unet: Any) -> list[dict[str, Tensor]]:
    """Returns what to_q, to_k and to_v of each merged self-attention get in one call, in execution order."""
    records: list[dict[str, Tensor]] = []
    handles = []
    for layer, _, _, state in tofu_sd.patching.patch.patch_of(unet).swaps:
        if isinstance(state, BlockState) and hasattr(layer, "to_q"):
            record: dict[str, Tensor] = {}
            records.append(record)
            for name in ("to_q", "to_k", "to_v"):

                def hook(_: Any, args: Any, record: dict[str, Tensor] = record, name: str = name) -> None:
                    record[name] = args[0]

                handles.append(getattr(layer, name).register_forward_pre_hook(hook))
    tiny.predict(unet)
    for handle in handles:
        handle.remove()
    return records


def test_attention_over_identical_tokens_is_exact_with_proportional_attention() -> None:
    """Each token stands twice; its mean, its MLERP and its survivor are the token itself, and log 2 counts the other.

    The tolerance is float64 rounding.
    """
    x = torch.randn(2, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)
    for kv in ("mean", "prune", "mlerp", "partial_mlerp"):
        for early in ("mlerp", "prune"):
            config = TokenFusionConfig(0.5, early=early, kv_early=kv, proportional=True)
            torch.testing.assert_close(merged_attention(x, pairs_map(x), config), attention(x, x), rtol=0, atol=1e-12)


def test_plain_attention_over_uneven_groups_is_not_exact() -> None:
    """Why proportional attention belongs to the recipe: a group of three weighs as much as a single token without."""
    x = torch.randn(1, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x[:, [0, 0, 0, 1, 2, 3]]
    map = TokenMap(torch.tensor([[0, 3, 4, 5]]), torch.tensor([[0, 0, 0, 1, 2, 3]]))
    exact = TokenFusionConfig(0.5, early="mlerp", kv_early="mean", proportional=True)
    # log 3 is a float32
    torch.testing.assert_close(merged_attention(x, map, exact), attention(x, x), rtol=0, atol=1e-7)
    plain = TokenFusionConfig(0.5, early="mlerp", kv_early="mean")
    assert (merged_attention(x, map, plain) - attention(x, x)).abs().max() > 1e-3


def test_queries_and_keys_are_reduced_by_one_map() -> None:
    """Projections see MLERP of the normed tokens as queries and their mean (early) or survivors (late) as keys."""
    unet, reference = tiny.shallow_unet(), tiny.shallow_unet()
    tofu_sd.apply_patch(reference, 0.5, kv_only=True, early="mlerp", late="mlerp")
    seen = layer_inputs(tofu_sd.apply_patch(unet, 0.5, **SEPARATE))
    expected = layer_inputs(reference)  # its queries are all tokens
    with tofu_sd.record_maps(unet) as records:
        tiny.predict(unet)
    first, x, map = seen[0], expected[0]["to_q"], records[0].map
    assert torch.equal(first["to_q"], mlerp(x, map))
    assert torch.equal(first["to_k"], mean(x, map))
    assert first["to_k"] is first["to_v"]
    assert len(records) == len(seen)  # one map a block
    norms = x.norm(dim=-1)
    largest = norms.new_zeros(map.kept_idx.shape).scatter_reduce(1, map.group_idx, norms, "amax")
    torch.testing.assert_close(first["to_q"].norm(dim=-1), largest)  # sets how sharp attention is
    last = seen[-1]
    assert last["to_q"].shape == last["to_k"].shape
    assert not torch.equal(last["to_q"], last["to_k"])


def test_same_reduction_for_both_equals_one_reduction() -> None:
    default, same = tiny.sd15_unet(), tiny.sd15_unet()
    tofu_sd.apply_patch(default, 0.5)
    tofu_sd.apply_patch(same, 0.5, kv_early="prune", kv_late="mlerp")
    assert torch.equal(tiny.predict(same), tiny.predict(default))


@pytest.mark.parametrize("options", [SEPARATE, {"kv_late": "mean"}, {"kv_early": "mean", "merge_mlp": True}])
def test_separate_reductions_change_the_output_and_are_undone(options: dict[str, Any]) -> None:
    unet = tiny.sd15_unet()
    before, baseline = anatomy(unet), tiny.predict(unet)
    shared = {name: value for name, value in options.items() if not name.startswith("kv_")}
    without = tiny.predict(tofu_sd.apply_patch(unet, 0.5, **shared))
    changed = tiny.predict(tofu_sd.apply_patch(unet, 0.5, **options))
    assert not torch.equal(changed, without)
    assert not torch.equal(changed, baseline)
    tofu_sd.remove_patch(unet)
    assert anatomy(unet) == before
    assert torch.equal(tiny.predict(unet), baseline)


def test_ratio_0_is_the_baseline_bit_for_bit() -> None:
    unet = tiny.sd15_unet()
    baseline = tiny.predict(unet)
    assert torch.equal(tiny.predict(tofu_sd.apply_patch(unet, recipes.named("asymmetric", 0.0))), baseline)


def test_phases_follow_depth_split() -> None:
    config = TokenFusionConfig(**SEPARATE, depth_split=6)
    assert config.reductions_at(5, 99) == BlockReductions(mlerp, mean)
    assert config.reductions_at(6, 99) == BlockReductions(mlerp, prune)
    one = TokenFusionConfig(kv_late="mean")  # the other phase's keys are reduced as its queries
    assert [one.reductions_at(depth, 6) for depth in (5, 6)] == [
        BlockReductions(prune, prune), BlockReductions(mlerp, mean),
    ]  # fmt: skip
    assert TokenFusionConfig().reductions_at(0, 6) == BlockReductions(prune, prune)


def test_recipe_is_queries_by_mlerp_and_keys_on_the_way_to_it() -> None:
    config = recipes.named("asymmetric", 0.25)
    assert config == TokenFusionConfig(
        0.25, early="mlerp", late="mlerp", kv_early="partial_mlerp", kv_late="partial_mlerp", proportional=True
    )
    assert config.slug == "mlerp-kv-partial_mlerp-r25+p"
    assert recipes.named("mlerp+p@kv_early=mean@kv_late=prune").slug == "mlerp-kv-mean-prune-r50+p"
    assert recipes.named("tofu@kv_early=mean@kv_late=mean").slug == "tofu-kv-mean-r50"


def test_summary_names_both_reductions() -> None:
    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, **SEPARATE)
    methods = [row.method for row in tofu_sd.summary(unet).rows]
    assert methods[0] == "mlerp, keys and values mean"
    assert methods[-1] == "mlerp, keys and values prune"


def test_patch_with_separate_reductions_is_pickled() -> None:
    import pickle

    unet = tofu_sd.apply_patch(tiny.sd15_unet(), 0.5, **SEPARATE)
    expected = tiny.predict(unet)
    assert torch.equal(tiny.predict(pickle.loads(pickle.dumps(unet))), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_early": "mean", "kv_only": True}, "kv_early is 'mean' and kv_only is True"),
        ({"kv_late": "mean", "merge_attn": False, "merge_mlp": True}, "kv_late is 'mean' and merge_attn is False"),
        ({"kv_late": "median"}, "unknown reduction 'median'"),
        (
            {"kv_late": "mlerp", "early": "mean", "late": "mean", "temperature": 0.1, "window": 3, "sy": 1},
            "kv_early and kv_late must be 'mean'",
        ),
    ],
)
def test_conflicting_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenFusionConfig(0.5, **options)


def test_fused_projections_are_refused_and_leave_no_patch() -> None:
    unet = tiny.sd15_unet()
    unet.fuse_qkv_projections()
    before = anatomy(unet)
    with pytest.raises(RuntimeError, match="kv_early or kv_late gives keys and values other tokens than queries"):
        tofu_sd.apply_patch(unet, 0.5, kv_late="mean")
    assert anatomy(unet) == before


def test_unknown_kind_of_map_is_reduced_too() -> None:
    """A soft map has no survivors: its mean and unmerge are weighted sums, also for separate keys."""
    options = {"early": "mean", "late": "mean", "kv_late": "mean", "temperature": 0.1, "window": 3, "sy": 1}
    both, one = tiny.sd15_unet(), tiny.sd15_unet()
    tofu_sd.apply_patch(both, 0.5, **options)
    tofu_sd.apply_patch(one, 0.5, **{name: value for name, value in options.items() if name != "kv_late"})
    assert torch.equal(tiny.predict(both), tiny.predict(one))


@pytest.mark.parametrize(("matching", "ratio"), [("pairs", 0.5), ("pairs", 0.75), ("cells", 0.75)])
def test_equal_groups_are_exact_without_a_bias(matching: str, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """softmax cancels a constant, so that proportional attention changes no bit and passes no mask."""
    masks: list[Any] = []
    plain = F.scaled_dot_product_attention

    def noted(*args: Any, **more: Any) -> Tensor:
        if args[0].shape[-2] > 16:  # the test of whether masks are used has 16 tokens
            masks.append(more.get("attn_mask"))
        return plain(*args, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    unet = tiny.sd15_unet()
    outputs = []
    for proportional in (False, True):
        config = TokenFusionConfig(ratio=ratio, matching=matching, proportional=proportional)
        with tofu_sd.patched(unet, config):
            outputs.append(tiny.predict(unet))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], tiny.predict(unet))
    assert set(masks) == {None}


def test_partly_merged_pairs_have_a_bias() -> None:
    """Two sizes: log 2 on some of the keys changes the result."""
    unet = tiny.sd15_unet()
    outputs = []
    for proportional in (False, True):
        with tofu_sd.patched(unet, 0.25, matching="pairs", proportional=proportional):
            outputs.append(tiny.predict(unet))
    assert not torch.equal(*outputs)
