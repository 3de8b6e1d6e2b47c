"""Matchers and reductions from outside the package are used by name; names are unique."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import tofu_sd
from tofu_sd import TokenFusionConfig
from tofu_sd.core import checked
from tofu_sd.core.matching import MATCHERS, get_matcher, register_matcher
from tofu_sd.core.partition import PartitionTensors
from tofu_sd.core.reductions import REDUCTIONS, mean, prune, register_reduction
from tofu_sd.core.token_map import SoftMap, TokenMap

pytestmark = pytest.mark.usefixtures("registries")


def first_sources(tokens: Tensor, grid: PartitionTensors, config: Any) -> TokenMap:
    """Merges the first r tokens into the last one, whatever their values."""
    batch, total, _ = tokens.shape
    r = len(grid.num_merged)
    kept_idx = torch.arange(r, total, device=tokens.device)
    group_idx = torch.cat([torch.full((r,), total - r - 1, device=tokens.device), torch.arange(total - r)])
    return TokenMap(kept_idx.expand(batch, -1), group_idx.expand(batch, -1))


def test_registered_matcher_builds_the_maps_of_a_model() -> None:
    register_matcher("first_sources")(first_sources)
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, matching="first_sources")
    with tofu_sd.record_maps(unet) as records:
        merged = tiny.predict(unet)
    expected = records[0].map.kept_idx[0]
    assert torch.equal(expected, torch.arange(len(expected), 2 * len(expected)))
    assert not torch.equal(merged, tiny.predict(tofu_sd.remove_patch(unet)))


def test_matcher_name_is_part_of_the_slug() -> None:
    """Images of two matchers must not share an output folder."""
    register_matcher("first_sources")(first_sources)
    assert TokenFusionConfig(matching="first_sources").slug == "tofu-r50-first_sources"


def test_unknown_matcher_raises_and_lists_known_matchers() -> None:
    with pytest.raises(
        ValueError, match=r"'bipartit' \(did you mean 'bipartite'\?\).*'bipartite', 'soft', 'pairs' or 'cells'"
    ):
        TokenFusionConfig(matching="bipartit")


@pytest.mark.parametrize("name", ["", "two words", "a/b", "1st"])
def test_matcher_name_must_be_an_identifier(name: str) -> None:
    with pytest.raises(ValueError, match="must be an identifier"):
        register_matcher(name)


def test_duplicate_name_is_not_registered() -> None:
    """A second registration would silently change what the name means."""
    with pytest.raises(ValueError, match="'bipartite' is registered already"):
        register_matcher("bipartite")(first_sources)
    register_matcher("first_sources")(first_sources)
    register_matcher("first_sources")(first_sources)  # as when its module is imported again

    def mean(x: Tensor, map: TokenMap) -> Tensor:
        return prune(x, map)

    with pytest.raises(ValueError, match="'mean' is registered already"):
        register_reduction(mean)


def test_registered_reduction_is_available_by_name() -> None:
    @register_reduction
    def halved(x: Tensor, map: TokenMap) -> Tensor:
        return mean(x, map) / 2

    config = TokenFusionConfig(early="halved", late="halved")
    assert (config.early, config.slug) == (halved, "halved-r50")
    assert "halved" in REDUCTIONS


def _shifted(map: TokenMap) -> TokenMap:
    return map._replace(kept_idx=map.kept_idx.roll(1, dims=1))


INVALID_MAPS: list[tuple[Callable[[TokenMap], Any], str]] = [
    (lambda map: map._replace(group_idx=map.group_idx[:, 1:]), "group_idx [2, 255]; it must be [2, 256]"),
    (lambda map: map._replace(group_idx=map.group_idx[:1]), "group_idx [1, 256]; it must be [2, 256]"),
    (lambda map: map._replace(kept_idx=map.kept_idx[:, 1:]), "kept_idx [2, 127]; it must be [2, 128]"),
    (lambda map: map._replace(kept_idx=map.kept_idx.int()), "kept_idx of torch.int32; it must be torch.int64"),
    (lambda map: map._replace(kept_idx=map.kept_idx.to("meta")), "kept_idx on meta; it must be on cpu, as the tokens"),
    (lambda map: map._replace(kept_idx=[1]), "kept_idx of type list; it must be a tensor [2, 128]"),
    (tuple, "a tuple; it must be a TokenMap or a SoftMap of tofu_sd.core.token_map"),
    (lambda map: None, "a NoneType; it must be a TokenMap or a SoftMap"),
    (lambda map: map._replace(kept_idx=map.kept_idx + 1), "kept_idx from 129 to 256; it must be from 0 to 255"),
    (lambda map: map._replace(group_idx=map.group_idx - 1), "group_idx from -1 to 126; it must be from 0 to 127"),
    (_shifted, "group 127 for token 255, which is kept_idx[0, 0]; it must be 0: a survivor is in its own group"),
    (lambda map: SoftMap(map.group_idx, *[map.kept_idx] * 4), "a SoftMap, and early is 'prune'; it must be a TokenMap"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), INVALID_MAPS)
def test_invalid_map_of_a_matcher_raises_with_what_it_must_be(change: Callable[[Any], Any], message: str) -> None:
    """Otherwise merging is skipped, or torch's own error comes from another place."""
    register_matcher("third_a")(lambda tokens, grid, config: change(first_sources(tokens, grid, config)))
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, matching="third_a")
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        tiny.predict(unet)
    assert str(refused.value).startswith(f"matcher third_a returned {message}")


def _soft(tokens: Tensor, total: int, **changes: Any) -> SoftMap:
    """One window: token 2 k and 2 k + 1 share the cluster of token 2 k."""
    n = torch.arange(total)
    weights = (n.unsqueeze(1) // 2 == torch.arange(total // 2)).float().expand(len(tokens), 1, -1, -1)
    fields = {"weights": weights, "tokens": n.unsqueeze(0), "src_index": n, "kept_idx": n[::2],
              "dst_index": torch.arange(total // 2)}  # fmt: skip
    return SoftMap(**{**fields, **{name: change(fields[name]) for name, change in changes.items()}})


@pytest.mark.parametrize(("changes", "message"), [
    ({}, ""),
    ({"weights": lambda w: w[0]}, "weights [1, 256, 128]; it must be [2, T, M, D]"),
    ({"weights": lambda w: w / 2}, "weights with row sums from 0.5 to 0.5; it must be 1 in each row"),
    ({"dst_index": lambda i: i + 1}, "dst_index from 1 to 128; it must be from 0 to 127"),
    ({"src_index": lambda i: i[1:]}, "src_index [255]; it must be [256]"),
])  # fmt: skip
def test_soft_map_of_a_matcher_is_checked(changes: dict[str, Any], message: str) -> None:
    register_matcher("soft_pairs")(lambda tokens, grid, config: _soft(tokens, tokens.shape[1], **changes))
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, matching="soft_pairs", early=mean, late=mean)
    if not message:
        assert tiny.predict(unet).isfinite().all()
        return
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        tiny.predict(unet)
    assert str(refused.value) == f"matcher soft_pairs returned {message}"


def test_indices_are_read_once_for_each_number_of_tokens_and_never_in_compiled_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading them synchronizes a device; compiled code must not read them."""
    read: list[int] = []
    check = checked.CheckedMatcher._check_values
    monkeypatch.setattr(
        checked.CheckedMatcher, "_check_values", lambda self, map, N, K: (read.append(N), check(self, map, N, K))
    )
    matcher = lambda tokens, grid, config: first_sources(tokens, grid, config)  # noqa: E731
    register_matcher("third")(matcher)
    unet, eager = (tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, matching="third") for _ in range(2))
    torch._dynamo.reset()
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    compiled = tiny.predict(unet)
    assert read == []
    for _ in range(2):
        assert torch.equal(tiny.predict(eager), compiled)
        tiny.predict(eager, 8, 8)
    assert read == [256, 64]


def test_threshold_refuses_a_registered_matcher() -> None:
    """It would not be called, as a threshold counts the cosines of bipartite matching."""
    register_matcher("first_sources")(first_sources)
    with pytest.raises(ValueError, match=r"matching is 'first_sources' and threshold is 0\.7.*: set only one"):
        TokenFusionConfig(matching="first_sources", threshold=0.7)


def test_built_in_matchers_are_not_checked() -> None:
    assert get_matcher("bipartite") is MATCHERS["bipartite"]


def test_model_with_a_registered_matcher_can_be_copied_and_pickled() -> None:
    register_matcher("first_sources")(first_sources)
    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, matching="first_sources")
    for copied in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(tiny.predict(copied), tiny.predict(unet))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("change", "message"), [
    (lambda y: y[:, 1:], "[2, 127, 16]; it must be [2, 128, 16]"),
    (lambda y: y.double(), "torch.float64 on cpu; it must be torch.float32 on cpu, as the tokens are"),
    (lambda y: (y,), "a tuple; it must be a tensor [2, 128, 16]"),
])  # fmt: skip
def test_invalid_result_of_a_reduction_raises_with_what_it_must_be(
    change: Callable[[Tensor], Any], message: str, compiled: bool
) -> None:
    def third(x: Tensor, map: TokenMap) -> Tensor:
        return change(mean(x, map))

    unet = tofu_sd.apply_patch(tiny.shallow_unet(), 0.5, early=third, late=third)
    if compiled:
        torch._dynamo.reset()
        unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        tiny.predict(unet)
    assert str(refused.value) == f"reduction third returned {message}"
