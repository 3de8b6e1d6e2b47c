"""Images of the merged tokens, of the requested step and block."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageFont

from eval import run as run_module
from eval.evaluation import prepare
from eval.images import merge_maps


def test_report_shows_merge_maps(command, capsys):
    assert run_module.main([*command, "--method", "tofu,tomesd", "--maps", "--out", "out"]) == 0
    assert [path.name for path in Path("out/maps").glob("*.png")] == ["tofu-r50.png"]
    with Image.open("out/maps/tofu-r50.png") as image:
        assert image.size == (3 * 64 + 2 * merge_maps.GAP, 64 + merge_maps.CAPTION)
    assert Path("out/report.html").read_text().count('alt="Merged tokens"') == 1


@pytest.mark.parametrize(
    ("method", "step", "at"), [("tofu", 3, 3), ("tofu", None, 3), ("tofu@start=0.5", 1, 3), ("tofu@end=0.5", 4, 2)]
)
def test_merge_maps_show_the_requested_or_nearest_step(command, monkeypatch, method, step, at):
    captions = []
    monkeypatch.setattr(merge_maps, "fit", lambda text, *_: captions.append(text) or text)
    more = [] if step is None else ["--map-step", str(step)]
    options = ["--steps", "4", "--limit", "1", "--maps", *more]
    assert run_module.main([*command, "--method", method, *options, "--generate-only", "--out", "out"]) == 0
    assert [caption.partition(",")[0] for caption in captions if caption.startswith("step")] == [f"step {at}"] * 2


def test_merge_maps_show_the_requested_block(command, deep, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "load_model", lambda *_: (deep, None))
    captions = []
    monkeypatch.setattr(merge_maps, "fit", lambda text, *_: captions.append(text) or text)
    options = [*command, "--limit", "1", "--maps", "--generate-only", "--out", "out"]
    for asked, blocks in (
        ("down_blocks.0", ["down_blocks.0.attentions.0", "down_blocks.0.attentions.1"]),
        ("attentions.2", ["up_blocks.3.attentions.2"]),
    ):
        captions.clear()
        assert run_module.main([*options, "--method", "tofu", "--map-block", asked]) == 0
        shown = [caption.partition(", ")[2].removesuffix(".transformer_blocks.0") for caption in captions[1:]]
        assert shown == blocks
    assert run_module.main([*options, "--method", "tofu", "--map-block", "up_block.9"]) == 2
    assert "--map-block is 'up_block.9'; merged blocks: down_blocks.0.attentions.0" in capsys.readouterr().err


def test_caption_narrower_than_a_letter_terminates():
    assert merge_maps.fit("baseline", ImageFont.load_default(15), 2) == "…"
