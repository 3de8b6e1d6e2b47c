"""Renders, trains and checks the embedded text-to-image models."""

from tofu_sd.environment import check_torchvision

<<<<<<< HEAD
check_torchvision()  # what the modules below import fails without a reason where torchvision does not fit
=======
check_torchvision()  # explains an installation in which diffusers cannot be imported
>>>>>>> lib
