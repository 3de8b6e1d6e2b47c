"""Images for the tests of classifiers."""

import numpy as np
import pytest
from classifier_run import SHADES
from PIL import Image


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Returns a folder with train/ and val/: noise images, one brightness per class."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 8)):
        for shade in range(SHADES):
            folder = root / part / f"shade{shade}"
            folder.mkdir(parents=True)
            for i in range(n):
                grain = noise.random((36, 40, 3)) * 30 + 45 * shade
                Image.fromarray(grain.astype(np.uint8)).save(folder / f"{i}.png")
    return root
