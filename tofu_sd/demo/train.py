"""Trains every part of an embedded model from scratch: `python -m tofu_sd.demo.train [--content textures]`.

    render   classes × images each -> renders.npy                  the training pictures, 256 × 256
    judge    classifier on renders; accuracy on fresh ones           judge.safetensors
    vae      autoencoder on 96-pixel crops                           vae/
    encode   latents of the renders and their mirror images          latents-32.npy, latents-16.npy
    low      UNet and text encoder on 16 × 16 latents                unet/, text_encoder/
    high     the same weights on 32 × 32 latents
    large    the same weights on 64 × 64 latents of 512 × 512 renders, for textures alone
    export   averaged weights in half precision -> tofu_sd/demo/weights

Each stage leaves its result in --work and is skipped when that exists. Cut off, a training goes on from its last
checkpoint, and renders and latents, which take minutes, begin anew. Batches are drawn from (seed, step), so an
interrupted run sees the samples an uninterrupted one would.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from . import WEIGHTS, textures
from .model import (
    Judge,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    perceptual_distance,
)
from .scenes import CLASSES, MATERIALS, SETTINGS, SHAPES, render

# isort: split
# after .model, which says in words what is wrong with an installation that cannot import these
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr

CHECKPOINT_SECONDS = 120
CROP = 96  # pixels a side of what the autoencoder is trained on, at full and at half size
TEST_SEED = 10_000_000  # renders from here on are never trained on


@dataclass(frozen=True)
class Content:
    """What a model is trained to show.

    classes: with a `prompt`, a `name` and `labels` each. render(classes, seeds, size, device): images
    [B, 3, size, size] in 0..1. answers: how many values each label has. widths: of the UNet's levels.
    """

    classes: Sequence[Any]
    render: Callable[[list[Any], list[int], int, torch.device], Tensor]
    answers: tuple[int, ...]
    widths: tuple[int, int, int]


def _textures(kinds: list[Any], seeds: list[int], size: int, device: torch.device) -> Tensor:
    return torch.from_numpy(textures.render(kinds, seeds, size)).to(device)


CONTENTS = {
    "scenes": Content(CLASSES, render, (len(SHAPES), len(MATERIALS), len(SETTINGS)), (64, 112, 160)),
    "textures": Content(textures.CLASSES, _textures, (len(textures.THINGS), len(textures.LOOKS)), (64, 112, 144)),
}


@dataclass(frozen=True)
class Recipe:
    """Sizes of the run in samples; the default is what two CPU cores do in about two and a half hours."""

    content: str = "scenes"
    images: int = 80  # renders a class
    size: int = 256  # pixels; latents are size / 8
    judge: int = 60_000
    vae: int = 48_000
    low: int = 60_000
    high: int = 60_000
    large: int = 0  # on 64 × 64 latents; 0 leaves this stage out
    large_images: int = 12  # renders a class of twice the size
    seed: int = 0

    def __post_init__(self) -> None:
        if self.content not in CONTENTS:
            raise ValueError(f"content is {self.content!r}; it must be one of {', '.join(CONTENTS)}")
        if self.large < 0:
            raise ValueError(f"large is {self.large}; it must be at least 0")
        if self.size < 2 * CROP or self.size % 16:
            raise ValueError(f"size is {self.size}; it must be a multiple of 16 of at least {2 * CROP} pixels")
        for name in ("images", "judge", "vae", "low", "high", "large_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def shown(self) -> Content:
        return CONTENTS[self.content]

    def kinds(self, images: int | None = None) -> list[int]:
        """Class index of every render, in file order."""
        return [c for c in range(len(self.shown.classes)) for _ in range(images or self.images)]


# --- one training loop for every part ---------------------------------------------------------------------------------


def _average(into: dict[str, Tensor], model: nn.Module, step: int, horizon: float) -> None:
    """Exponential moving average of the weights over the last `horizon` steps, warmed up from the first."""
    keep = min(1 - 1 / horizon, (1 + step) / (10 + step))
    for name, value in model.state_dict().items():
        into[name].lerp_(value.float(), 1 - keep)


def fit(
    name: str,
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    *,
    samples: int,
    batch: int,
    rate: float,
    work: Path,
    seed: int,
    horizon: float = 500,
) -> dict[str, Any]:
    """Minimises `loss(generator)` over `samples` samples with AdamW and leaves the averaged weights in `model`.

    The learning rate rises over the first hundredth and falls along a cosine to a twentieth. A checkpoint
    (`name.ckpt` under `work`) is written every two minutes and read on the next start. Returns the figures of the run.
    """
    steps, path = max(1, samples // batch), work / f"{name}.ckpt"
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    averaged = {k: v.detach().clone().float() for k, v in model.state_dict().items()}
    step, spent, curve = 0, 0.0, []
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        averaged, step, spent, curve = state["averaged"], state["step"], state["spent"], state["curve"]
    warm = max(1, steps // 100)
    running = curve[-1][1] if curve else 0.0
    began, saved = time.monotonic(), time.monotonic()
    device = next(model.parameters()).device
    with tqdm(total=steps, initial=step, desc=name, unit_scale=batch, unit="sample", mininterval=5) as bar:
        while step < steps:
            progress = max(0.0, (step - warm) / max(1, steps - warm))
            scale = min(1.0, (step + 1) / warm) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
            value = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            _average(averaged, model, step, horizon)
            running += (value.item() - running) / min(step + 1, 50)
            step += 1
            bar.update()
            if step % 50 == 0 or step == steps:
                bar.set_postfix(loss=f"{running:.4f}")
                curve.append([step * batch, round(running, 5)])
            now = time.monotonic()
            if now - saved > CHECKPOINT_SECONDS or step == steps:
                spent, began, saved = spent + now - began, now, now
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "averaged": averaged}
                state |= {"step": step, "spent": spent, "curve": curve}
                torch.save(state, path.with_suffix(".tmp"))
                os.replace(path.with_suffix(".tmp"), path)
    model.load_state_dict({k: v.to(device) for k, v in averaged.items()})
    return {"samples": steps * batch, "batch": batch, "seconds": round(spent), "loss": round(running, 5)}


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic, which trains these parts 1.5 to 2 times faster on CPU and GPU alike."""
    return torch.autocast(device.type, torch.bfloat16)


# --- stages -----------------------------------------------------------------------------------------------------------


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
    judge: Judge, device: torch.device, images: int = 960, size: int = 256, content: str = "scenes"
) -> float:
    """Share of fresh renders (ten a class of scenes) of which all labels are recognised."""
    right, shown = 0, CONTENTS[content]
    for i in range(0, images, 32):
        rows = range(i, min(i + 32, images))
        kinds = [shown.classes[r % len(shown.classes)] for r in rows]
        found = judge.classify(shown.render(kinds, [TEST_SEED + r for r in rows], size, device))
        right += int((found.cpu() == torch.tensor([k.labels for k in kinds])).all(-1).sum())
    return right / images


def train_judge(recipe: Recipe, work: Path, device: torch.device, renders: np.ndarray) -> tuple[Judge, dict[str, Any]]:
    torch.manual_seed(recipe.seed)
    judge = Judge(recipe.shown.answers).to(device)
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
    recipe: Recipe, work: Path, device: torch.device, renders: np.ndarray, judge: Judge
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


# --- the whole run ----------------------------------------------------------------------------------------------------


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file or folder under another name that then becomes `path`: it is whole or as it was."""
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    shutil.rmtree(path, ignore_errors=True)  # a folder cannot be replaced by one that holds something
    os.replace(part, path)


def export(work: Path, target: Path, figures: dict[str, Any], recipe: Recipe) -> None:
    """Writes pipeline and judge as float16 safetensors to `target`, in the layout of any diffusers model folder."""
    model = Denoiser(recipe.shown)
    model.load_state_dict(load_file(work / f"{'large' if recipe.large else 'high'}.safetensors"))
    trained = AutoencoderKL.from_pretrained(work / "vae")
    vae = AutoencoderKL.from_config({k: v for k, v in trained.config.items() if k != "_name_or_path"})
    vae.load_state_dict(trained.state_dict())  # a model that does not remember the folder it was loaded from
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(target, safe_serialization=True)
    export_for_transformers_4(target)
    judge = load_file(work / "judge.safetensors")
    save_file({k: v.half() for k, v in judge.items()}, target / "judge.safetensors")
    (target / "figures.json").write_text(json.dumps(figures, indent=1))


def export_for_transformers_4(target: Path) -> None:
    """Adds what transformers 4 reads and 5 no longer writes; 5 reads both.

    The vocabulary as files of its own, without which no CLIPTokenizer is made, and Stable Diffusion's names of the text
    encoder's weights, without which it would start from random ones.
    """
    folder = target / "tokenizer"
    bpe = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False, indent=0), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    file, prefix = target / "text_encoder" / "model.safetensors", "text_model."
    weights = {prefix + name.removeprefix(prefix): value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def train(recipe: Recipe, work: Path, out: Path, device: torch.device, workers: int = 1) -> None:
    """Runs every stage whose result `work` does not hold yet, then writes the weights to `out`.

    ValueError for a folder that holds another recipe's results.
    """
    work.mkdir(parents=True, exist_ok=True)
    note = work / "figures.json"
    figures: dict[str, Any] = {"recipe": asdict(recipe), "device": str(device), "torch": torch.__version__}
    if note.exists():
        before = json.loads(note.read_text())
        for name, value in figures["recipe"].items():
            if (held := before["recipe"].get(name, getattr(Recipe(), name))) != value:
                raise ValueError(f"{work.name} holds results for {name} {held}, not {value}")
        figures = before | figures

    def record(stage: str, values: dict[str, Any]) -> None:
        figures[stage] = values
        _note()
        print(stage, json.dumps(values), flush=True)

    def _note() -> None:
        _whole(note, lambda part: part.write_text(json.dumps(figures, indent=1)))

    _note()
    renders = make_renders(recipe, work, device, workers=workers)
    judge = Judge(recipe.shown.answers).to(device).eval().requires_grad_(False)
    if (work / "judge.safetensors").exists():
        judge.load_state_dict(load_file(work / "judge.safetensors"))
    else:
        judge, values = train_judge(recipe, work, device, renders)
        record("judge", values)
        _whole(work / "judge.safetensors", lambda part: save_file(judge.state_dict(), part))
    if (work / "vae").exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").to(device)
    else:
        vae, values = train_vae(recipe, work, device, renders, judge)
        record("vae", values)
        _whole(work / "vae", vae.save_pretrained)
    make_latents(work, device, renders, vae, (1, 2))

    stages = [("low", recipe.size // 16, 5e-4), ("high", recipe.size // 8, 3e-4)]
    if recipe.large:
        large = make_renders(recipe, work, device, recipe.large_images, scale=2, workers=workers)
        make_latents(work, device, large, vae, (1,))
        stages.append(("large", recipe.size // 4, 1e-4))
    torch.manual_seed(recipe.seed)  # of the first weights
    model = Denoiser(recipe.shown).to(device)
    for name, size, rate in stages:
        done = work / f"{name}.safetensors"
        if not done.exists():
            samples = getattr(recipe, name)
            record(name, train_denoiser(name, model, recipe, work, device, size=size, samples=samples, rate=rate))
            _whole(done, lambda part: save_file(copy.deepcopy(model).cpu().state_dict(), part))
        model.load_state_dict(load_file(done))
    _whole(out, lambda part: export(work, part, figures, recipe))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tofu_sd.demo.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="folder for renders, checkpoints")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the finished weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes that render; default: %(default)s")
    for field in fields(Recipe):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help="default: %(default)s",
        )
    args = vars(parser.parse_args(argv))
    work, out, device = args.pop("work"), args.pop("out"), torch.device(args.pop("device"))
    workers = args.pop("workers")
    if workers < 1:
        parser.error(f"--workers is {workers}; it must be at least 1")
    try:
        train(Recipe(**args), work, out, device, workers)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
