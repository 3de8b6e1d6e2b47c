"""Renders, trains and checks the embedded text-to-image models."""

from tofu_sd.environment import check_torchvision

check_torchvision()  # explains an installation in which diffusers cannot be imported
