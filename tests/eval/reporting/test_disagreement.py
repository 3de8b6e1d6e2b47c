"""The image on which two metrics prefer different methods: how it is chosen, drawn and refused."""

from __future__ import annotations

import pytest
from PIL import Image

from eval import EvalError
from eval.common import files
from eval.images.settings import image_path
from eval.reporting.drawings import disagreement

PSNR = {"name": "PSNR", "lower_is_better": False, "digits": 2, "per_image": True}
LPIPS = {"name": "LPIPS-squeeze", "lower_is_better": True, "digits": 4, "per_image": True}
METRICS = [PSNR, LPIPS]


def values(key, psnr, lpips):
    """Returns figures by image of one method: images 0, 1, ... with these values."""
    return {
        str(i): {"id": str(i), "key": key, "prompt": f"prompt {i}", "PSNR": str(p), "LPIPS-squeeze": str(d)}
        for i, (p, d) in enumerate(zip(psnr, lpips, strict=True))
    }


def test_the_image_with_the_strongest_opposed_preferences_is_found():
    """Image 1 has the largest gaps, but both metrics prefer `a` there; image 3 opposes them more than image 2."""
    a = values("a", psnr=[30, 50, 31, 35], lpips=[0.10, 0.01, 0.11, 0.20])
    b = values("b", psnr=[30, 20, 30, 30], lpips=[0.10, 0.40, 0.10, 0.10])
    found = disagreement.find(a, b, METRICS)
    assert (found.image, found.n, found.of) == ("3", 2, 4)
    assert found.prefers == {"PSNR": "a", "LPIPS-squeeze": "b"}
    assert disagreement.find(b, a, METRICS).prefers == found.prefers


def test_a_preference_counts_as_much_as_the_weaker_of_the_two():
    """A large gap of one metric beside a tiny one of the other is no disagreement that one can see."""
    a = values("a", psnr=[60, 32, 30, 30], lpips=[0.1001, 0.12, 0.1, 0.1])
    b = values("b", psnr=[30, 30, 30, 30], lpips=[0.1000, 0.10, 0.1, 0.1])
    assert disagreement.find(a, b, METRICS).image == "1"


def test_an_image_equal_to_the_baseline_prefers_nothing():
    """Its PSNR is infinite for both, and the difference is no number."""
    a = values("a", psnr=["inf", 32], lpips=[0.1, 0.2])
    b = values("b", psnr=["inf", 30], lpips=[0.0, 0.1])
    assert (disagreement.find(a, b, METRICS).image, disagreement.find(a, b, METRICS).n) == ("1", 1)


def test_agreement_on_every_image_is_refused():
    a, b = values("a", [32, 33], [0.1, 0.1]), values("b", [30, 30], [0.2, 0.2])
    with pytest.raises(EvalError, match="PSNR and LPIPS-squeeze agree on each of the 2 images"):
        disagreement.find(a, b, METRICS)


@pytest.fixture
def run(tmp_path):
    """Returns (folder, results, images) of a run of three methods, each with images of one colour."""
    own = [
        values("a-r50", [31, 35], [0.11, 0.2]),
        values("b", [30, 30], [0.1, 0.1]),
        values("baseline", [0, 0], [0, 0]),
    ]
    for i, by_image in enumerate(own):
        for image in by_image.values():
            path = image_path(tmp_path, image["key"], image["id"])
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, files.png(Image.new("RGB", (64, 64), (10 * i, 0, 0))))
    rows = [{"key": "baseline", "method": "baseline", "ratio": None}, {"key": "a-r50", "method": "a", "ratio": 0.5}]
    results = {"rows": [*rows, {"key": "b", "method": "b", "ratio": None}], "metrics": METRICS}
    return tmp_path, results, [image for by_image in own for image in by_image.values()]


def test_sheet_shows_three_images_and_two_differences(run):
    sheet, text = disagreement.draw(*run, ["a 50%", "b"])
    assert text == (
        "PSNR and LPIPS-squeeze prefer different methods on 2 of 2 images. "
        "Most clearly on 1: PSNR prefers a 50%, LPIPS-squeeze prefers b."
    )
    assert sheet.width == 8 + 3 * (64 + 8)
    middle = [sheet.getpixel((8 + i * (64 + 8) + 32, 2 * 18 + 8 + 32)) for i in range(3)]
    assert middle == [(20, 0, 0), (0, 0, 0), (10, 0, 0)]
    below = [sheet.getpixel((8 + i * (64 + 8) + 32, 2 * 18 + 8 + 64 + 8 + 32)) for i in (1, 2)]
    assert below == [(80, 0, 0), (40, 0, 0)]


def test_other_than_two_methods_or_a_missing_metric_is_refused(run):
    out, results, images = run
    with pytest.raises(EvalError, match="compares two methods, and --rows names 1"):
        disagreement.draw(out, {**results, "rows": results["rows"][:2]}, images, ["a 50%"])
    with pytest.raises(EvalError, match="needs PSNR and LPIPS or MS-SSIM"):
        disagreement.draw(out, {**results, "metrics": [PSNR]}, images, ["a 50%", "b"])
