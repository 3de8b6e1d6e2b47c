"""Trains every part of the embedded model from scratch: `python -m tofu_sd.demo.train`.

    render   96 classes × images each -> renders.npy               the training pictures, 256 × 256
    judge    classifier on renders; accuracy on fresh ones           judge.safetensors
    vae      autoencoder on 96-pixel crops                           vae/
    encode   latents of the renders and their mirror images          latents-32.npy, latents-16.npy
    low      UNet and text encoder on 16 × 16 latents                unet/, text_encoder/
    high     the same weights on 32 × 32 latents
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
from collections.abc import Callable
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

from . import WEIGHTS
from .model import (
    Judge,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    perceptual_distance,
)
from .scenes import CLASSES, render

# isort: split
# after .model, which says in words what is wrong with an installation that cannot import these
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr

CHECKPOINT_SECONDS = 120
CROP = 96  # pixels a side of what the autoencoder is trained on, at full and at half size
TEST_SEED = 10_000_000  # renders from here on are never trained on


@dataclass(frozen=True)
class Recipe:
    """Sizes of the run in samples; the default is what two CPU cores do in about two and a half hours."""

    images: int = 80  # renders a class
    size: int = 256  # pixels; latents are size / 8
    judge: int = 60_000
    vae: int = 48_000
    low: int = 60_000
    high: int = 60_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 2 * CROP or self.size % 16:
            raise ValueError(f"size is {self.size}; it must be a multiple of 16 of at least {2 * CROP} pixels")
        for name in ("images", "judge", "vae", "low", "high"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def kinds(self) -> list[int]:
        """Class index of every render, in file order."""
        return [c for c in range(len(CLASSES)) for _ in range(self.images)]


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


def make_renders(recipe: Recipe, work: Path, device: torch.device) -> np.ndarray:
    """The training pictures, uint8 [96 × images, 3, size, size], memory-mapped. Rendered once."""
    path, kinds, chunk = work / "renders.npy", recipe.kinds(), 16
    shape = (len(kinds), 3, recipe.size, recipe.size)
    if not path.exists():
        part = path.with_suffix(".tmp")
        out = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        for i in tqdm(range(0, len(kinds), chunk), desc="render", unit_scale=chunk, unit="image", mininterval=5):
            rows = range(i, min(i + chunk, len(kinds)))
            pictures = render([CLASSES[kinds[r]] for r in rows], [recipe.seed + r for r in rows], recipe.size, device)
            out[i : i + chunk] = (pictures * 255).round().byte().cpu().numpy()
        out.flush()
        os.replace(part, path)
    return np.load(path, mmap_mode="r")


def judge_accuracy(judge: Judge, device: torch.device, images: int = 960, size: int = 256) -> float:
    """Share of fresh renders (ten a class) of which shape, material and setting are all recognised."""
    right = 0
    for i in range(0, images, 32):
        rows = range(i, min(i + 32, images))
        kinds = [CLASSES[r % len(CLASSES)] for r in rows]
        found = judge.classify(render(kinds, [TEST_SEED + r for r in rows], size, device))
        right += int((found.cpu() == torch.tensor([k.labels for k in kinds])).all(-1).sum())
    return right / images


def train_judge(recipe: Recipe, work: Path, device: torch.device, renders: np.ndarray) -> tuple[Judge, dict[str, Any]]:
    torch.manual_seed(recipe.seed)
    judge = Judge().to(device)
    labels = torch.tensor([CLASSES[c].labels for c in recipe.kinds()], device=device)
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
    figures["accuracy"] = judge_accuracy(judge, device, size=recipe.size)
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
    fresh = [render(list(CLASSES[i : i + 8]), list(range(TEST_SEED + i, TEST_SEED + i + 8)), recipe.size, device)
             for i in range(0, len(CLASSES), 8)]  # fmt: skip
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
def make_latents(recipe: Recipe, work: Path, device: torch.device, renders: np.ndarray, vae: AutoencoderKL) -> None:
    """Scaled latents of all renders, then of their mirror images, float16 [2 × n, 4, s, s], at full and half size."""
    for size in (recipe.size // 8, recipe.size // 16):
        path, chunk = work / f"latents-{size}.npy", 32
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

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer(c.prompt for c in CLASSES)
        self.text_encoder = build_text_encoder(self.tokenizer)
        self.unet = build_unet()

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
    kinds = torch.tensor(recipe.kinds() * 2)
    texts = [c.prompt for c in CLASSES] + [c.name for c in CLASSES] + [""]
    ids = model.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    noising, batch = build_scheduler(), 24 if size < 32 else 16

    def loss(g: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=g)
        text, u = kinds[rows], torch.rand(batch, generator=g)
        text = torch.where(u < 0.2, text + len(CLASSES), text)  # the bare name
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


def export(work: Path, target: Path, figures: dict[str, Any]) -> None:
    """Writes pipeline and judge as float16 safetensors to `target`, in the layout of any diffusers model folder."""
    model = Denoiser()
    model.load_state_dict(load_file(work / "high.safetensors"))
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


def train(recipe: Recipe, work: Path, out: Path, device: torch.device) -> None:
    """Runs every stage whose result `work` does not hold yet, then writes the weights to `out`.

    ValueError for a folder that holds another recipe's results.
    """
    work.mkdir(parents=True, exist_ok=True)
    note = work / "figures.json"
    figures: dict[str, Any] = {"recipe": asdict(recipe), "device": str(device), "torch": torch.__version__}
    if note.exists():
        before = json.loads(note.read_text())
        for name, value in figures["recipe"].items():
            if before["recipe"][name] != value:
                raise ValueError(f"{work.name} holds results for {name} {before['recipe'][name]}, not {value}")
        figures = before | figures

    def record(stage: str, values: dict[str, Any]) -> None:
        figures[stage] = values
        _note()
        print(stage, json.dumps(values), flush=True)

    def _note() -> None:
        _whole(note, lambda part: part.write_text(json.dumps(figures, indent=1)))

    _note()
    renders = make_renders(recipe, work, device)
    judge = Judge().to(device).eval().requires_grad_(False)
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
    make_latents(recipe, work, device, renders, vae)

    torch.manual_seed(recipe.seed)  # of the first weights
    model = Denoiser().to(device)
    for name, size, rate in (("low", recipe.size // 16, 5e-4), ("high", recipe.size // 8, 3e-4)):
        done = work / f"{name}.safetensors"
        if not done.exists():
            samples = getattr(recipe, name)
            record(name, train_denoiser(name, model, recipe, work, device, size=size, samples=samples, rate=rate))
            _whole(done, lambda part: save_file(copy.deepcopy(model).cpu().state_dict(), part))
        model.load_state_dict(load_file(done))
    _whole(out, lambda part: export(work, part, figures))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tofu_sd.demo.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="folder for renders, checkpoints")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the finished weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help="default: %(default)s")
    args = vars(parser.parse_args(argv))
    work, out, device = args.pop("work"), args.pop("out"), torch.device(args.pop("device"))
    try:
        train(Recipe(**args), work, out, device)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
