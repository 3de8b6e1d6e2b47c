"""How far a method's pictures are from the full model's: each metric with the implementation and net it stands for.

All take uint8 pictures [B, 3, H, W] as read from the saved PNGs and compute in float32 or better. A metric whose
package or weights cannot be had becomes a `Skipped` that says why. Nets are imported when they are asked for.
"""

from __future__ import annotations

import hashlib
import math
import shlex
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tofu_sd.utils import did_you_mean

from .. import EvalError
from ..common.cli import choices
from ..common.devices import out_of_memory
from ..common.files import without_paths
from ..common.provenance import version, weights_hash
from .statistics import frechet, kernel_distance

NAMES = ("psnr", "ssim", "ms-ssim", "lpips", "dino", "clip", "fid", "kid", "judge")
STANDARD = ("psnr", "ssim", "ms-ssim", "lpips", "fid", "judge")
LPIPS_NETS = ("alex", "vgg", "squeeze")
SSIM_SMALLEST = 11  # pixels: its window
MS_SSIM_SMALLEST = 161  # pixels: an 11-pixel window on the last of five scales
CLIP = "openai/clip-vit-large-patch14"
DINO = "facebook/dinov2-base"


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
class Features:
    """A space that sets of pictures are compared in: compute(pictures) -> [B, D]."""

    implementation: str
    compute: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SetMetric:
    """A distance of two sets of pictures by their features: distance([N, D], [N, D]).

    Metrics with the same `features` share what it computes. least: below which no distance is; one that is unbiased
    falls below 0 by chance.
    """

    name: str
    implementation: str
    features: Features
    distance: Callable[[Tensor, Tensor], float]
    lower_is_better: bool = True
    digits: int = 4
    least: float = 0.0


@dataclass(frozen=True)
class Skipped:
    """A metric that cannot be computed here."""

    name: str
    reason: str


Metric = Single | Pairwise | SetMetric | Skipped

_BROKEN = (
    OSError,
    RuntimeError,
    KeyError,
    ValueError,
    EOFError,
    UnpicklingError,
    SafetensorError,
)  # files of weights, and downloads


@dataclass(frozen=True)
class Nets:
    """Where the nets come from that metrics measure with. Files of weights are None where they are downloaded."""

    lpips: str = "alex"
    lpips_backbone: Path | None = None
    inception: Path | None = None
    clip: str = CLIP
    dino: str = DINO


def choose(
    names: str,
    nets: Nets,
    *,
    size: int,
    prompts: Collection[str],
    device: torch.device,
    judge: nn.Module | None = None,
) -> list[Metric]:
    """The metrics of a list such as "psnr,lpips", "standard" or "all", loaded."""
    asked = check(names, nets)
    inception = cache(lambda: _inception(nets.inception, device))  # one net for two metrics
    makers: dict[str, Callable[[], list[Metric]]] = {
        "psnr": lambda: [psnr()],
        "ssim": lambda: [ssim(size)],
        "ms-ssim": lambda: [ms_ssim(size)],
        "lpips": lambda: [lpips(nets.lpips, nets.lpips_backbone, device)],
        "dino": lambda: [dino(nets.dino, device)],
        "clip": lambda: [clip(nets.clip, device)],
        "fid": lambda: [_of_sets("FID", inception(), frechet, 3)],
        "kid": lambda: [
            _of_sets("KID", inception(), kernel_distance, 6),
            *([kd_judge(judge, device)] if judge else []),
        ],
        "judge": lambda: judged(judge, prompts, device),
    }
    if judge is None and "judge" in asked and "judge" not in names.split(","):
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
                    metric.features.compute(pictures)
        except Exception as error:  # nets say in many ways that a size is wrong, or that they are of another kind
            if out_of_memory(error):  # which another device, or the same one later, might have
                raise
            return Skipped(metric.name, _line(error))
        return metric

    return [tried(metric) for metric in metrics]


TAKERS = {  # options of nets, and the metrics that they are for
    "lpips_net": ("lpips",), "lpips_backbone": ("lpips",), "inception_weights": ("fid", "kid"), "clip_model": ("clip",),
    "dino_model": ("dino",),
}  # fmt: skip


def check(names: str, nets: Nets) -> list[str]:
    """The names in a list of metrics; EvalError for an unknown one or a missing file, before anything is computed."""
    groups = {"all": NAMES, "standard": STANDARD}
    parts = [part.strip() for part in names.split(",")]
    asked = choices(",".join(",".join(groups.get(part, [part])) for part in parts), NAMES, "metric")
    if nets.lpips not in LPIPS_NETS:
        hint = did_you_mean(nets.lpips, LPIPS_NETS)
        raise EvalError(f"unknown LPIPS net {nets.lpips!r}{hint}; known: {', '.join(LPIPS_NETS)}")
    for file in (nets.lpips_backbone, nets.inception):
        if file is not None and not file.is_file():
            raise EvalError(f"there is no file {file.name!r} of weights in {file.parent.name or 'this folder'!r}")
    return asked


def too_small(names: str, size: int) -> list[Skipped]:
    """Those of a list of metrics that cannot measure pictures of this size, known before any is drawn."""
    asked = check(names, Nets())
    least = {"ssim": ("SSIM", SSIM_SMALLEST), "ms-ssim": ("MS-SSIM", MS_SSIM_SMALLEST)}
    return [_too_small(*least[name], size) for name in asked if name in least and size < least[name][1]]


def _too_small(name: str, least: int, size: int) -> Skipped:
    return Skipped(name, f"takes pictures of at least {least} px, these have {size}")


def psnr() -> Pairwise:
    def compute(a: Tensor, b: Tensor) -> Tensor:
        error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))  # uint8 differences would wrap around
        return 10 * torch.log10(255**2 / error)  # inf for equal pictures

    return Pairwise("PSNR", "float64, peak 255, dB", False, compute, digits=2)


def ssim(size: int) -> Metric:
    """Structural similarity (Wang et al. 2004) by pytorch-msssim: other packages crop and pad otherwise."""
    if size < SSIM_SMALLEST:
        return _too_small("SSIM", SSIM_SMALLEST, size)
    return _structural("SSIM", "ssim")


def ms_ssim(size: int) -> Metric:
    if size < MS_SSIM_SMALLEST:
        return _too_small("MS-SSIM", MS_SSIM_SMALLEST, size)
    return _structural("MS-SSIM", "ms_ssim")


def _structural(name: str, function: str) -> Metric:
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
    """LPIPS by the authors' package. backbone: a file of the torchvision net's weights, else they are downloaded."""
    name = f"LPIPS-{net}"
    try:
        import lpips as package

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips speaks to torchvision in an older way
            model = package.LPIPS(net=net, pnet_rand=backbone is not None, verbose=False)
        if backbone is not None:
            load_backbone(model.net, torch.load(backbone, map_location="cpu", weights_only=True))
    except KeyError as error:
        return Skipped(
            name, f"the weights of {backbone.name if backbone else net} are not torchvision's {net}: no {error}"
        )
    except ImportError as error:
        return Skipped(name, _missing(error, "lpips"))
    except _BROKEN as error:
        return Skipped(name, f"no weights: {_line(error)}")
    model = model.to(device).eval().requires_grad_(False)

    def compute(a: Tensor, b: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            distance = model(_unit(a, device), _unit(b, device), normalize=True)
        return distance.flatten().cpu().double()

    return Pairwise(name, f"lpips {version('lpips')}, {net}, weights {weights_hash(model)}", True, compute)


def load_backbone(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Puts a torchvision net's feature weights ("features.3.squeeze.bias") into LPIPS's slices of that net
    ("slice2.3.squeeze.bias"): the numbers of the layers are the same."""
    if not isinstance(weights, dict):
        raise ValueError(f"the file holds a {type(weights).__name__}, and no weights by name")
    plain = {key.removeprefix("features."): value for key, value in weights.items()}
    net.load_state_dict({key: plain[key.partition(".")[2]] for key in net.state_dict()})


def _inception(weights: Path | None, device: torch.device) -> Features | str:
    """FID's features by torchmetrics (Inception of torch-fidelity, antialiased resize to 299); why not, in words."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        path = None if weights is None else str(weights)
        model = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    except ImportError as error:
        return _missing(error, "torchmetrics[image]")
    except _BROKEN as error:
        return f"no Inception weights (--inception-weights PATH): {_line(error)}"
    except (TypeError, AttributeError) as error:
        if weights is None:  # it is not the file
            raise
        return f"no Inception weights in {weights.name}: {_line(error)}"
    model = model.to(device)

    def compute(pictures: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            return model(pictures.to(device)).cpu()

    about = (
        f"Inception 2048, torchmetrics {version('torchmetrics')}, torch-fidelity {version('torch-fidelity')}, "
        f"antialias, weights {weights_hash(model)}"
    )
    return Features(about, compute)


def _of_sets(name: str, found: Features | str, distance: Callable[[Tensor, Tensor], float], digits: int) -> Metric:
    if isinstance(found, str):
        return Skipped(name, found)
    how, least = ("U-statistic of pairs, float64", -math.inf) if distance is kernel_distance else ("float64", 0.0)
    return SetMetric(name, f"{found.implementation}, {how}", found, distance, digits=digits, least=least)


def clip(model_id: str, device: torch.device) -> Metric:
    """CLIP score (Hessel et al. 2021, at torchmetrics' scale): 100 · max(0, cosine of a picture and its prompt)."""
    found = _transformer(model_id, device)
    if isinstance(found, str):
        return Skipped("CLIP score", found)
    model, prepare = found

    def compute(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        asked = prepare(text=list(prompts), images=list(pictures), return_tensors="pt", padding=True, truncation=True)
        with full_precision(), torch.no_grad():
            seen = model(**asked.to(device))
        cosine = torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds)
        return (100 * cosine.clamp_min(0)).cpu().double()

    return Single("CLIP score", _transformer_name(model_id, model, prepare), False, compute)


def dino(model_id: str, device: torch.device) -> Metric:
    """One minus the cosine of two pictures' class tokens, as ToMA reports it."""
    found = _transformer(model_id, device)
    if isinstance(found, str):
        return Skipped("DINO", found)
    model, prepare = found

    def embed(pictures: Tensor) -> Tensor:
        shown = prepare(images=list(pictures), return_tensors="pt").to(device)
        with full_precision(), torch.no_grad():
            return model(**shown).last_hidden_state[:, 0].cpu().double()

    def compute(a: Tensor, b: Tensor) -> Tensor:
        return 1 - torch.nn.functional.cosine_similarity(embed(a), embed(b))

    return Pairwise("DINO", _transformer_name(model_id, model, prepare), True, compute)


def _transformer(model_id: str, device: torch.device) -> tuple[Any, Any] | str:
    """(a model of transformers, what prepares its input) by id or folder; why not, in words."""
    try:
        from transformers import AutoImageProcessor, AutoModel, AutoProcessor

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the newer name of torch_dtype, which older ones lack
            # not the type it was saved in, which newer ones would take
            model = AutoModel.from_pretrained(model_id, torch_dtype=torch.float32)
        model = model.to(device).eval().requires_grad_(False)
        kind = AutoProcessor if hasattr(model, "text_model") else AutoImageProcessor
        return model, kind.from_pretrained(model_id)
    except ImportError as error:
        return _missing(error, "transformers")
    except _BROKEN as error:
        return f"no weights: {_line(error)}"


def _transformer_name(model_id: str, model: nn.Module, prepare: Any) -> str:
    name = Path(model_id).name if Path(model_id).is_dir() else model_id
    seen = str(sorted(getattr(prepare, "image_processor", prepare).to_dict().items()))
    preparation = hashlib.sha256(seen.encode()).hexdigest()[:8]
    return f"transformers {version('transformers')}, {name}, weights {weights_hash(model)}, input {preparation}"


def pd_judge(judge: Any, device: torch.device) -> Pairwise:
    """Perceptual distance in all stages of the embedded model's classifier."""

    from tofu_sd.demo.classifier import perceptual_distance

    def compute(a: Tensor, b: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            return perceptual_distance(judge, _unit(a, device), _unit(b, device)).cpu().double()

    return Pairwise("PD-judge", f"{_judge_name(judge)}, 5 feature maps", True, compute)


def fd_judge(judge: Any, device: torch.device) -> SetMetric:
    """Fréchet distance of the embedded model's classifier's pooled features."""
    pooled = _pooled(judge, device)
    return SetMetric("FD-judge", f"{pooled.implementation}, float64", pooled, frechet)


def kd_judge(judge: Any, device: torch.device) -> SetMetric:
    """Their kernel distance."""
    pooled = _pooled(judge, device)
    about = f"{pooled.implementation}, U-statistic of pairs, float64"
    return SetMetric("KD-judge", about, pooled, kernel_distance, digits=6, least=-math.inf)


@cache  # one for one judge, so that both distances read the pictures once
def _pooled(judge: Any, device: torch.device) -> Features:
    def compute(pictures: Tensor) -> Tensor:
        with full_precision(), torch.no_grad():
            return judge.features(_unit(pictures, device)).cpu()

    return Features(f"{_judge_name(judge)}, pooled features", compute)


def accuracy(judge: Any, prompts: Collection[str], device: torch.device) -> Metric:
    """Share of the pictures in which the embedded model's classifier sees the shape, material and setting asked for."""
    from tofu_sd.demo.scene_classes import CLASSES

    name, labels = "classed as asked", {kind.prompt: kind.labels for kind in CLASSES}
    if not set(prompts) <= labels.keys():
        return Skipped(name, "the classifier knows the demo model's own prompts alone")

    def compute(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        with full_precision(), torch.no_grad():
            seen = judge.classify(_unit(pictures, device)).cpu()
        return (seen == torch.tensor([labels[prompt] for prompt in prompts])).all(1).double()

    return Single(name, f"{_judge_name(judge)}, share", False, compute, share=True)


def judged(judge: Any, prompts: Collection[str], device: torch.device) -> list[Metric]:
    """What the embedded model's own classifier can say, where no public net fits its pictures."""
    if judge is None:
        return [Skipped("PD-judge", "it is measured in the demo model's classifier, and this is another model")]
    return [pd_judge(judge, device), fd_judge(judge, device), accuracy(judge, prompts, device)]


def _judge_name(judge: nn.Module) -> str:
    return f"the demo model's classifier, weights {weights_hash(judge)}"


def flat(pictures: Tensor) -> Tensor:
    """Which of the pictures [B, 3, H, W] are one flat colour: black, as where a model gave NaN, or any other."""
    return (pictures.amax((2, 3)) == pictures.amin((2, 3))).all(1)


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
