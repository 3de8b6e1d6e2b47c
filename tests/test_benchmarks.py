"""The program that measures a GPU asks for what exists, within its nine minutes. Here is no GPU to try it on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from eval.bench import parser
from eval.methods import registry
from eval.speed.contender import MODES, SCOPES, unsuitable_reason
from eval.speed.model_shapes import CASES
from eval.speed.transformer_shapes import CASES as TRANSFORMERS

ROOT = Path(__file__).parents[1]
OTHER_PACKAGE = (["pip install tomesd"], ["pip install DeepCache"])


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_run_has_known_cases_scopes_modes_and_methods(gpu: Any) -> None:
    minutes = 0
    for file, asked in gpu.RUNS.items():
        options = parser().parse_args([*asked, "--out", file])
        assert set(options.case.split(",")) <= {*CASES, *TRANSFORMERS}
        assert set(options.scope.split(",")) <= set(SCOPES)
        assert set(options.compile.split(",")) <= set(MODES)
        for method in registry.parse(options.method, [options.ratio]):  # two methods of one row are an error
            assert [unsuitable_reason(method, scope) for scope in options.scope.split(",")] in ([""], *OTHER_PACKAGE)
        minutes += options.minutes
    assert minutes <= 7  # a setup that has begun is finished, and two smaller programs follow


def test_every_check_exists(gpu: Any) -> None:
    assert all((ROOT / check).is_file() for check in gpu.CHECKS)
