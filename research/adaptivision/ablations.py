"""AdaptiVision's ablations: `python -m research.adaptivision.ablations`.

The paper's tables 4 (temperature), 5 (strategy) and 7 (components). Every variant is trained by
research.classifiers.train on the embedded scenes, once for each seed, and judged on fresh ones.
What is trained already, in the folder of its name, is not trained again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from eval.common import formats, provenance
from eval.common.cli import Help, Parser, as_path, choices, command, integer_from, integers
from eval.common.devices import add_device, pick_device
from eval.common.files import check_place, write_results
from eval.images.flops import FORMULAS
from eval.metrics.statistics import bootstrap
from eval.reporting.tables import RECORD, markdown_rows, terminal_rows

from ..classifiers import models as classifiers
from ..classifiers import train
from ..classifiers.datasets import Labelled
from ..classifiers.models import WEIGHTS
from .model import AdaptiVision

SCHEMA = 1
RATE = 5e-4  # of the trainings
COUNTED = 64  # pictures of which operations and clusters are counted
TITLES = {
    "components": "What each part adds (AdaptiVision, table 7)",
    "strategy": "How tokens become fewer (table 5)",
    "temperature": "How soft the clusters are (table 4)",
}


@dataclass(frozen=True)
class Variant:
    """A row: options of research.classifiers.train beside those that all share."""

    name: str
    tables: tuple[str, ...]
    options: tuple[str, ...] = field(default=())


PLAIN = ("--clusters", "none", "--no-focus")
VARIANTS = (
    Variant("all patches", ("components", "strategy"), PLAIN),
    Variant("+ clusters", ("components",), ("--no-focus",)),
    Variant("+ clusters + focus", ("components", "strategy", "temperature")),
    Variant("+ clusters + focus + guidance", ("components",), ("--guided",)),
    Variant("random patches", ("strategy",), ("--strategy", "random")),
    Variant("important patches", ("strategy",), ("--strategy", "importance")),
    *(Variant(f"temperature {t}", ("temperature",), ("--temperature", str(t))) for t in (1, 20, 100, 200, 250)),
)


EXAMPLES = """examples:
  python -m research.adaptivision.ablations --of components --seeds 0
      its table 7 by a training each; the same command goes on where it was stopped
  python -m research.adaptivision.ablations --table runs/condensation
      what was found, again
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m research.adaptivision.ablations",
        description="AdaptiVision's ablations: train each variant, and judge it.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    p.add_argument("--of", default=",".join(TITLES), metavar="A,B", help=f"tables: {', '.join(TITLES)}")
    p.add_argument("--seeds", type=integers, default="0,1,2", metavar="N,N", help="of the trainings of each variant")
    p.add_argument("--samples", type=integer_from(1), default=25_600, metavar="N", help="pictures of a training")
    p.add_argument("--depth", type=integer_from(1), default=4, metavar="N", help="layers")
    p.add_argument("--clusters", default="12,48", metavar="K,K", help="fewest and most of a picture's 196 patches")
    add_device(p)
    p.add_argument("--out", type=as_path, default=Path("runs/condensation"), metavar="DIR", help="folder of trainings")
    p.add_argument("--table", type=as_path, metavar="DIR", help="train nothing; print a folder's tables for a page")
    return p


@command(resumes=True)
def main(argv: Sequence[str]) -> int:
    """0 if it is done, 2 if something that was asked for cannot be, 130 if it was interrupted."""
    options = parser().parse_args(argv)
    if options.table:
        print(markdown(read(options.table), choices(options.of, TITLES, "table")), end="")
        return 0
    check_place(options.out, "--out", folder=True)  # before hours of training
    found = run(options, argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in choices(options.of, TITLES, "table"):
        terminal_rows(TITLES[table], *cells(found, table), notes(found), console)
    return 0


def run(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What condensation.json holds, of the variants of the tables asked for."""
    device = pick_device(options.device)
    tables = choices(options.of, TITLES, "table")
    told = provenance.begin("research.adaptivision.ablations", argv, device)
    asked = {
        (variant, seed): trained_as(variant, seed, options)
        for variant in VARIANTS if set(variant.tables) & set(tables)
        for seed in options.seeds
    }  # fmt: skip
    for one in asked.values():  # what cannot be built is told before the first is trained
        train.fitting(one)
    rows = []
    for variant in dict.fromkeys(variant for variant, _ in asked):
        judged = []
        for seed in options.seeds:
            one = asked[variant, seed]
            if (one.out / WEIGHTS).exists():
                train.claim(one.out, train.recipe(one, train.data("scenes", one.side, one.guided)[0], device))
            else:
                train.train(one)
            (net,) = classifiers.load(str(one.out), device)
            fresh = train.data("scenes", net.side, one.guided)[1]
            judged.append((torch.cat(train.correct(net.model, fresh, device)), *cost(net.model, fresh, device)))
        rights = torch.stack([right for right, _, _ in judged]).double()
        ends = bootstrap(rights.mean(0), [fresh.classes[label] for label in fresh.labels])
        rows.append({
            "variant": variant.name, "tables": list(variant.tables),
            "accuracy": {"value": rights.mean().item(), "low": ends and ends[0], "high": ends and ends[1],
                         "by_seed": rights.mean(1).tolist()},
            "flops": mean(flops for _, flops, _ in judged), "tokens": mean(tokens for _, _, tokens in judged),
        })  # fmt: skip
    told |= {"process_mib": None, "ended": provenance.now()}
    settings = {"seeds": options.seeds, "samples": options.samples, "depth": options.depth,
                "clusters": options.clusters, "n": rights.shape[1], "classes": len(fresh.classes),
                "device": provenance.device_name(device), "torch": str(torch.__version__)}  # fmt: skip
    found = {"schema": SCHEMA, "settings": settings, "rows": rows, "provenance": told}
    write_results(options.out / "condensation.json", found)
    return found


def trained_as(variant: Variant, seed: int, options: argparse.Namespace) -> argparse.Namespace:
    """The options of research.classifiers.train for one training."""
    folder = options.out / f"{variant.name.replace(' ', '-')}-{seed}"
    return train.parser().parse_args([
        "--kind", "adaptivision", "--samples", str(options.samples), "--depth", str(options.depth),
        "--clusters", options.clusters, *variant.options, "--seed", str(seed), "--out", str(folder),
        "--rate", str(RATE), "--device", options.device,
    ])  # fmt: skip


@torch.no_grad()
def cost(model: nn.Module, fresh: Labelled, device: torch.device) -> tuple[float, float]:
    """(operations, tokens behind the condensation) of a picture, on average over a few, each by itself."""
    assert isinstance(model, AdaptiVision)
    tokens = []
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        for i, (picture, _) in enumerate(DataLoader(Subset(fresh.pictures, range(COUNTED)))):
            told = None if fresh.guidance is None else fresh.guidance[i : i + 1].to(device)
            _, clusters = model.features(picture.to(device), told)
            tokens.append(len(model.position) if clusters is None else int(clusters.used.sum()))
    return counter.get_total_flops() / COUNTED, mean(tokens)


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = formats.read(
        out / "condensation.json", formats.CONDENSATION, SCHEMA, "research.adaptivision.ablations", out.name
    )
    if (out / RECORD).exists():
        found["provenance"]["record"] = f"[{out.name}]({(out / RECORD).as_posix()})"
    return found


def cells(found: dict[str, Any], table: str) -> tuple[list[str], list[list[str]]]:
    """(titles, the texts of each row) of one table."""
    lines = []
    for row in (row for row in found["rows"] if table in row["tables"]):
        a = row["accuracy"]
        between = f" ({100 * a['low']:.1f}–{100 * a['high']:.1f})" if a["low"] is not None else ""
        each = ", ".join(f"{100 * value:.1f}" for value in a["by_seed"])
        lines.append([row["variant"], f"{100 * a['value']:.2f}{between}", each, f"{row['tokens']:.0f}",
                      f"{row['flops'] / 1e9:.3f}"])  # fmt: skip
    return ["variant", "accuracy, %", "of each training", "tokens", "GFLOP / image"], lines


def notes(found: dict[str, Any]) -> list[str]:
    """Without which the figures mean nothing."""
    s, p = found["settings"], found["provenance"]
    return [
        f"Trainings of seeds {', '.join(map(str, s['seeds']))}, {s['samples']:,} pictures each · {s['n']} fresh scenes "
        f"of {s['classes']} classes · {s['depth']} layers, clusters {s['clusters']}.",
        f"float32 on {s['device']} · torch {s['torch']} · commit {p['commit'] or 'unknown'}.",
        "Accuracy: mean over the trainings, 95 % interval over classes; tokens and FLOPs: of one image.",
        *(["", f"`{p['command']}`"] if "record" not in p else [p["record"]]),
    ]


def markdown(found: dict[str, Any], tables: Sequence[str]) -> str:
    parts = [f"**{TITLES[table]}**\n\n" + markdown_rows(*cells(found, table), notes(found)) for table in tables]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
