"""Renders, trains and checks the embedded text-to-image models."""

from tofu_sd.environment import check_torchvision

check_torchvision()  # what the modules below import fails without a reason where torchvision does not fit
