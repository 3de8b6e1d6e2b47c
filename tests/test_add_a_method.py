"""The examples of docs/add_a_method.md are short and run unchanged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from eval.evaluation import options
from eval.methods import registry
from eval.methods.registry import METHODS, parse
from tofu_sd.core.matching import MATCHERS

PAGE = (Path(__file__).parents[1] / "docs" / "add_a_method.md").read_text()
EXAMPLES = re.findall(r"`(\w+)\.py`:\n\n```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def _restore_registries() -> Iterator[None]:
    """Restores the registries after each test."""
    before = dict(MATCHERS), dict(METHODS)
    yield
    registry._load.cache_clear()
    for names, entries in zip((MATCHERS, METHODS), before, strict=True):
        names.clear()
        names.update(entries)


def test_page_has_two_examples_of_at_most_15_lines() -> None:
    assert [name for name, _ in EXAMPLES] == ["small_norm", "freeu"]
    for _, code in EXAMPLES:
        assert code.count("\n") <= 15


@pytest.mark.parametrize(("name", "code"), EXAMPLES)
def test_example_method_changes_the_image_and_is_undone(
    name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"{name}.py").write_text(code)
    (method,) = parse(f"{name}.py:{name}", [0.5])
    pipe = tiny.sd15_pipe()
    before = tiny.images(pipe)
    with method.apply(pipe):
        inside = tiny.images(pipe)
    assert not torch.equal(inside, before)
    assert torch.equal(tiny.images(pipe), before)


def test_page_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, code in EXAMPLES:
        Path(f"{name}.py").write_text(code)
    (arguments,) = re.findall(r"^python -m eval\.run (.*)$", PAGE, flags=re.MULTILINE)
    parsed = options.parser().parse_args(arguments.split())
    assert len(parse(parsed.method, [0.5])) == 3
    (with_options,) = re.findall(r"`--method (small_norm\S+)`", PAGE)
    assert parse(with_options, [0.5])[0].slug == "mean-r50-small_norm"
