"""How far a method's pictures are from the full model's: each metric with the implementation and net it stands for.

All take uint8 pictures [B, 3, H, W] as read from the saved PNGs and compute in float32 or better. A metric whose
package or weights cannot be had becomes a `Skipped` that says why. Nets are imported when they are asked for.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from tofu_sd.policy import did_you_mean

from . import EvalError
from .files import without_paths
from .options import choices
from .provenance import version

NAMES = ("psnr", "ms-ssim", "lpips", "fid", "judge")
LPIPS_NETS = ("alex", "vgg", "squeeze")
MS_SSIM_SMALLEST = 161  # pixels: an 11-pixel window on the last of five scales


@dataclass(frozen=True)
class Pairwise:
    """A distance or likeness of two pictures: compute(a, b) -> float64 [B]."""

    name: str
    implementation: str
    lower_is_better: bool
    compute: Callable[[Tensor, Tensor], Tensor]
    digits: int = 4


@dataclass(frozen=True)
class Single:
    """A figure of a picture by itself: compute(pictures, prompts) -> float64 [B]. share: it is 0 or 1."""

    name: str
    implementation: str
    lower_is_better: bool
    compute: Callable[[Tensor, Sequence[str]], Tensor]
    digits: int = 3
    share: bool = False


@dataclass(frozen=True)
class SetMetric:
    """The Fréchet distance of two sets of pictures in a feature space: features(pictures) -> [B, D]."""

    name: str
    implementation: str
    features: Callable[[Tensor], Tensor]
    lower_is_better: bool = True
    digits: int = 4


@dataclass(frozen=True)
class Skipped:
    """A metric that cannot be computed here."""

    name: str
    reason: str


Metric = Single | Pairwise | SetMetric | Skipped

_BROKEN = (OSError, RuntimeError, KeyError, ValueError, EOFError, UnpicklingError)  # files of weights, and downloads


def choose(
    names: str,
    *,
    size: int,
    prompts: Collection[str],
    device: torch.device,
    judge: nn.Module | None = None,
    lpips_net: str = "alex",
    lpips_backbone: Path | None = None,
    inception: Path | None = None,
) -> list[Metric]:
    """The metrics of a list such as "psnr,lpips" or "all", loaded."""
    asked = check(names, lpips_net)
    makers: dict[str, Callable[[], list[Metric]]] = {
        "psnr": lambda: [psnr()],
        "ms-ssim": lambda: [ms_ssim(size)],
        "lpips": lambda: [lpips(lpips_net, lpips_backbone, device)],
        "fid": lambda: [fid(inception, device)],
        "judge": lambda: judged(judge, prompts, device),
    }
    if judge is None and names == "all":
        asked.remove("judge")  # it is the demo model's own
    return [metric for name in NAMES if name in asked for metric in makers[name]()]


def usable(metrics: Sequence[Metric], pictures: Tensor, prompts: Sequence[str]) -> list[Metric]:
    """The metrics, each tried on a few pictures: one that cannot measure them becomes Skipped, the others go on."""

    def tried(metric: Metric) -> Metric:
        try:
            match metric:
                case Pairwise():
                    metric.compute(pictures, pictures)
                case Single():
                    metric.compute(pictures, prompts)
                case SetMetric():
                    metric.features(pictures)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:  # what nets say of a wrong size
            return Skipped(metric.name, _line(error))
        return metric

    return [tried(metric) for metric in metrics]


def check(names: str, lpips_net: str = "alex", *files: Path | None) -> list[str]:
    """The names in a list of metrics; EvalError for an unknown one or a missing file, before anything is computed."""
    asked = list(NAMES) if names == "all" else choices(names, NAMES, "metric")
    if lpips_net not in LPIPS_NETS:
        hint = did_you_mean(lpips_net, LPIPS_NETS)
        raise EvalError(f"unknown LPIPS net {lpips_net!r}{hint}; known: {', '.join(LPIPS_NETS)}")
    for file in files:
        if file is not None and not file.is_file():
            raise EvalError(f"there is no file {file.name!r} of weights in {file.parent.name or 'this folder'!r}")
    return asked


def psnr() -> Pairwise:
    def compute(a: Tensor, b: Tensor) -> Tensor:
        error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))  # uint8 differences would wrap around
        return 10 * torch.log10(255**2 / error)  # inf for equal pictures

    return Pairwise("PSNR", "float64, peak 255, dB", False, compute, digits=2)


def ms_ssim(size: int) -> Metric:
    if size < MS_SSIM_SMALLEST:
        return Skipped("MS-SSIM", f"takes pictures of at least {MS_SSIM_SMALLEST} px, these have {size}")
    try:
        from pytorch_msssim import ms_ssim as compute_ms_ssim
    except ImportError:
        return Skipped("MS-SSIM", "pip install pytorch-msssim")

    def compute(a: Tensor, b: Tensor) -> Tensor:
        with full_precision():
            return compute_ms_ssim(a.float(), b.float(), data_range=255, size_average=False).double()

    return Pairwise("MS-SSIM", f"pytorch-msssim {version('pytorch-msssim')}, window 11, range 255", False, compute)


def lpips(net: str, backbone: Path | None, device: torch.device) -> Metric:
    """LPIPS by the authors' package. backbone: a file of the torchvision net's weights, else they are downloaded."""
    name = f"LPIPS-{net}"
    try:
        import lpips as package

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips speaks to torchvision in an older way
            model = package.LPIPS(net=net, pnet_rand=backbone is not None, verbose=False)
        if backbone is not None:
            load_backbone(model.net, torch.load(backbone, map_location="cpu", weights_only=True))
    except ImportError as error:
        return Skipped(name, _missing(error, "lpips"))
    except _BROKEN as error:
        return Skipped(name, f"no weights: {_line(error)}")
    model = model.to(device).eval().requires_grad_(False)

    def compute(a: Tensor, b: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            distance = model(_unit(a, device), _unit(b, device), normalize=True)
        return distance.flatten().cpu().double()

    return Pairwise(name, f"lpips {version('lpips')}, {net}", True, compute)


def load_backbone(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Puts a torchvision net's feature weights ("features.3.squeeze.bias") into LPIPS's slices of that net
    ("slice2.3.squeeze.bias"): the numbers of the layers are the same."""
    plain = {key.removeprefix("features."): value for key, value in weights.items()}
    net.load_state_dict({key: plain[key.partition(".")[2]] for key in net.state_dict()})


def fid(weights: Path | None, device: torch.device) -> Metric:
    """FID's features by torchmetrics (Inception of torch-fidelity, antialiased resize to 299)."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        path = None if weights is None else str(weights)
        model = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    except ImportError as error:
        return Skipped("FID", _missing(error, "torchmetrics[image]"))
    except _BROKEN as error:
        return Skipped("FID", f"no Inception weights (--inception-weights PATH): {_line(error)}")
    model = model.to(device)

    def features(pictures: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            return model(pictures.to(device)).cpu()

    return SetMetric("FID", f"Inception 2048, torchmetrics {version('torchmetrics')}, antialias, float64", features,
                     digits=3)  # fmt: skip


def pd_judge(judge: Any, device: torch.device) -> Pairwise:
    """Perceptual distance in all stages of the embedded model's classifier."""

    from tofu_sd.demo.model import perceptual_distance

    def compute(a: Tensor, b: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            return perceptual_distance(judge, _unit(a, device), _unit(b, device)).cpu().double()

    return Pairwise("PD-judge", _judge_name("5 feature maps"), True, compute)


def fd_judge(judge: Any, device: torch.device) -> SetMetric:
    """Fréchet distance of the embedded model's classifier's pooled features."""

    def features(pictures: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            return judge.features(_unit(pictures, device)).cpu()

    return SetMetric("FD-judge", _judge_name("pooled features, float64"), features)


def accuracy(judge: Any, prompts: Collection[str], device: torch.device) -> Metric:
    """Share of the pictures in which the embedded model's classifier sees the shape, material and setting asked for."""
    from tofu_sd.demo.scenes import CLASSES

    name, labels = "classed as asked", {kind.prompt: kind.labels for kind in CLASSES}
    if not set(prompts) <= labels.keys():
        return Skipped(name, "the classifier knows the demo model's own prompts alone")

    def compute(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        with full_precision(), torch.no_grad():
            seen = judge.classify(_unit(pictures, device)).cpu()
        return (seen == torch.tensor([labels[prompt] for prompt in prompts])).all(1).double()

    return Single(name, _judge_name("share"), False, compute, share=True)


def judged(judge: Any, prompts: Collection[str], device: torch.device) -> list[Metric]:
    """What the embedded model's own classifier can say, where no public net fits its pictures."""
    if judge is None:
        return [Skipped("PD-judge", "it is measured in the demo model's classifier, and this is another model")]
    return [pd_judge(judge, device), fd_judge(judge, device), accuracy(judge, prompts, device)]


def _judge_name(what: str) -> str:
    return f"the demo model's classifier (tofu-sd {version('tofu-sd') or 'from source'}), {what}"


def _unit(pictures: Tensor, device: torch.device) -> Tensor:
    return pictures.to(device).float() / 255


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 means float32: no autocast (bfloat16 moves MS-SSIM by a third), no TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _missing(error: ImportError, package: str) -> str:
    """'pip install lpips', or what it says where the package is there and something under it is not."""
    return f"pip install {shlex.quote(package)}" if error.name == package.partition("[")[0] else _line(error)


def _line(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return without_paths(first)
