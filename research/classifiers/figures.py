"""Plots and merge maps of an evaluation of classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eval.reporting.drawings import plots
from eval.reporting.drawings.pareto_plot import COLOURS
from tofu_sd.core.token_map import TokenMap
from tofu_sd.hosts import timm as host

from .methods import BASELINE, Method
from .models import Classifier
from .predictions import MIN_SPAN, SHOWN, Evaluation


def linearity_plot(results: dict[str, Any]) -> str:
    """Plots linearity (ToFu Fig. 3): the mean over the classifiers, and their range."""
    layers = torch.tensor(results["linearity"], dtype=torch.float64)  # [classifiers, layers]
    low, high = layers.aminmax(dim=0)
    with plots.style():
        figure = Figure(figsize=(4.7, 3), layout="constrained")
        ax = figure.subplots()
        plots.bare(ax)
        ax.fill_between(range(len(low)), low.tolist(), high.tolist(), color=COLOURS[0], alpha=0.15, linewidth=0)
        ax.plot(layers.mean(dim=0).tolist(), "o-", color=COLOURS[0], markersize=4, linewidth=1.2)
        ax.ticklabel_format(axis="y", useOffset=False)
        ax.set_xlabel("layer")
        ax.set_ylabel("functional linearity of its MLP")
        return plots.svg(figure)


def plot(results: dict[str, Any]) -> str:
    """Plots accuracy and feature shift against FLOPs and, if batches were timed, images per second.

    The upper half is ToFu's Fig. 4.
    """
    full = next(row for row in results["rows"] if row["method"] == BASELINE.name)
    costs: list[tuple[str, Callable[[dict[str, Any]], float]]] = [("GFLOP / image", lambda row: row["flops"] / 1e9)]
    if full["images_per_second"]:
        costs.append(("images / s", lambda row: row["images_per_second"]["median"]))
    values: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("accuracy, %", lambda row: 100 * row["accuracy"]["value"]),
        ("feature shift", lambda row: row["feature_shift"]["value"]),
    ]
    names = list(dict.fromkeys(row["method"] for row in results["rows"] if row is not full))
    with plots.style():
        figure = Figure(figsize=(0.5 + 4.2 * len(costs), 6), layout="constrained")
        axes = figure.subplots(len(values), len(costs), sharey="row", sharex="col", squeeze=False)
        for line, (title, value) in zip(axes, values, strict=True):
            line[0].set_ylabel(title)
            for ax, (_, cost) in zip(line, costs, strict=True):
                plots.bare(ax)
                for i, name in enumerate(names):
                    own = sorted((row for row in results["rows"] if row["method"] == name), key=cost)
                    colour = COLOURS[i % len(COLOURS)]
                    ax.plot([cost(r) for r in own], [value(r) for r in own], "o-", color=colour, markersize=4,
                            linewidth=1.2, label=name)  # fmt: skip
        for ax, (_, cost) in zip(axes[0], costs, strict=True):
            ax.axhline(values[0][1](full), color="#60646c", linewidth=0.8, linestyle=":")
            ax.plot(cost(full), values[0][1](full), "k*", label=BASELINE.name)
        for ax, (title, _) in zip(axes[-1], costs, strict=True):
            ax.set_xlabel(title)
            ax.set_yscale("log")
        low, high = axes[0][0].get_ylim()
        if high - low < MIN_SPAN:  # differences of an image or two do not fill the panel
            top = min(100.2, (low + high + MIN_SPAN) / 2)
            axes[0][0].set_ylim(top - MIN_SPAN, top)
        axes[0][-1].legend(frameon=False, fontsize=8)
        return plots.svg(figure)


@torch.no_grad()
def maps(evaluation: Evaluation, one: Classifier, methods: Sequence[Method]) -> Image.Image:
    """Draws images and, for each method, which patches are one token after the last layer that merges (ATM Fig. 7).

    Each column is an image, alone in its batch, sorted by the number of tokens under the last method. Each token has
    the mean colour of its patches and an outline; the number of tokens is below.
    """
    side, gap, foot = 2 * one.side, 6, 18
    model: Any = one.model
    columns: list[
        list[tuple[Tensor, int]]
    ] = []  # of each, the image and the methods' drawings, with their numbers of tokens
    for i in torch.linspace(0, evaluation.n - 1, SHOWN).long().tolist():
        image = evaluation.data.images[i][0]
        shown = [(image, 0)]
        for method in methods:
            records: list[tuple[int, TokenMap]] = []
            if method.reduction is not None:
                with method.apply(model), host.record_maps(model) as records:
                    model(image.unsqueeze(0).to(next(model.parameters())))
            group_idx = records[-1][1].group_idx[0].cpu() if records else torch.arange(model.patch_embed.num_patches)
            shown.append((outlined(image, group_idx), int(group_idx.max()) + 1))
        columns.append(shown)
    columns.sort(key=lambda shown: shown[-1][1])
    width, height = len(columns) * (side + gap) + gap, (1 + len(methods)) * (side + foot) + foot
    page = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column, shown in enumerate(columns):
        for line, (image, tokens) in enumerate(shown):
            low, high = image.amin(), image.amax()
            pixels = ((image - low) / (high - low).clamp_min(1e-6) * 255).byte().permute(1, 2, 0).numpy()
            x, y = gap + column * (side + gap), line * (side + foot)
            page.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
            if line:
                pen.text((x, y + side + 2), f"{methods[line - 1].label}: {tokens} tokens", "black", font)
    return page


def outlined(image: Tensor, group_idx: Tensor) -> Tensor:
    """Draws an image [3, H, W] with each group of patches in its mean colour and outlined. group_idx [N]: its group."""
    H = image.shape[-1]
    across = math.isqrt(len(group_idx))
    patch = H // across
    pixels = group_idx.view(across, across).repeat_interleave(patch, 0).repeat_interleave(patch, 1)  # [H, H]
    flat = pixels.flatten()
    sums = torch.zeros(3, int(group_idx.max()) + 1).index_add_(
        1, flat, image[:, : len(pixels), : len(pixels)].flatten(1)
    )
    filled = (sums / torch.bincount(flat).clamp_min(1))[:, flat].view(3, *pixels.shape)
    edge = torch.zeros_like(pixels, dtype=torch.bool)
    edge[1:] |= pixels[1:] != pixels[:-1]
    edge[:, 1:] |= pixels[:, 1:] != pixels[:, :-1]
    return filled.masked_fill(edge, float(image.amin()))
