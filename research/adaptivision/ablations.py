"""AdaptiVision's ablations: `python -m research.adaptivision.ablations`.

These are the paper's tables 4 (temperature), 5 (strategy) and 7 (components). Every variant is trained by
research.classifiers.train on the embedded scenes, once for each seed, and evaluated on fresh scenes. A variant that is
already trained, in the folder of its name, is not trained again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from eval.common import formats, provenance
from eval.common.cli import Help, Parser, as_path, choices, command, integer_from, integers
from eval.common.devices import add_device, pick_device
from eval.common.files import check_place, write_results
from eval.common.schema_changes import SCHEMA
from eval.images.flops import FORMULAS
from eval.metrics.statistics import bootstrap
from eval.reporting.footnotes import RECORD
from eval.reporting.tables import markdown_rows, terminal_rows

from ..classifiers import models as classifiers
from ..classifiers import train
from ..classifiers.datasets import Labelled
from ..classifiers.models import WEIGHTS
from .model import AdaptiVision

RATE = 5e-4  # of the trainings
COUNTED = 64  # images of which FLOPs and clusters are counted
TITLES = {
    "components": "What each part adds (AdaptiVision, table 7)",
    "strategy": "How tokens become fewer (table 5)",
    "temperature": "How soft the clusters are (table 4)",
}


@dataclass(frozen=True)
class Variant:
    """A row of the tables.

    Args:
        name: of the row.
        tables: that contain it.
        options: of research.classifiers.train, added to those of all rows.
    """

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
      table 7 with one training each; the same command resumes after an interrupt
  python -m research.adaptivision.ablations --table runs/condensation
      the tables of saved results
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m research.adaptivision.ablations",
        description="AdaptiVision's ablations: train and evaluate each variant.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    p.add_argument("--of", default=",".join(TITLES), metavar="A,B", help=f"tables: {', '.join(TITLES)}")
    p.add_argument(
        "--seeds",
        type=integers,
        default="0,1,2",
        metavar="N,N",
        help="seeds; each variant is trained once for each",
    )
    p.add_argument("--samples", type=integer_from(1), default=25_600, metavar="N", help="images of a training")
    p.add_argument("--depth", type=integer_from(1), default=4, metavar="N", help="layers")
    p.add_argument(
        "--clusters", default="12,48", metavar="K,K", help="fewest and most clusters of an image's 196 patches"
    )
    add_device(p)
    p.add_argument("--out", type=as_path, default=Path("runs/condensation"), metavar="DIR", help="folder of trainings")
    p.add_argument("--table", type=as_path, metavar="DIR", help="train nothing; print a folder's tables in Markdown")
    return p


@command(resumes=True)
def main(argv: Sequence[str]) -> int:
    """Returns 0; 2 after an error in the options; 130 after an interrupt."""
    options = parser().parse_args(argv)
    if options.table:
        print(markdown(read(options.table), choices(options.of, TITLES, "table")), end="")
        return 0
    check_place(options.out, "--out", folder=True)  # before hours of training
    results = run(options, argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in choices(options.of, TITLES, "table"):
        terminal_rows(TITLES[table], *cells(results, table), notes(results), console)
    return 0


def run(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Trains and evaluates the variants of the requested tables. Returns the content of condensation.json."""
    device = pick_device(options.device)
    tables = choices(options.of, TITLES, "table")
    record = provenance.begin("research.adaptivision.ablations", argv, device)
    variants = [variant for variant in VARIANTS if set(variant.tables) & set(tables)]
    for variant, seed in product(variants, options.seeds):  # before the first is trained
        train.check_buildable(training_options(variant, seed, options))
    rows = []
    for variant in variants:
        measured = [evaluate(training_options(variant, seed, options), device) for seed in options.seeds]
        rows.append(row_of(variant, measured))
    record |= {"process_mib": None, "ended": provenance.now()}
    settings = {"seeds": options.seeds, "samples": options.samples, "depth": options.depth,
                "clusters": options.clusters, "n": len(measured[0].correct), "classes": len(measured[0].fresh.classes),
                "device": provenance.device_name(device), "torch": str(torch.__version__)}  # fmt: skip
    content = {"schema": SCHEMA, "settings": settings, "rows": rows, "provenance": record}
    write_results(options.out / "condensation.json", content)
    return content


@dataclass(frozen=True)
class Measured:
    """One training on fresh scenes.

    Args:
        fresh: the scenes.
        correct: [n] bool, whether each is classified correctly.
        flops, tokens: of an image, on average; see `cost`.
    """

    fresh: Labelled
    correct: Tensor
    flops: float
    tokens: float


def evaluate(training: argparse.Namespace, device: torch.device) -> Measured:
    """Trains a variant, unless its folder already holds it, and evaluates it."""
    if (training.out / WEIGHTS).exists():
        learnt = train.data("scenes", training.side, training.guided)[0]
        train.init_output_dir(training.out, train.recipe(training, learnt, device))
    else:
        train.train(training)
    (net,) = classifiers.load(str(training.out), device)
    fresh = train.data("scenes", net.side, training.guided)[1]
    return Measured(fresh, torch.cat(train.correct(net.model, fresh, device)), *cost(net.model, fresh, device))


def row_of(variant: Variant, measured: Sequence[Measured]) -> dict[str, Any]:
    """Returns a variant's row in condensation.json."""
    correct, fresh = torch.stack([one.correct for one in measured]).double(), measured[-1].fresh
    ends = bootstrap(correct.mean(0), [fresh.classes[label] for label in fresh.labels])
    return {
        "variant": variant.name, "tables": list(variant.tables),
        "accuracy": {"value": correct.mean().item(), "low": ends and ends[0], "high": ends and ends[1],
                     "by_seed": correct.mean(1).tolist()},
        "flops": mean(one.flops for one in measured), "tokens": mean(one.tokens for one in measured),
    }  # fmt: skip


def training_options(variant: Variant, seed: int, options: argparse.Namespace) -> argparse.Namespace:
    """Returns the options of research.classifiers.train for one training."""
    folder = options.out / f"{variant.name.replace(' ', '-')}-{seed}"
    return train.parser().parse_args([
        "--kind", "adaptivision", "--samples", str(options.samples), "--depth", str(options.depth),
        "--clusters", options.clusters, *variant.options, "--seed", str(seed), "--out", str(folder),
        "--rate", str(RATE), "--device", options.device,
    ])  # fmt: skip


@torch.no_grad()
def cost(model: nn.Module, fresh: Labelled, device: torch.device) -> tuple[float, float]:
    """Returns (FLOPs, tokens after clustering) of an image, the mean over a few images in batches of one."""
    assert isinstance(model, AdaptiVision)
    tokens = []
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        for i, (image, _) in enumerate(DataLoader(Subset(fresh.images, range(COUNTED)))):
            guidance = None if fresh.guidance is None else fresh.guidance[i : i + 1].to(device)
            _, clusters = model.features(image.to(device), guidance)
            tokens.append(len(model.position) if clusters is None else int(clusters.used.sum()))
    return counter.get_total_flops() / COUNTED, mean(tokens)


def read(out: Path) -> dict[str, Any]:
    """Reads condensation.json. EvalError where it is missing or damaged."""
    found = formats.read(
        out / "condensation.json", formats.CONDENSATION, SCHEMA, "research.adaptivision.ablations", out.name
    )
    if (out / RECORD).exists():
        found["provenance"]["record"] = f"[{out.name}]({(out / RECORD).as_posix()})"
    return found


def cells(results: dict[str, Any], table: str) -> tuple[list[str], list[list[str]]]:
    """Returns (titles, the cells of each row) of one table."""
    lines = []
    for row in (row for row in results["rows"] if table in row["tables"]):
        a = row["accuracy"]
        between = f" ({100 * a['low']:.1f}–{100 * a['high']:.1f})" if a["low"] is not None else ""
        each = ", ".join(f"{100 * value:.1f}" for value in a["by_seed"])
        lines.append([row["variant"], f"{100 * a['value']:.2f}{between}", each, f"{row['tokens']:.0f}",
                      f"{row['flops'] / 1e9:.3f}"])  # fmt: skip
    return ["variant", "accuracy, %", "of each training", "tokens", "GFLOP / image"], lines


def notes(results: dict[str, Any]) -> list[str]:
    """Returns the lines below a table: how it was measured."""
    s, p = results["settings"], results["provenance"]
    return [
        f"Trainings of seeds {', '.join(map(str, s['seeds']))}, {s['samples']:,} images each · {s['n']} fresh scenes "
        f"of {s['classes']} classes · {s['depth']} layers, clusters {s['clusters']}.",
        f"float32 on {s['device']} · torch {s['torch']} · commit {p['commit'] or 'unknown'}.",
        "Accuracy: mean over the trainings, 95 % interval over classes; tokens and FLOPs: of one image.",
        *(["", f"`{p['command']}`"] if "record" not in p else [p["record"]]),
    ]


def markdown(results: dict[str, Any], tables: Sequence[str]) -> str:
    """Returns the tables in Markdown."""
    parts = [f"**{TITLES[table]}**\n\n" + markdown_rows(*cells(results, table), notes(results)) for table in tables]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
