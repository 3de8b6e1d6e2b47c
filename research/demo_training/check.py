"""Measures an embedded model: `python -m research.demo_training.check [--model textures]`.

It generates images of all classes in order with fixed seeds and classifies them with the demo classifier. It prints the
share whose labels are all those of the prompt, with its 95 % Wilson interval; and the slope of the amplitude spectrum
of renders, of renders through the autoencoder, and of the images, which shows how much detail each stage loses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.metrics.statistics import wilson
from eval.validity.image_statistics import spectral_slope
from tofu_sd.demo import GUIDANCE, NATIVE_SIZE, call_options, load, load_classifier
from tofu_sd.demo.models import MODELS, DemoModel

from .recipe import CONTENTS, TEST_SEED
from .stages import classifier_accuracy


def digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file of weights, which identifies the training of figures."""
    files = sorted(folder.rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def generate(
    pipe: Any, classes: Sequence[Any], images: int, *, steps: int, guidance: float, size: int, batch: int
) -> Tensor:
    """Generates images of all classes in order, repeatedly, with seeds from 0: uint8 [images, 3, size, size]."""
    rows = []
    for start in tqdm(range(0, images, batch), desc="generate", unit_scale=batch, unit="image"):
        numbers = range(start, min(start + batch, images))
        generated = pipe(
            [classes[i % len(classes)].prompt for i in numbers],
            num_inference_steps=steps,
            height=size,
            width=size,
            generator=[torch.Generator().manual_seed(i) for i in numbers],
            output_type="pt",
            **call_options(pipe, len(numbers), guidance),
        ).images
        rows.append((generated * 255).round().byte().cpu())
    return torch.cat(rows)


def contact_sheet(images: Tensor, columns: int, side: int) -> Image.Image:
    """Arranges images uint8 [n, 3, H, W] in rows of `columns`, each resized to `side` pixels."""
    tiles = [Image.fromarray(p.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.LANCZOS) for p in images]
    sheet = Image.new("RGB", (columns * side, -(-len(tiles) // columns) * side))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * side, i // columns * side))
    return sheet


@torch.no_grad()
def spectral_slopes(model: DemoModel, pipe: Any, images: Tensor, device: str) -> dict[str, float]:
    """Returns the mean exponent a of amplitude ~ 1/f^a at three stages, over at most an image of each class.

    Args:
        model: the embedded model.
        pipe: its pipeline.
        images: generated, uint8 [n, 3, size, size].
        device: of the pipeline.
    """
    generated = images[: len(model.classes)].float() / 255
    kinds, size = list(model.classes[: len(generated)]), images.shape[-1]
    slopes: dict[str, list[Tensor]] = {"renders": [], "renders_through_autoencoder": []}
    for start in tqdm(range(0, len(kinds), 8), desc="render", unit_scale=8, unit="image"):
        part = kinds[start : start + 8]
        seeds = [TEST_SEED + start + i for i in range(len(part))]
        renders = CONTENTS[model.content].render(part, seeds, size, torch.device(device))
        latents = pipe.vae.encode(renders * 2 - 1).latent_dist.mode()
        decoded = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        slopes["renders"].append(spectral_slope(renders.cpu()))
        slopes["renders_through_autoencoder"].append(spectral_slope(decoded.cpu()))
    return {**{name: float(torch.cat(parts).mean()) for name, parts in slopes.items()},
            "generated": float(spectral_slope(generated).mean())}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m research.demo_training.check",
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--model", default="scenes", choices=list(MODELS))
    p.add_argument("--images", type=int, default=240)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--guidance", type=float, default=GUIDANCE)
    p.add_argument("--size", type=int, default=NATIVE_SIZE)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--renders", type=int, default=960, help="fresh renders that measure the classifier itself")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    p.add_argument("--sheet", type=Path, help="write an image of each class there, as one PNG")
    return p


def measure(model: DemoModel, args: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Returns (the figures, the images)."""
    pipe, net = load(model.name, args.device), load_classifier(model.name, args.device)
    pipe.set_progress_bar_config(disable=True)
    classes, settings = model.classes, {name: getattr(args, name) for name in ("steps", "guidance", "size", "batch")}
    images = generate(pipe, classes, args.images, **settings)
    predicted = torch.cat([net.classify(part.to(args.device).float() / 255).cpu() for part in torch.split(images, 32)])
    prompted = torch.tensor([classes[i % len(classes)].labels for i in range(args.images)])
    right = predicted == prompted
    whole = int(right.all(1).sum())
    figures = {
        "class_accuracy": whole / args.images,
        "interval_95": wilson(whole, args.images),
        **dict(zip(model.labels, right.float().mean(0).tolist(), strict=True)),
        "worst": sorted({classes[i % len(classes)].name for i in range(args.images) if not right[i].all()}),
        "classifier_on_fresh_renders": classifier_accuracy(
            net, torch.device(args.device), args.renders, content=model.content
        ),
        "spectral_slope": spectral_slopes(model, pipe, images, args.device),
        "chance": 1 / math.prod(model.label_counts),
        "n": args.images,
        "seeds": f"0..{args.images - 1}",
        **settings,
        "device": args.device,
        "weights": digests(model.weights),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }
    return figures, images


def main(argv: list[str] | None = None) -> None:
    """Measures the model, and prints and writes the figures."""
    options = parser()
    args = options.parse_args(argv)
    for name in ("images", "steps", "batch", "renders"):
        if getattr(args, name) < 1:
            options.error(f"--{name} is {getattr(args, name)}; it must be an integer >= 1")
    if args.sheet and (args.sheet.suffix != ".png" or not args.sheet.parent.is_dir()):
        options.error(f"--sheet is {str(args.sheet)!r}; it must be a .png in a folder that exists")
    if args.out and not args.out.parent.is_dir():
        options.error(f"--out is {str(args.out)!r}; its folder does not exist")

    model = MODELS[args.model]
    figures, images = measure(model, args)
    print(json.dumps(figures, indent=1))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    if args.sheet:
        contact_sheet(images[: len(model.classes)], columns=12, side=128).save(args.sheet)


if __name__ == "__main__":
    main()
