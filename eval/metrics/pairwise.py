"""Distances and similarities of two images: PSNR, SSIM, MS-SSIM and LPIPS."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.provenance import version, weights_hash
from .base import LOAD_ERRORS, Metric, Pairwise, Skipped, first_line, full_precision, install_hint, to_unit

LPIPS_NETS = ("alex", "vgg", "squeeze")
SSIM_MIN_SIZE = 11  # pixels: its window
MS_SSIM_MIN_SIZE = 161  # pixels: an 11-pixel window on the last of five scales


def psnr() -> Pairwise:
    """Peak signal-to-noise ratio in dB."""

    def compute(a: Tensor, b: Tensor) -> Tensor:
        error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))  # uint8 differences would wrap around
        return 10 * torch.log10(255**2 / error)  # inf for equal images

    return Pairwise("PSNR", "float64, peak 255, dB", False, compute, digits=2)


def ssim(size: int) -> Metric:
    """Structural similarity (Wang et al. 2004) by pytorch-msssim: other packages crop and pad otherwise."""
    return skipped_for_size("ssim", size) or _structural_similarity("SSIM", "ssim")


def ms_ssim(size: int) -> Metric:
    """Multi-scale structural similarity (Wang et al. 2003) by pytorch-msssim."""
    return skipped_for_size("ms-ssim", size) or _structural_similarity("MS-SSIM", "ms_ssim")


def skipped_for_size(name: str, size: int) -> Skipped | None:
    """Why a metric of this name (of --metrics) cannot measure images of this size; None where it can."""
    minimum = {"ssim": SSIM_MIN_SIZE, "ms-ssim": MS_SSIM_MIN_SIZE}.get(name, 0)
    if size >= minimum:
        return None
    return Skipped(name.upper(), f"needs images of at least {minimum} px, these have {size}")


def _structural_similarity(name: str, function: str) -> Metric:
    try:
        import pytorch_msssim as package
    except ImportError:
        return Skipped(name, "pip install pytorch-msssim")
    measure = getattr(package, function)

    def compute(a: Tensor, b: Tensor) -> Tensor:
        with full_precision():
            return measure(a.float(), b.float(), data_range=255, size_average=False).double()

    return Pairwise(name, f"pytorch-msssim {version('pytorch-msssim')}, window 11, range 255", False, compute)


def lpips(net: str, backbone: Path | None, device: torch.device) -> Metric:
    """LPIPS (Zhang et al. 2018) by the authors' package.

    Args:
        net: one of LPIPS_NETS.
        backbone: a file of the torchvision network's weights; None downloads them.
        device: where it runs.
    """
    name = f"LPIPS-{net}"
    try:
        import lpips as package

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips uses an older interface of torchvision
            model = package.LPIPS(net=net, pnet_rand=backbone is not None, verbose=False)
        if backbone is not None:
            load_backbone(model.net, torch.load(backbone, map_location="cpu", weights_only=True))
    except KeyError as error:
        weights = backbone.name if backbone else net
        return Skipped(name, f"the weights of {weights} are not torchvision's {net}: no {error}")
    except ImportError as error:
        return Skipped(name, install_hint(error, "lpips"))
    except LOAD_ERRORS as error:
        return Skipped(name, f"no weights: {first_line(error)}")
    model = model.to(device).eval().requires_grad_(False)

    def compute(a: Tensor, b: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            distance = model(to_unit(a, device), to_unit(b, device), normalize=True)
        return distance.flatten().cpu().double()

    return Pairwise(name, f"lpips {version('lpips')}, {net}, weights {weights_hash(model)}", True, compute)


def load_backbone(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads a torchvision network's feature weights into LPIPS's slices of that network.

    "features.3.squeeze.bias" becomes "slice2.3.squeeze.bias": the numbers of the layers are the same.
    """
    if not isinstance(weights, dict):
        raise ValueError(f"the file holds a {type(weights).__name__}, and no weights by name")
    plain = {key.removeprefix("features."): value for key, value in weights.items()}
    net.load_state_dict({key: plain[key.partition(".")[2]] for key in net.state_dict()})
