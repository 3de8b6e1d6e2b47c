"""A short evaluation and a classifier that stands in for the demo classifier."""

import torch

from tofu_sd.demo.models import SCENES

COMMAND = [
    "--model",
    "tiny",
    "--steps",
    "1",
    "--size",
    "64",
    "--batch",
    "2",
    "--metrics",
    "psnr,ms-ssim,demo-classifier",
]
PROMPTS = ['a <script>alert("x")</script> & co', "a bee", "an old oak", "a kite", "a pond"]


class ToyClassifier(torch.nn.Module):
    """The classifier's interface. An image's class is the one whose index is the red level of its first pixel."""

    labels_of_prompts = SCENES.labels_of_prompts

    def maps(self, images):
        return [images, images[:, :, ::2, ::2]]

    def features(self, images):
        return images.mean((2, 3))

    def classify(self, images):
        from tofu_sd.demo.scene_classes import CLASSES

        return torch.tensor([CLASSES[int(level)].labels for level in (images[:, 0, 0, 0] * 255).round()])


def rows(results):
    """Returns the rows of results by their keys."""
    return {row["key"]: row for row in results["rows"]}
