"""The examples of docs/add_a_method.md are short and run unchanged."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import tofu_sd
from eval.evaluation import options
from eval.methods.registry import parse
from tofu_sd import recipes
from tofu_sd.core.matching import register_matcher
from tofu_sd.core.partition import PartitionTensors
from tofu_sd.core.token_map import TokenMap

PAGE = (Path(__file__).parents[1] / "docs" / "add_a_method.md").read_text()
EXAMPLES = re.findall(r"`(\w+)\.py`:\n\n```python\n(.*?)```", PAGE, flags=re.DOTALL)


pytestmark = pytest.mark.usefixtures("registries")


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
    """The files lie outside of the checkout, in which the commands run."""
    for folder in ("mine", "checkout"):
        (tmp_path / folder).mkdir()
    for name, code in EXAMPLES:
        (tmp_path / "mine" / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path / "checkout")
    (arguments,) = re.findall(r"^\.venv/bin/python -m eval\.run (.*)$", PAGE, flags=re.MULTILINE)
    parsed = options.parser().parse_args(arguments.split())
    tome, small_norm, freeu = parse(parsed.method, [0.5])
    assert (tome.slug, small_norm.slug, freeu.slug) == ("mean-r50", "mean-r50-small_norm", "freeu")
    for each in re.findall(r"--method (\S*small_norm\.py\S+)", PAGE):
        monkeypatch.chdir(tmp_path / ("checkout" if "../" in each else "mine"))
        assert "mean-r50-small_norm" in [method.slug for method in parse(each.strip("`."), [0.5])]


def test_comparison_differs_from_tome_in_the_matcher_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matcher alone has ToFu's reductions, and tome the mean: two differences at once."""
    monkeypatch.chdir(tmp_path)
    Path("small_norm.py").write_text(dict(EXAMPLES)["small_norm"])
    (mine,) = parse("small_norm.py:small_norm@early=mean@late=mean", [0.5])
    assert mine.fusion is not None
    assert replace(mine.fusion, matching="bipartite") == replace(recipes.TOME, min_tokens=0)


def test_matcher_may_keep_tokens_that_are_no_destinations(monkeypatch: pytest.MonkeyPatch) -> None:
    def last(tokens: Tensor, grid: PartitionTensors, config: Any) -> TokenMap:
        (B, N, _), r = tokens.shape, len(grid.num_merged)
        kept_idx = torch.arange(r, N).expand(B, -1)
        assert not set(grid.parts.dst.tolist()) <= set(kept_idx[0].tolist())
        return TokenMap(kept_idx, (torch.arange(N) - r).clamp_min(0).expand(B, -1))

    register_matcher("last")(last)
    unet = tiny.shallow_unet()
    plain = tiny.predict(unet)
    assert not torch.equal(tiny.predict(tofu_sd.apply_patch(unet, 0.5, matching="last")), plain)
