"""Test setup: one thread, no network, no output of libraries."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton decorates its own functions at its first import

import diffusers
import pytest


def _no_download(*_: object, **__: object) -> NoReturn:
    raise URLError("tests need no network")


torch.hub.download_url_to_file = _no_download  # LPIPS and Inception downloads ignore HF_HUB_OFFLINE
torch.set_num_threads(1)
diffusers.logging.set_verbosity_error()
logging.getLogger("tofu_sd").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _merging_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of tests are tiny. What is measured, and what follows, is tested in patching/test_autotune.py."""
    from tofu_sd import timing_cache
    from tofu_sd.patching import autotune

    cache = timing_cache.TimingCache(Path(os.devnull, "times.json"))  # cannot be written
    monkeypatch.setattr(timing_cache, "cache", cache)
    monkeypatch.setattr(autotune.MergeRule, "_measure_for_real", autotune.MergeRule._measure, raising=False)
    monkeypatch.setattr(autotune.MergeRule, "_measure", lambda *_: timing_cache.Timing(full=2.0, merged=1.0))


@pytest.fixture
def registries() -> Iterator[None]:
    """Methods, matchers and reductions that a test registers are gone after it."""
    from eval.methods import registry
    from tofu_sd.core.matching import MATCHERS
    from tofu_sd.core.reductions import REDUCTIONS

    registry.known_methods()  # loads the evaluation's own
    before = [(known, dict(known)) for known in (registry.METHODS, MATCHERS, REDUCTIONS)]
    yield
    registry._load.cache_clear()
    for known, entries in before:
        known.clear()
        known.update(entries)
