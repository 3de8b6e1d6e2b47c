"""Classifiers by name: timm's, the embedded ones, and those in a folder of research.classifiers.train."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eval import EvalError
from eval.common import formats
from eval.common.files import check_shape, read_json, without_paths
from tofu_sd.demo.classifier import DemoClassifier

from ..adaptivision.model import AdaptiVision, Size

WEIGHTS, ABOUT = "model.safetensors", "model.json"
EMBEDDED = Path(__file__).parent / "weights"
KINDS = ("vit", "adaptivision")


class ConvolutionStem(nn.Module):
    """Tokens from early convolutions (Xiao et al., NeurIPS 2021), with which small transformers train much faster.

    Images [B, 3, H, W] in 0..1 -> [B, N, width]: the first three stages of the demo classifier, which halve the image
    three times, then average pooling by patch / 8.
    """

    STAGES, STRIDE = 3, 8

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any):
        super().__init__()
        if patch_size % self.STRIDE:
            raise EvalError(f"patch is {patch_size}; before convolutions it must be a multiple of {self.STRIDE}")
        self.pool = patch_size // self.STRIDE
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.stages = DemoClassifier().stages[: self.STAGES]
        self.proj = nn.Conv2d(DemoClassifier.WIDTHS[self.STAGES - 1], embed_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = images * 2 - 1
        for stage in self.stages:
            x = stage(x)
        return self.proj(F.avg_pool2d(x, self.pool)).flatten(2).mT

    def copy_stages(self, classifier: nn.Module) -> None:
        """Copies the stages of the demo classifier."""
        self.stages.load_state_dict(classifier.stages[: self.STAGES].state_dict())  # type: ignore[index, union-attr]


STEMS = {"patches": PatchEmbed, "convolutions": ConvolutionStem}


@dataclass(frozen=True)
class Architecture:
    """Everything that defines a classifier except its weights.

    Args:
        kind: one of KINDS.
        stem: "patches", as in ViT, or "convolutions" before the transformer.
        side: of the images, in pixels.
        patch: side of a patch, in pixels.
        width: channels of a token.
        depth, heads, classes: number of layers, heads and classes.
        options: further options of AdaptiVision.
    """

    kind: str = "vit"
    stem: str = "patches"
    side: int = 112
    patch: int = 8
    width: int = 96
    depth: int = 12
    heads: int = 3
    classes: int = 96
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise EvalError(f"kind is {self.kind!r}; it must be {' or '.join(KINDS)}")
        if self.stem not in STEMS:
            raise EvalError(f"stem is {self.stem!r}; it must be {' or '.join(STEMS)}")
        if self.side % self.patch:
            raise EvalError(f"side is {self.side}; it must be a multiple of the patch's {self.patch} pixels")
        if self.width % self.heads:
            raise EvalError(f"width is {self.width}; it must be a multiple of the {self.heads} heads")

    def build(self) -> nn.Module:
        """Builds the model with initial weights, by torch's seed. EvalError for options that the model refuses."""
        if self.kind == "adaptivision":
            stem = None
            if self.stem == "convolutions":
                stem = ConvolutionStem(self.side, self.patch, 3, self.width)
            try:
                size = Size(self.side, self.patch, self.width, self.depth, self.heads, self.classes)
                return AdaptiVision(size, embed=stem, **self.options)
            except ValueError as error:
                raise EvalError(str(error)) from error
        return VisionTransformer(
            img_size=self.side, patch_size=self.patch, embed_dim=self.width, depth=self.depth, num_heads=self.heads,
            num_classes=self.classes, embed_layer=STEMS[self.stem],
        )  # fmt: skip


@dataclass(frozen=True)
class Classifier:
    """A classifier with its weights.

    Args:
        name: for tables.
        model: images [B, 3, side, side] -> scores [B, classes].
        side: of the images, in pixels.
        seed: of its training; None where it is unknown.
        own: whether it takes images in 0..1, as those trained here; timm's have a transform.
    """

    name: str
    model: nn.Module
    side: int
    seed: int | None = None
    own: bool = True


def load(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Classifier]:
    """Loads the classifiers of a name.

    Args:
        name: "demo" (three trained here); folders of research.classifiers.train, separated by commas; or a model of
            timm's, which is loaded with pretrained weights.
        device, dtype: of the weights.
    """
    if name == "demo":
        folders = sorted(path for path in EMBEDDED.iterdir() if path.is_dir())
    else:
        folders = [Path(part) for part in name.split(",")]
        if not any(folder.is_dir() for folder in folders):
            return [_of_timm(name, device, dtype)]
    return [_of_folder(folder, name, device, dtype) for folder in folders]


def _of_folder(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> Classifier:
    about = read_json(folder / ABOUT)
    if not isinstance(about, dict) or "architecture" not in about:
        raise EvalError(f"the folder {folder.name!r} holds no classifier: {ABOUT} is missing or damaged")
    check_shape(about, formats.CLASSIFIER, f"{folder.name}/{ABOUT}", "research.classifiers.train")
    try:
        architecture = Architecture(**about["architecture"])
        model = architecture.build()
    except (TypeError, ZeroDivisionError, AttributeError, RuntimeError) as error:  # of sizes that are no integers >= 1
        raise EvalError(f"{folder.name}/{ABOUT} has an architecture that cannot be built: {error}") from error
    try:
        weights = {key: value.float() for key, value in load_file(folder / WEIGHTS).items()}
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise EvalError(f"cannot read the weights of {folder.name!r}: {without_paths(str(error))[:300]}") from error
    shown = name if name == "demo" else folder.name
    return Classifier(shown, model.to(device, dtype).eval().requires_grad_(False), architecture.side, about["seed"])


def _of_timm(name: str, device: torch.device, dtype: torch.dtype) -> Classifier:
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # an unknown name, a hub that cannot be reached: timm raises many kinds
        reason = " ".join(without_paths(str(error)).split())[:200]
        raise EvalError(f"no folder and no available model of timm's is called {name!r}: {reason}") from error
    side = timm.data.resolve_model_data_config(model)["input_size"][-1]
    return Classifier(name, model.to(device, dtype).eval().requires_grad_(False), side, own=False)


def described(
    architecture: Architecture, seed: int, classes: tuple[str, ...], figures: dict[str, Any]
) -> dict[str, Any]:
    """Returns the content of model.json, beside the weights."""
    return {"architecture": asdict(architecture), "seed": seed, "classes": list(classes), "figures": figures}
