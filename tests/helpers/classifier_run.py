"""Sizes of the smallest classifiers, and a run of the command that evaluates them."""

from __future__ import annotations

import json

SMALL = ["--stem", "patches", "--side", "32", "--patch", "4", "--width", "24", "--depth", "4", "--heads", "2",
         "--device", "cpu"]  # fmt: skip
SHADES = 6  # classes of images, separated by brightness


def run(trained, images, out, *more):
    """Evaluates classifiers on images and returns the results."""
    from research.classifiers import classify  # needs timm, without which the tests are skipped

    common = ["--model", trained, "--data", str(images / "val"), "--out", str(out), "--device", "cpu", "--rounds", "0"]
    assert classify.main([*common, *more]) == 0
    return json.loads((out / "classify.json").read_text())
