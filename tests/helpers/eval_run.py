"""A short evaluation and a classifier that stands in for the demo classifier."""

import torch

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


class ToyClassifier(torch.nn.Module):
    """A feature net with the classifier's interface."""

    def maps(self, pictures):
        return [pictures, pictures[:, :, ::4, ::4]]

    def features(self, pictures):
        return pictures.mean((2, 3))
