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
from torch import Tensor, nn
from tqdm import tqdm

from tofu_sd.demo.classifier import DemoClassifier, perceptual_distance
from tofu_sd.demo.tokenizer import build_tokenizer

from .networks import build_scheduler, build_text_encoder, build_unet, build_vae

# isort: split
# after .model, which says in words what is wrong with an installation that cannot import these
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.training_utils import compute_snr

from .fit import _autocast, _whole, fit
from .recipe import CONTENTS, CROP, TEST_SEED, Content, Recipe


def _pictures(rows: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] -> float in 0..1."""
    return torch.from_numpy(np.array(rows)).to(device).float() / 255  # a copy: the file's map may not be written to


def _render_rows(recipe: Recipe, kinds: list[int], size: int, device: torch.device, rows: range) -> np.ndarray:
    """Renders of some rows of the file, uint8 [len(rows), 3, size, size]."""
    shown = recipe.shown
    pictures = shown.render([shown.classes[kinds[r]] for r in rows], [recipe.seed + r for r in rows], size, device)
    return np.asarray((pictures * 255).round().byte().cpu().numpy())


def make_renders(
    recipe: Recipe, work: Path, device: torch.device, images: int | None = None, scale: int = 1, workers: int = 1
) -> np.ndarray:
    """The training pictures, uint8 [classes × images, 3, size, size], memory-mapped. Rendered once.

    scale: 2 renders at twice the recipe's size, into a file of its own. workers: processes that render (on the CPU).
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
            for rows, pictures in zip(chunks, bar, strict=True):
                out[rows.start : rows.stop] = pictures
        out.flush()
        os.replace(part, path)
    return np.load(path, mmap_mode="r")


def judge_accuracy(
    judge: DemoClassifier, device: torch.device, images: int = 960, size: int = 256, content: str = "scenes"
) -> float:
    """Share of fresh renders (ten a class of scenes) of which all labels are recognised."""
    right, shown = 0, CONTENTS[content]
    for i in range(0, images, 32):
        rows = range(i, min(i + 32, images))
        kinds = [shown.classes[r % len(shown.classes)] for r in rows]
        found = judge.classify(shown.render(kinds, [TEST_SEED + r for r in rows], size, device))
        right += int((found.cpu() == torch.tensor([k.labels for k in kinds])).all(-1).sum())
    return right / images


def train_judge(
    recipe: Recipe, work: Path, device: torch.device, renders: np.ndarray
) -> tuple[DemoClassifier, dict[str, Any]]:
    torch.manual_seed(recipe.seed)
    judge = DemoClassifier(recipe.shown.answers).to(device)
    labels = torch.tensor([recipe.shown.classes[c].labels for c in recipe.kinds()], device=device)
    batch = 48

    def loss(g: torch.Generator) -> Tensor:
        rows = torch.randint(len(renders), (batch,), generator=g)
        pictures = F.interpolate(_pictures(renders[rows.numpy()], device), (128, 128), mode="area")
        if torch.rand((), generator=g) < 0.5:
            pictures = pictures.flip(-1)
        # blur, contrast and noise, so that it judges what is shown and not how crisply
        gain, shift, grain = torch.rand(3, generator=g).tolist()
        pictures = (pictures - 0.5) * (0.8 + 0.4 * gain) + 0.5 + 0.1 * (shift - 0.5)
        if torch.rand((), generator=g) < 0.5:
            pictures = F.interpolate(F.avg_pool2d(pictures, 2), (128, 128), mode="bilinear")
        pictures = pictures + 0.06 * grain * torch.randn(pictures.shape, generator=g).to(device)
        with _autocast(device):
            logits = judge(pictures)
        wanted = labels[rows.to(device)]
        return sum(F.cross_entropy(lg.float(), wanted[:, i], label_smoothing=0.05) for i, lg in enumerate(logits))  # type: ignore[return-value]

    figures = fit("judge", judge, loss, samples=recipe.judge, batch=batch, rate=2e-3, work=work, seed=recipe.seed + 1)
    judge.eval().requires_grad_(False)
    figures["accuracy"] = judge_accuracy(judge, device, 960, recipe.size, recipe.content)
    return judge, figures


def train_vae(
    recipe: Recipe, work: Path, device: torch.device, renders: np.ndarray, judge: DemoClassifier
) -> tuple[AutoencoderKL, dict[str, Any]]:
    torch.manual_seed(recipe.seed)
    vae, batch, crop = build_vae().to(device), 8, CROP

    def loss(g: torch.Generator) -> Tensor:
        rows = torch.randint(len(renders), (batch,), generator=g)
        y, x = torch.randint(recipe.size - crop + 1, (2,), generator=g).tolist()
        if torch.rand((), generator=g) < 0.2:  # at half size, which the low stage sees
            y, x = (at * (recipe.size // 2 - crop) // (recipe.size - crop) for at in (y, x))
            pictures = F.avg_pool2d(_pictures(renders[rows.numpy()], device), 2)[..., y : y + crop, x : x + crop]
        else:
            pictures = _pictures(renders[rows.numpy(), :, y : y + crop, x : x + crop], device)
        if torch.rand((), generator=g) < 0.5:
            pictures = pictures.flip(-1)
        with _autocast(device):
            latents = vae.encode(pictures * 2 - 1).latent_dist
            mean, spread = latents.mean.float(), latents.std.float()
            drawn = mean + spread * torch.randn(mean.shape, generator=g).to(device)
            seen = vae.decode(drawn).sample.float() / 2 + 0.5
            look = perceptual_distance(judge, seen, pictures, stages=4).mean()
        wrong = seen - pictures
        colour = F.avg_pool2d(wrong, 8).abs().mean()  # a wrong tint over a latent's cell costs twice
        edges = sum(wrong.diff(dim=d).abs().mean() for d in (2, 3))
        divergence = 0.5 * (mean.square() + spread.square() - 1 - 2 * spread.log()).mean()
        return wrong.abs().mean() + colour + edges + 0.04 * look + 1e-4 * divergence

    figures = fit("vae", vae, loss, samples=recipe.vae, batch=batch, rate=8e-4, work=work, seed=recipe.seed + 2)
    vae.eval().requires_grad_(False)
    classes = recipe.shown.classes
    fresh = [recipe.shown.render(list(classes[i : i + 8]), list(range(TEST_SEED + i, TEST_SEED + i + 8)), recipe.size,
                                 device) for i in range(0, len(classes), 8)]  # fmt: skip
    standardise(vae, torch.cat([vae.encode(pictures * 2 - 1).latent_dist.mode() for pictures in fresh]))
    error = []
    for pictures in fresh:
        seen = vae.decode(vae.encode(pictures * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        error.append((seen.clamp(0, 1) - pictures).square().mean(dim=(1, 2, 3)))
    figures["psnr"] = round(float((-10 * torch.cat(error).log10()).mean()), 2)
    return vae, figures


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Gives each latent channel mean 0 and standard deviation 1 over `latents` [B, 4, h, w].

    The change is folded into the 1 × 1 convolutions on either side of the latents, so that decode(encode(x)) stays as
    it is and the scaling factor is 1.
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
    """Scaled latents of all renders, then of their mirror images, float16 [2 × n, 4, s, s].

    Made at full size for scale 1 and at half size for scale 2.
    """
    for scale in scales:
        size, chunk = renders.shape[-1] // 8 // scale, 32 if renders.shape[-1] < 512 else 8
        path = work / f"latents-{size}.npy"
        if path.exists():
            continue
        out = np.empty((2 * len(renders), 4, size, size), np.float16)
        for i in tqdm(range(0, len(renders), chunk), desc=path.stem, unit_scale=chunk, unit="image", mininterval=5):
            pictures = F.interpolate(_pictures(renders[i : i + chunk], device), (8 * size,) * 2, mode="area")
            for half, view in enumerate((pictures, pictures.flip(-1))):
                with _autocast(device):
                    latents = vae.encode(view * 2 - 1).latent_dist.mode().float() * vae.config.scaling_factor
                out[half * len(renders) + i :][: len(view)] = latents.cpu().numpy()
        _whole(path, partial(_save, out))


def _save(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # np.save would add .npy to a name
        np.save(file, array)


class Denoiser(nn.Module):
    """UNet and text encoder, trained together on velocity (v-prediction)."""

    def __init__(self, shown: Content) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer(c.prompt for c in shown.classes)
        self.text_encoder = build_text_encoder(self.tokenizer)
        self.unet = build_unet(shown.widths)

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        prompts, which = ids.unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
        states = self.text_encoder(prompts).last_hidden_state[which]
        return self.unet(noisy, t, encoder_hidden_states=states).sample


def velocity_loss(model: Denoiser, clean: Tensor, ids: Tensor, noising: DDIMScheduler, g: torch.Generator) -> Tensor:
    """v-prediction under min-SNR weights with γ = 5 (Hang et al. 2023), timesteps stratified over the batch."""
    B, T = len(clean), noising.config.num_train_timesteps
    t = ((torch.arange(B) + torch.rand(B, generator=g)) / B * T).long().clamp_max(T - 1).to(clean.device)
    noise = torch.randn(clean.shape, generator=g).to(clean.device)
    with _autocast(clean.device):
        guess = model(noising.add_noise(clean, noise, t), t, ids)
    snr = compute_snr(noising, t)
    weight = snr.clamp_max(5) / (snr + 1)
    error = (guess.float() - noising.get_velocity(clean, noise, t)).square().mean(dim=(1, 2, 3))
    return (weight * error).mean()


def train_denoiser(
    name: str,
    model: Denoiser,
    recipe: Recipe,
    work: Path,
    device: torch.device,
    *,
    size: int,
    samples: int,
    rate: float,
) -> dict[str, Any]:
    torch.manual_seed(recipe.seed)
    latents = torch.from_numpy(np.load(work / f"latents-{size}.npy"))
    classes = recipe.shown.classes
    images = len(latents) // 2 // len(classes)  # a class
    kinds = torch.tensor(recipe.kinds(images) * 2)
    texts = [c.prompt for c in classes] + [c.name for c in classes] + [""]
    ids = model.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    noising, batch = build_scheduler(), 24 if size < 32 else 16 if size < 64 else 4

    def loss(g: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=g)
        text, u = kinds[rows], torch.rand(batch, generator=g)
        text = torch.where(u < 0.2, text + len(classes), text)  # the bare name
        text = torch.where(u > 0.9, len(texts) - 1, text)  # no prompt, for guidance
        return velocity_loss(model, latents[rows].to(device).float(), ids[text].to(device), noising, g)

    return fit(name, model, loss, samples=samples, batch=batch, rate=rate, work=work, seed=recipe.seed + 3, horizon=400)
