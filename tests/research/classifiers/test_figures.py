"""Tables on a terminal and images of merged patches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")

from eval.reporting import tables as table
from research.classifiers import figures, tables


def test_narrow_terminal_shows_all_numbers(capsys):
    """Cells were truncated with an ellipsis."""
    results = tables.read(Path(__file__).parents[3] / "benchmarks" / "results" / "classify-demo")
    table.terminal_rows("", *tables.cells(results), [], Console(width=100))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "0.00136" in shown
    assert "0.00223" in shown


def test_outlined_shows_each_group_in_its_mean_colour():
    image = torch.zeros(3, 8, 8)
    image[:, :, 4:] = 1
    group_idx = torch.tensor([[0, 0, 1, 1]] * 2 + [[0, 0, 2, 2]] * 2).flatten()  # patches of 2 pixels
    outlined = figures.outlined(image, group_idx)
    assert set(outlined.unique().tolist()) == {0, 1}
    mixed = figures.outlined(image, torch.zeros(16, dtype=torch.long))
    assert torch.allclose(mixed, torch.full_like(mixed, 0.5))
