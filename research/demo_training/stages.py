"""The stages of a training, each with its loss."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from tofu_sd.demo.classifier import DemoClassifier, perceptual_distance

from .denoisers.base import Denoiser
from .fit import Schedule, _autocast, _whole, fit
from .networks import build_vae
from .recipe import CONTENTS, CROP, PART, TEST_SEED, Content, Recipe


def _images(rows: np.ndarray, device: torch.device) -> Tensor:
    """Converts uint8 [B, 3, H, W] to float in 0..1."""
    return torch.from_numpy(np.array(rows)).to(device).float() / 255  # a copy: the memory map is read-only


def _render_rows(recipe: Recipe, kinds: list[int], size: int, device: torch.device, rows: range) -> np.ndarray:
    """Renders some rows of the file: uint8 [len(rows), 3, size, size]."""
    shown = recipe.shown
    images = shown.render([shown.classes[kinds[r]] for r in rows], [recipe.seed + r for r in rows], size, device)
    return np.asarray((images * 255).round().byte().cpu().numpy())


def make_renders(
    recipe: Recipe, work: Path, device: torch.device, images: int | None = None, scale: int = 1, workers: int = 1
) -> np.ndarray:
    """Returns the training images, rendered once: uint8 [classes × images, 3, size, size], memory-mapped.

    Args:
        recipe: sizes and seeds.
        work: folder of the file.
        device: on which to render, with one worker.
        images: of each class; by default the recipe's.
        scale: 2 renders at twice the recipe's size, into another file.
        workers: processes that render, on the CPU.
    """
    size = scale * recipe.size
    path, kinds, chunk = work / f"renders{'' if scale == 1 else -size}.npy", recipe.kinds(images), 16
    shape = (len(kinds), 3, size, size)
    if not path.exists():
        part = path.with_suffix(".tmp")
        out = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        chunks = [range(i, min(i + chunk, len(kinds))) for i in range(0, len(kinds), chunk)]
        one = partial(_render_rows, recipe, kinds, size, torch.device("cpu") if workers > 1 else device)
        with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
            parts = map(one, chunks) if pool is None else pool.map(one, chunks)
            bar = tqdm(parts, desc=path.stem, total=len(chunks), unit_scale=chunk, unit="image", mininterval=5)
            for rows, images in zip(chunks, bar, strict=True):
                out[rows.start : rows.stop] = images
        out.flush()
        os.replace(part, path)
    return np.load(path, mmap_mode="r")


def classifier_accuracy(
    classifier: DemoClassifier, device: torch.device, images: int = 960, size: int = 256, content: str = "scenes"
) -> float:
    """Returns the share of fresh renders of which all labels are predicted correctly."""
    right, shown = 0, CONTENTS[content]
    for i in range(0, images, 32):
        rows = range(i, min(i + 32, images))
        kinds = [shown.classes[r % len(shown.classes)] for r in rows]
        predicted = classifier.classify(shown.render(kinds, [TEST_SEED + r for r in rows], size, device))
        right += int((predicted.cpu() == torch.tensor([k.labels for k in kinds])).all(-1).sum())
    return right / images


def _view(images: Tensor, content: Content, g: torch.Generator) -> Tensor:
    """Returns a part of the images or, where parts do not show their class, all of them, mirrored half the time."""
    size = content.model.classifier_size
    if content.has_parts:
        y, x = torch.randint(images.shape[-1] - PART + 1, (2,), generator=g).tolist()
        images = images[..., y : y + PART, x : x + PART]
    else:
        images = F.interpolate(images, (size, size), mode="area")
    return images.flip(-1) if torch.rand((), generator=g) < 0.5 else images


def train_classifier(
    name: str, recipe: Recipe, work: Path, device: torch.device, renders: np.ndarray
) -> tuple[DemoClassifier, dict[str, Any]]:
    """Trains a classifier of renders. Returns (the classifier, the figures). name: of the stage, as in the recipe."""
    torch.manual_seed(recipe.seed)
    classifier = DemoClassifier(recipe.shown.model).to(device)
    labels = torch.tensor([recipe.shown.classes[c].labels for c in recipe.kinds()], device=device)
    batch = 48

    def loss(g: torch.Generator) -> Tensor:
        rows = torch.randint(len(renders), (batch,), generator=g)
        images = _view(_images(renders[rows.numpy()], device), recipe.shown, g)
        # blur, contrast and noise, so that it recognizes content and not sharpness
        gain, shift, grain = torch.rand(3, generator=g).tolist()
        images = (images - 0.5) * (0.8 + 0.4 * gain) + 0.5 + 0.1 * (shift - 0.5)
        if torch.rand((), generator=g) < 0.5:
            images = F.interpolate(F.avg_pool2d(images, 2), images.shape[-2:], mode="bilinear")
        images = images + 0.06 * grain * torch.randn(images.shape, generator=g).to(device)
        with _autocast(device):
            logits = classifier.logits(classifier.pooled(images))
        wanted = labels[rows.to(device)]
        return sum(F.cross_entropy(lg.float(), wanted[:, i], label_smoothing=0.05) for i, lg in enumerate(logits))  # type: ignore[return-value]

    figures = fit(name, classifier, loss, Schedule(getattr(recipe, name), batch, 2e-3, recipe.seed + 1), work)
    classifier.eval().requires_grad_(False)
    figures["accuracy"] = classifier_accuracy(classifier, device, 960, recipe.size, recipe.content)
    return classifier, figures


def train_vae(
    recipe: Recipe, work: Path, device: torch.device, renders: np.ndarray, classifier: DemoClassifier
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Trains the autoencoder on crops of renders. Returns (the autoencoder, the figures)."""
    torch.manual_seed(recipe.seed)
    vae, batch, crop = build_vae().to(device), 8, CROP

    def loss(g: torch.Generator) -> Tensor:
        rows = torch.randint(len(renders), (batch,), generator=g)
        y, x = torch.randint(recipe.size - crop + 1, (2,), generator=g).tolist()
        if torch.rand((), generator=g) < 0.2:  # at half size, as in the low stage
            y, x = (at * (recipe.size // 2 - crop) // (recipe.size - crop) for at in (y, x))
            images = F.avg_pool2d(_images(renders[rows.numpy()], device), 2)[..., y : y + crop, x : x + crop]
        else:
            images = _images(renders[rows.numpy(), :, y : y + crop, x : x + crop], device)
        if torch.rand((), generator=g) < 0.5:
            images = images.flip(-1)
        with _autocast(device):
            latents = vae.encode(images * 2 - 1).latent_dist
            mean, spread = latents.mean.float(), latents.std.float()
            sampled = mean + spread * torch.randn(mean.shape, generator=g).to(device)
            decoded = vae.decode(sampled).sample.float() / 2 + 0.5
            look = perceptual_distance(classifier, decoded, images, stages=4).mean()
        wrong = decoded - images
        colour = F.avg_pool2d(wrong, 8).abs().mean()  # a wrong mean colour of a latent's cell counts twice
        edges = sum(wrong.diff(dim=d).abs().mean() for d in (2, 3))
        divergence = 0.5 * (mean.square() + spread.square() - 1 - 2 * spread.log()).mean()
        return wrong.abs().mean() + colour + edges + 0.04 * look + 1e-4 * divergence

    figures = fit("vae", vae, loss, Schedule(recipe.vae, batch, 8e-4, recipe.seed + 2), work)
    vae.eval().requires_grad_(False)
    classes = recipe.shown.classes
    fresh = [recipe.shown.render(list(classes[i : i + 8]), list(range(TEST_SEED + i, TEST_SEED + i + 8)), recipe.size,
                                 device) for i in range(0, len(classes), 8)]  # fmt: skip
    standardize(vae, torch.cat([vae.encode(images * 2 - 1).latent_dist.mode() for images in fresh]))
    figures["psnr"] = round(_psnr(vae, fresh), 2)
    return vae, figures


def _psnr(vae: AutoencoderKL, batches: list[Tensor]) -> float:
    """Returns the mean PSNR, in dB, of images in 0..1 after encoding and decoding."""
    errors = []
    for images in batches:
        decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        errors.append((decoded.clamp(0, 1) - images).square().mean(dim=(1, 2, 3)))
    return float((-10 * torch.cat(errors).log10()).mean())


@torch.no_grad()
def standardize(vae: AutoencoderKL, latents: Tensor) -> None:
    """Gives each latent channel mean 0 and standard deviation 1 over `latents` [B, 4, h, w].

    The change is folded into the 1 × 1 convolutions before and after the latents, so that decode(encode(x)) stays
    unchanged and the scaling factor is 1.
    """
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    C, into, out = len(mean), vae.quant_conv, vae.post_quant_conv
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std.view(1, C, 1, 1)
    into.weight[:C] /= std.view(C, 1, 1, 1)
    into.bias[:C] = (into.bias[:C] - mean) / std
    into.bias[C:] -= 2 * std.log()  # the second half is the logarithm of the variance
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def make_latents(
    work: Path, device: torch.device, renders: np.ndarray, vae: AutoencoderKL, scales: Sequence[int]
) -> None:
    """Writes the scaled latents of all renders, then of their mirror images: float16 [2 × n, 4, s, s].

    Scale 1 is the full size and scale 2 half of it.
    """
    for scale in scales:
        size, chunk = renders.shape[-1] // 8 // scale, 32 if renders.shape[-1] < 512 else 8
        path = work / f"latents-{size}.npy"
        if path.exists():
            continue
        out = np.empty((2 * len(renders), 4, size, size), np.float16)
        for i in tqdm(range(0, len(renders), chunk), desc=path.stem, unit_scale=chunk, unit="image", mininterval=5):
            images = F.interpolate(_images(renders[i : i + chunk], device), (8 * size,) * 2, mode="area")
            for half, view in enumerate((images, images.flip(-1))):
                with _autocast(device):
                    latents = vae.encode(view * 2 - 1).latent_dist.mode().float() * vae.config.scaling_factor
                out[half * len(renders) + i :][: len(view)] = latents.cpu().numpy()
        _whole(path, partial(_save, out))


def _save(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # np.save would add .npy to a path
        np.save(file, array)


def train_denoiser(
    name: str,
    model: Denoiser,
    recipe: Recipe,
    work: Path,
    device: torch.device,
    *,
    sizes: Sequence[int],
    samples: int,
    rate: float,
) -> dict[str, Any]:
    """Trains a denoiser and its text encoders on latents. Returns the figures.

    Args:
        name: of the stage's checkpoint.
        model: is trained in place.
        recipe: classes and seed.
        work: folder of the latents and the checkpoint.
        device: on which to train.
        sizes: of the latents. Each step takes a batch of each size.
        samples: of the first size.
        rate: largest learning rate.
    """
    torch.manual_seed(recipe.seed)
    latents = [torch.from_numpy(np.load(work / f"latents-{size}.npy")) for size in sizes]
    batches = [24 if size < 32 else 16 if size < 64 else 4 for size in sizes]
    classes, no_prompt = len(recipe.shown.classes), len(model.texts) - 1

    def loss_of_batch(pool: Tensor, batch: int, g: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool), (batch,), generator=g)
        images = len(pool) // 2 // classes  # of each class; the second half are their mirror images
        text, u = rows % (len(pool) // 2) // images, torch.rand(batch, generator=g)
        text = torch.where(u < 0.2, text + classes, text)  # the bare name
        text = torch.where(u > 0.9, no_prompt, text)  # for guidance
        return model.loss(pool[rows].to(device).float(), text.to(device), g)

    def loss(g: torch.Generator) -> Tensor:
        losses = [loss_of_batch(pool, batch, g) for pool, batch in zip(latents, batches, strict=True)]
        return torch.stack(losses).mean()

    return fit(name, model, loss, Schedule(samples, batches[0], rate, recipe.seed + 3, horizon=400), work)
