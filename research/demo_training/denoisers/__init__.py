"""The denoisers of the embedded models, each with its text encoders, its loss and its pipeline."""

from __future__ import annotations

from .base import Denoiser
from .flux import FluxDenoiser
from .sd3 import SD3Denoiser
from .unet import UNetDenoiser

DENOISERS: dict[str, type[Denoiser]] = {"unet": UNetDenoiser, "sd3": SD3Denoiser, "flux": FluxDenoiser}
