"""Matchers and reductions from outside the package are used by name; names are unique."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import tofu_sd
from tofu_sd import TokenFusionConfig
from tofu_sd.core.matching import MATCHERS, register_matcher
from tofu_sd.core.partition import PartitionTensors
from tofu_sd.core.reductions import REDUCTIONS, mean, prune, register_reduction
from tofu_sd.core.token_map import TokenMap


@pytest.fixture(autouse=True)
def _restore_registries() -> Iterator[None]:
    """Restores the registries after each test."""
    before = dict(MATCHERS), dict(REDUCTIONS)
    yield
    for registry, entries in zip((MATCHERS, REDUCTIONS), before, strict=True):
        registry.clear()
        registry.update(entries)


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
    with pytest.raises(ValueError, match=r"'bipartit' \(did you mean 'bipartite'\?\).*'bipartite' or 'soft'"):
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
