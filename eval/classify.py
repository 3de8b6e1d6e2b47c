"""What token reduction costs a classifier: `python -m eval.classify --method full,tome,tofu,atm --r 8,12,16,20`.

Accuracy, operations and images a second of each method at each r, over all classifiers that a name stands for: the
tables of ToFu (1 to 3) and ATM (1). Thresholds, which know of no r, are set to the operations that ToMe has at it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from tofu_sd.calibrate import synchronize
from tofu_sd.demo.train import TEST_SEED
from tofu_sd.hosts import timm as host
from tofu_sd.linearity import best_split
from tofu_sd.tokens import TokenMap
from tofu_sd.vit import RECIPES

from . import EvalError, classifiers, formats, labelled, plots, provenance
from .classifiers import Classifier
from .files import check_place, png, write, write_results
from .flops import FORMULAS
from .frontier import COLOURS
from .labelled import Labelled
from .methods import code
from .options import (
    Help,
    Parser,
    add_device,
    add_dtype,
    as_path,
    at_least,
    command,
    finite,
    pick_device,
    pick_dtype,
    said,
    whole_numbers,
    working,
    written,
)
from .reductions import FULL, Method, parse
from .statistics import bootstrap
from .table import known, markdown_rows, terminal_rows

SCHEMA = 1
FRESH = 40  # scenes a class
CALIBRATION = 64  # pictures by which thresholds are set; their labels are not looked at
CURVES = (
    (1.0, 0.0),
    (1.0, 0.1),
    (1.0, 0.5),
    (0.0, 1.0),
)  # of thresholds: how far they begin below 1, how fast they fall
SCALES, HALVINGS = (1e-6, 1.0), 10  # of a curve, on a logarithmic scale
SHOWN = 8  # pictures of --maps
LEAST_SPAN = 4.0  # % of accuracy that a drawing shows at least

THRESHOLDS = (
    "atm: four curves of thresholds are brought to ToMe's operations at that r; of those that can be, the one that "
    "moves features least, on pictures held apart where at least 64 are not judged."
)
RS = [8, 12, 16, 20]
TAKES = {"table": ("rows", "plot"), "linearity": ("plot",)}  # what parts of a folder's results take
EXAMPLES = """examples:
  python -m eval.classify --method full,tome,tofu-avg,tofu --r 8,12,16,20
      ToFu's tables 1 and 2 on the embedded classifiers
  python -m eval.classify --method full,tome,tofu --r 8,13 --model deit_small_patch16_224.fb_in1k --data imagenet/val
      the same on ImageNet's validation pictures, a folder of 1,000 folders
  python -m eval.classify --method full,PPPPPPAAAAAA,AAAAAAPPPPPP --r 16
      ToFu's table 3: which layers prune, which average
  python -m eval.classify --noise 0.18
      the same on pictures that are harder to name
  python -m eval.classify --method tome,tofu,atm --stress
      ATM's table 1: the most that each saves without losing accuracy
"""


def parser() -> Parser:
    p = Parser(
        prog="python -m eval.classify",
        description="What token reduction costs a classifier, and what it saves.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.add_argument("--model", default="demo", help="demo, folders of eval.train with commas between, or one of timm's")
    p.add_argument("--data", default="scenes", help="scenes, or a folder that holds a folder of pictures a class")
    p.add_argument(
        "--method",
        default="full,tome,tofu-avg,tofu,prune,mlerp,atm",
        metavar="A,B",
        help=f"full, {', '.join(RECIPES)}, each with any @option=value; words like PPPPPPAAAAAA, a letter a layer",
    )
    p.add_argument(
        "--r",
        type=whole_numbers,
        metavar="N,N",
        help="tokens that leave in each layer (default: 8,12,16,20; with --stress, which finds the largest, all)",
    )
    p.add_argument("--limit", type=at_least(1), metavar="N", help="the first N pictures only (default: all)")
    p.add_argument(
        "--noise",
        type=deviation,
        default=0.0,
        metavar="SIGMA",
        help="Gaussian noise on pictures in 0..1 (default: none)",
    )
    p.add_argument("--batch", type=at_least(1), default=64, help="pictures at once, which share ATM's numbers")
    p.add_argument("--rounds", type=at_least(0), default=10, help="timed batches of each method, in turns; 0 for none")
    p.add_argument("--stress", action="store_true", help="find the most that each method fuses at the full accuracy")
    add_device(p)
    add_dtype(p, "float32")  # in which the papers measure
    p.add_argument("--out", type=as_path, metavar="DIR", help="folder (default: runs/classify-MODEL)")
    p.add_argument("--maps", type=as_path, metavar="FILE", help="draw which tokens are one in the last layers, as PNG")
    p.add_argument("--plot", type=as_path, metavar="FILE", help="write the drawing there, as SVG")
    p.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="of --table, say full 'tome, r = 16'")
    show = p.add_mutually_exclusive_group()
    show.add_argument("--table", type=as_path, metavar="DIR", help="measure nothing; print a folder's table for a page")
    show.add_argument(
        "--linearity", type=as_path, metavar="DIR", help="the same of each layer's functional linearity (ToFu Fig. 3)"
    )
    return p


@command(goes_on=True)
def main(argv: Sequence[str]) -> int:
    """0 if it is done, 2 if something that was asked for cannot be, 130 if it was interrupted."""
    options = parser().parse_args(argv)
    refuse_idle(options, said(parser(), argv))
    for name in ("out", "maps", "plot"):
        if (place := getattr(options, name)) is not None:
            check_place(place, f"--{name}", folder=name == "out")  # before minutes of measuring
    if options.table:
        found = read(options.table)
        print(markdown_rows(*cells({**found, "rows": named(found["rows"], options.rows)}), notes(found)), end="")
        if options.plot:
            write(options.plot, plot(found))
        return 0
    if options.linearity:
        found = read(options.linearity)
        print(markdown_rows(*straightness(found)), end="")
        if options.plot:
            write(options.plot, curve(found))
        return 0
    found, out = run(options, argv)
    terminal_rows("", *cells(found), notes(found), Console(width=None if sys.stdout.isatty() else 120))
    print(f"results: {out / 'classify.json'}", file=sys.stderr)
    return 0


def refuse_idle(options: argparse.Namespace, typed: Collection[str]) -> None:
    """EvalError for options that would do nothing beside what is asked for."""
    shown = next((name for name in TAKES if getattr(options, name)), None)
    for name in sorted(typed):
        if shown and name not in (shown, *TAKES[shown]):
            raise EvalError(f"{written(name)} says nothing of --{shown}")
    if "rows" in typed and not shown:
        raise EvalError("--rows is of --table alone")
    if "plot" in typed and options.stress:
        raise EvalError("--plot draws methods at several r, and --stress finds one of each")


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What one classifier did under one method. right [n]: bool. seen [n, C]: what its last linear layer was shown.

    flops, tokens: of a picture, on average; tokens: patch tokens that come out of the last layer but one. told: the
    method's settings, thresholds as found.
    """

    right: Tensor
    seen: Tensor
    flops: float
    tokens: float
    told: str


def run(options: argparse.Namespace, argv: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """(what classify.json holds, the folder). EvalError for what cannot be, before anything is measured."""
    device = pick_device(options.device)
    told = provenance.begin("eval.classify", argv, device)
    dtype = pick_dtype(options.dtype, device)
    models = classifiers.load(options.model, device, dtype)
    try:
        layers = min(len(host.find_blocks(one.model)) for one in models)
    except ValueError as error:
        raise EvalError(f"--model {options.model}: {error}") from error
    tried = sorted({0, *(options.r or all_of(models[0].model))}) if options.stress else None
    chosen = parse(options.method, [max(tried)] if tried else options.r or RS, layers)
    for method in chosen if tried else ():
        if "@r=" in method.name or (method.adaptive and method.r is None):
            what = "thresholds" if method.adaptive else "r"
            raise EvalError(f"--stress finds {what} itself, and {method.name!r} gives it")
    data = pictures_for(models[0], options.data, options.noise)
    n = min(options.limit or len(data), len(data))
    for method in chosen:
        # thresholds are set to the operations of ToMe, which has to fit too
        own = [method, *(parse("tome", [method.r], layers) if method.adaptive and method.r is not None else [])]
        for one, asked in product(models, own):
            try:
                with asked.applied(one.model):
                    pass
            except (ValueError, TypeError) as error:
                raise EvalError(f"method {method.name!r} does not fit {one.name!r}: {error}") from error
    out = options.out or Path("runs") / f"classify-{Path(options.model.partition(',')[0]).name}"
    bench = Bench(data, n, options.batch, device, out)
    if tried:
        full = Entry.of(bench, models, FULL)
        best = [most_saving(bench, models, method, full, tried) for method in chosen if method is not FULL]
        entries = [full, *best]
    else:
        entries = [Entry.of(bench, models, method) for method in dict.fromkeys([FULL, *chosen])]
    time_in_turns(bench, models[0], entries, options.rounds)
    rows = [entry.row(entries, bench.groups(), min(n, options.batch)) for entry in entries]
    told |= {"process_mib": None, "ended": provenance.now()}
    settings = {
        "model": ", ".join(dict.fromkeys(one.name for one in models)),
        "classifiers": len(models), "seeds": [one.seed for one in models],
        "weights": [provenance.weights_hash(one.model) for one in models],
        "data": data.name, "n": n, "classes": len(data.classes), "batch": options.batch, "side": models[0].side,
        "stress": options.stress, "tried": tried, "rounds": options.rounds, "dtype": str(dtype).removeprefix("torch."),
        "linearity_of": "MLP with the norm before it",
        "device": provenance.device_name(device), "torch": str(torch.__version__), "timm": timm.__version__,
    }  # fmt: skip
    held = next(iter(DataLoader(Subset(data.pictures, range(min(CALIBRATION, n))), CALIBRATION)))[0].to(device)
    # what half precision rounds away would be taken for a bend
    straight = [host.linearity(deepcopy(one.model).float(), held).mean(dim=1).tolist() for one in models]
    found = {"schema": SCHEMA, "settings": settings, "rows": rows, "linearity": straight, "provenance": told}
    write_results(out / "classify.json", found)
    if not options.stress:
        drawing = plot(found)
        write(out / "plot.svg", drawing)
        if options.plot:
            write(options.plot, drawing)
    if options.maps:
        write(options.maps, png(maps(bench, models[0], [entry.settled[0] for entry in entries[1:]])))
    return found, out


def deviation(text: str) -> float:
    """A standard deviation of noise, as an argument's type."""
    sigma = finite(text)
    if sigma < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is below 0")
    return sigma


def pictures_for(classifier: Classifier, name: str, noise: float = 0) -> Labelled:
    """The pictures that a classifier is judged by, under noise of a deviation.

    EvalError where their classes are not as many as it knows, or noise is to lie on what is no longer 0..1.
    """
    if noise and not classifier.own:
        raise EvalError(f"--noise is {noise:g}; it takes pictures in 0..1, which {classifier.name!r} does not")
    if name == "scenes":
        data = labelled.rendered(classifier.side, FRESH, TEST_SEED)
    elif classifier.own:
        data = labelled.folder(Path(name), labelled.plain(classifier.side))
    else:
        config = timm.data.resolve_model_data_config(classifier.model)
        data = labelled.folder(Path(name), timm.data.create_transform(**config))
    knows = getattr(classifier.model, "num_classes", None)
    if knows is not None and knows != len(data.classes):
        raise EvalError(f"{data.name!r} has {len(data.classes)} classes, and {classifier.name!r} tells {knows} apart")
    return labelled.noisy(data, noise) if noise else data


@dataclass(frozen=True)
class Bench:
    """The first n pictures of the data, so many at once. What was judged is kept in `out` by all that decides it."""

    data: Labelled
    n: int
    batch: int
    device: torch.device
    out: Path

    def batches(self, n: int) -> DataLoader[Any]:
        return DataLoader(Subset(self.data.pictures, range(n)), self.batch)

    def held(self) -> list[Any]:
        """Batches of pictures to set thresholds by, of those that are not judged if they are enough."""
        rest = range(self.n, len(self.data))
        pool = rest if len(rest) >= CALIBRATION else range(len(self.data))
        chosen = [pool[i * len(pool) // CALIBRATION] for i in range(min(CALIBRATION, len(pool)))]
        return list(DataLoader(Subset(self.data.pictures, chosen), self.batch))

    def judge(self, one: Classifier, method: Method) -> Judged:
        weights = provenance.weights_hash(one.model)
        made = {
            "weights": weights, "method": method.settings, "data": self.data.key, "n": self.n, "batch": self.batch,
            "device": self.device.type, "torch": str(torch.__version__), "code": code(),
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
        path = self.out / "judged" / f"{key}.safetensors"
        kept = _kept(path, made)
        if kept is None:
            kept = judge(one.model, method, self.batches(self.n))
            told = {"made": json.dumps(made), "flops": repr(kept.flops), "tokens": repr(kept.tokens)}
            write(path, save({"right": kept.right, "seen": kept.seen}, told))
        return kept

    def groups(self) -> list[str]:
        """The class of each picture."""
        return [self.data.classes[label] for label in self.data.labels[: self.n]]


def _kept(path: Path, made: dict[str, Any]) -> Judged | None:
    """What was judged before, and by all of this; None where nothing was, or the file is broken."""
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata()
            if json.loads(told["made"]) == made:
                right, seen = file.get_tensor("right"), file.get_tensor("seen")
                return Judged(right, seen, float(told["flops"]), float(told["tokens"]), made["method"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        pass
    return None


@torch.no_grad()
def judge(model: nn.Module, method: Method, batches: Any) -> Judged:
    """Shows a classifier the pictures under a method."""
    right: list[Tensor] = []
    seen: list[Tensor] = []
    left: list[int] = []
    prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
    like = next(model.parameters())
    last, head = host.find_blocks(model)[-1], cast(nn.Module, model.head)
    with method.applied(model), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        handles = [
            last.register_forward_pre_hook(lambda m, args: left.append(len(args[0]) * args[0].shape[1])),
            head.register_forward_pre_hook(lambda m, args: seen.append(args[0].float().cpu())),
        ]
        try:
            for _, (pictures, labels) in zip(working(range(len(batches)), method.label), batches, strict=True):
                right.append(model(pictures.to(like)).argmax(-1).cpu() == labels)
        finally:
            for handle in handles:
                handle.remove()
    n = sum(map(len, right))
    flops, tokens = counter.get_total_flops() / n, sum(left) / n - prefix
    return Judged(torch.cat(right), torch.cat(seen), flops, tokens, method.settings)


@dataclass(frozen=True)
class Entry:
    """One row in the making: a method, as it is for each classifier, and what each did under it."""

    method: Method
    settled: list[Method]
    judged: list[Judged]
    seconds: list[float] = field(default_factory=list)  # of the first classifier's timed batches

    @classmethod
    def of(cls, bench: Bench, models: Sequence[Classifier], method: Method) -> Entry:
        settled = [settle(bench, one, method) for one in models]
        return cls(method, settled, [bench.judge(one, own) for one, own in zip(models, settled, strict=True)])

    @property
    def rights(self) -> Tensor:
        """Which pictures each classifier names right: float64 [classifiers, n] of 0 and 1."""
        return torch.stack([each.right for each in self.judged]).double()

    def moved(self, full: Entry) -> Tensor:
        """How far what the last linear layer is shown lies from the full model's, 1 - cosine, by picture: [n].

        The mean over the classifiers. It tells methods apart where accuracy no longer does (ATM Fig. 2 measures it).
        """
        pairs = zip(self.judged, full.judged, strict=True)
        return torch.stack([apart(own.seen, whole.seen) for own, whole in pairs]).mean(0)

    def row(self, entries: Sequence[Entry], groups: Sequence[str], batch: int) -> dict[str, Any]:
        """Of the results. entries: all of them, the full model's first. groups: the class of each picture."""
        tome = next((e for e in entries if (e.method.name, e.method.r) == ("tome", self.method.r)), None)
        rates = [batch / seconds for seconds in self.seconds]
        ratios = [full / own for full, own in zip(entries[0].seconds, self.seconds, strict=True)]
        ahead = None
        if tome is not None and tome is not self and self.method.r is not None:
            ahead = interval((self.rights - tome.rights).mean(0), groups)
        return {
            "method": self.method.name, "r": self.method.r, "label": self.method.label,
            "told": [each.told for each in self.judged],
            "accuracy": {**interval(self.rights.mean(0), groups), "by_classifier": self.rights.mean(1).tolist()},
            "ahead_of_tome": ahead,
            "moved": None if self is entries[0] else interval(self.moved(entries[0]), groups),
            "flops": mean(each.flops for each in self.judged), "tokens": mean(each.tokens for each in self.judged),
            "images_per_second": spread(rates) if rates else None, "speedup": spread(ratios) if ratios else None,
        }  # fmt: skip


def interval(values: Tensor, groups: Sequence[str]) -> dict[str, float | None]:
    """The mean of values [n] and its 95 % interval over classes."""
    low, high = bootstrap(values, groups) or (None, None)
    return {"value": values.mean().item(), "low": low, "high": high}


@torch.no_grad()
def settle(bench: Bench, one: Classifier, method: Method) -> Method:
    """A method whose thresholds are set to ToMe's operations at its r; any other as it is.

    ATM's authors sweep three parameters for each amount of operations, and keep what names most pictures right. Here no
    label is looked at: each of `CURVES` is scaled until it has ToMe's operations on pictures held apart, and the one by
    which their features move least is taken.
    """
    if not method.adaptive or method.r is None:
        return method
    if method.r == 0:
        return FULL
    held = bench.held()

    def judged(asked: Method) -> Judged:
        return judge(one.model, asked, held)

    def scaled(curve: tuple[float, float]) -> Method:
        low, high = (math.log(scale) for scale in SCALES)  # hardly anything is fused, all that can be
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            few = judged(method.falling(curve, math.exp(middle))).flops > aim
            low, high = (middle, high) if few else (low, middle)
        return method.falling(curve, math.exp(high))

    aim = judged(parse("tome", [method.r], len(host.find_blocks(one.model)))[0]).flops
    full = judged(FULL).seen
    tried = [(m, judged(m)) for m in map(scaled, CURVES)]
    reached = [(m, found) for m, found in tried if found.flops <= aim]  # one that cannot fuse as much moves less
    if not reached:
        return min(tried, key=lambda each: each[1].flops)[0]
    return min(reached, key=lambda each: apart(each[1].seen, full).mean().item())[0]


def apart(own: Tensor, full: Tensor) -> Tensor:
    """How far features [n, C] lie from the full model's, 1 - cosine: float64 [n]. Equal ones may round beyond 1."""
    return (1 - F.cosine_similarity(own.double(), full.double(), dim=-1)).clamp_min(0)


def most_saving(bench: Bench, models: Sequence[Classifier], method: Method, full: Entry, tried: Sequence[int]) -> Entry:
    """A method at the largest r of those `tried`, rising from 0, at which its accuracy over all classifiers, as ATM's
    table 1 prints it, is the full model's; thresholds at the operations that ToMe has at that r.

    From the largest down, not by halving: accuracy falls and rises by a picture or two from one r to the next.
    """

    def printed(entry: Entry) -> float:
        return round(100 * entry.rights.mean().item(), 1)

    entries = (Entry.of(bench, models, method.at(r)) for r in reversed(tried))
    return next(entry for entry in entries if printed(entry) >= printed(full))  # at 0 at last, where nothing is fused


def all_of(model: Any) -> list[int]:
    """The r of the stress test where none are given: each with which ToMe's patch tokens last to the last layer, and on
    in steps of a quarter to half of the tokens.
    """
    tokens, most = model.patch_embed.num_patches, model.patch_embed.num_patches // 2
    rs = list(range(1 + min(most, math.ceil(tokens / max(1, len(model.blocks) - 1)))))
    while rs[-1] < most:
        rs.append(min(most, math.ceil(1.25 * rs[-1])))
    return rs


@torch.no_grad()
def time_in_turns(bench: Bench, one: Classifier, entries: Sequence[Entry], rounds: int) -> None:
    """Gives each entry its seconds for one batch, once a round. All run in turns, so that what else the machine does
    falls on all alike.
    """  # fmt: skip
    pictures, _ = next(iter(bench.batches(min(bench.n, bench.batch))))
    pictures = pictures.to(next(one.model.parameters()))
    for turn in working(range(rounds + 1 if rounds else 0), "rounds"):
        for i in range(len(entries)):
            entry = entries[(i + turn) % len(entries)]
            with entry.settled[0].applied(one.model):
                synchronize(bench.device)
                start = time.perf_counter()
                one.model(pictures)
                synchronize(bench.device)
            if turn:  # the first warms up
                entry.seconds.append(time.perf_counter() - start)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median with the 5th and 95th percentile."""
    p5, median, p95 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.05, 0.5, 0.95]).double())
    return {"median": median.item(), "p5": p5.item(), "p95": p95.item()}


# --- what is shown --------------------------------------------------------------------------------------------------


def read(out: Path) -> dict[str, Any]:
    found = formats.read(out / "classify.json", formats.CLASSIFY, SCHEMA, "eval.classify", out.name)
    if not any(row["method"] == FULL.name for row in found["rows"]):
        raise EvalError(f"{out.name} holds no results of eval.classify: there is no row {FULL.name!r}")
    if len({len(layers) for layers in found["linearity"]}) > 1:
        raise EvalError(f"{out.name} holds no results of eval.classify: linearity is of classifiers of unequal depth")
    return found


def named(rows: list[dict[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of these labels, in this order; all where none are named. The full model's always comes first."""
    by_label = {row["label"]: row for row in rows}
    return [by_label[label] for label in dict.fromkeys([FULL.name, *known("row", labels, list(by_label))])]


def cells(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(titles, the texts of each row)."""
    full = next(row for row in found["rows"] if row["method"] == FULL.name)
    titles = ["method", "accuracy, %", "features moved, 10⁻³", "GFLOP / image", "of the full model's", "tokens left"]
    ahead = any(row["ahead_of_tome"] for row in found["rows"])
    timed = any(row["speedup"] for row in found["rows"])
    titles += ["ahead of tome, %"] * ahead + ["images / s", "speed-up"] * timed
    lines = []
    for row in found["rows"]:
        a, gap = row["accuracy"], row["ahead_of_tome"]
        between = f" ({100 * a['low']:.1f}–{100 * a['high']:.1f})" if a["low"] is not None else ""
        line = [
            row["label"], f"{100 * a['value']:.2f}{between}", _moved(row["moved"]), f"{row['flops'] / 1e9:.3f}",
            f"{row['flops'] / full['flops']:.3f}", f"{row['tokens']:.0f}",
        ]  # fmt: skip
        if ahead:
            sure = f" ({100 * gap['low']:+.2f} to {100 * gap['high']:+.2f})" if gap and gap["low"] is not None else ""
            line.append(f"{100 * gap['value']:+.2f}{sure}" if gap else "–")
        if timed:
            rate, faster = row["images_per_second"], row["speedup"]
            line += [f"{rate['median']:.0f}", f"{faster['median']:.2f}× ({faster['p5']:.2f}–{faster['p95']:.2f})"]
        lines.append(line)
    return titles, lines


def _moved(figure: dict[str, float] | None) -> str:
    if figure is None:
        return "–"
    between = f" ({1e3 * figure['low']:.3g}–{1e3 * figure['high']:.3g})" if figure["low"] is not None else ""
    return f"{1e3 * figure['value']:.3g}{between}"


def straightness(found: dict[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """(titles, rows, notes) of the functional linearity of each layer (ToFu Fig. 3), and the split it suggests."""
    layers = [list(values) for values in zip(*found["linearity"], strict=True)]
    lines = [
        [str(layer), f"{mean(values):.5f}", f"{min(values):.5f}–{max(values):.5f}"]
        for layer, values in enumerate(layers)
    ]
    d = best_split({layer: mean(values) for layer, values in enumerate(layers)})
    s = found["settings"]
    note = (
        f"Of each layer's {s.get('linearity_of', 'MLP')}, between the five patch tokens that would be fused first and "
        f"what they would join; {min(CALIBRATION, s['n'])} pictures, {s['classifiers']} classifiers, torch "
        f"{s['torch']}, commit {found['provenance']['commit'] or 'unknown'}. "
        f"By the error model of `depth_split='auto'`: d = {d}" + (", average in all layers." if d == 0 else ".")
    )
    return ["layer", "functional linearity", "over the classifiers"], lines, [note]


def curve(found: dict[str, Any]) -> str:
    """The same as a drawing (ToFu Fig. 3): the mean over the classifiers, and from the least to the most of them."""
    layers = torch.tensor(found["linearity"], dtype=torch.float64)  # [classifiers, layers]
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


def notes(found: dict[str, Any]) -> list[str]:
    """Without which the figures mean nothing."""
    s, p = found["settings"], found["provenance"]
    trained = s["model"]
    if s["seeds"][0] is not None:
        trained += f", {s['classifiers']} classifiers of seeds {', '.join(map(str, s['seeds']))}"
    lines = [
        f"{trained} · {s['n']} pictures of {s['classes']} classes ({s['data']}), {s['side']} px, batches of "
        f"{s['batch']} · {s.get('dtype', 'float32')} on {s['device']} · torch {s['torch']}, timm {s['timm']} · commit "
        f"{p['commit'] or 'unknown'}.",
        "Accuracy: mean over the classifiers, 95 % interval over classes. Features moved: 1 - cosine of what the last "
        "linear layer is shown to what the full model shows it, mean and interval alike. Operations: by torch's "
        "counter, matching included; tokens: of patches, before the last layer.",
    ]
    if any(row["speedup"] for row in found["rows"]):
        lines.append(f"Images / s, speed-up: medians of {s['rounds']} rounds in turns, 5th to 95th percentile.")
    if s["stress"]:
        tried = "those at which ToMe's patch tokens last to the last layer"  # as before they were told
        if s.get("tried"):
            tried = ", ".join(map(str, s["tried"]))
        lines.append(
            "Each method at the largest r at which its accuracy, to a tenth of a percent, is the full model's or "
            f"higher, of {tried}. {THRESHOLDS}"
        )
    elif any(row["method"].startswith("atm") and row["r"] is not None for row in found["rows"]):
        lines.append(THRESHOLDS)
    lines += ["", f"`{p['command']}`"]
    return lines


def plot(found: dict[str, Any]) -> str:
    """Accuracy, and how far features moved, against operations and, where there were rounds, images a second.

    The upper half is ToFu's Fig. 4.
    """
    full = next(row for row in found["rows"] if row["method"] == FULL.name)
    costs: list[tuple[str, Callable[[dict[str, Any]], float]]] = [("GFLOP / image", lambda row: row["flops"] / 1e9)]
    if full["images_per_second"]:
        costs.append(("images / s", lambda row: row["images_per_second"]["median"]))
    values: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("accuracy, %", lambda row: 100 * row["accuracy"]["value"]),
        ("features moved", lambda row: row["moved"]["value"]),
    ]
    names = list(dict.fromkeys(row["method"] for row in found["rows"] if row is not full))
    with plots.style():
        figure = Figure(figsize=(0.5 + 4.2 * len(costs), 6), layout="constrained")
        axes = figure.subplots(len(values), len(costs), sharey="row", sharex="col", squeeze=False)
        for line, (title, value) in zip(axes, values, strict=True):
            line[0].set_ylabel(title)
            for ax, (_, cost) in zip(line, costs, strict=True):
                plots.bare(ax)
                for i, name in enumerate(names):
                    own = sorted((row for row in found["rows"] if row["method"] == name), key=cost)
                    colour = COLOURS[i % len(COLOURS)]
                    ax.plot([cost(r) for r in own], [value(r) for r in own], "o-", color=colour, markersize=4,
                            linewidth=1.2, label=name)  # fmt: skip
        for ax, (_, cost) in zip(axes[0], costs, strict=True):
            ax.axhline(values[0][1](full), color="#60646c", linewidth=0.8, linestyle=":")
            ax.plot(cost(full), values[0][1](full), "k*", label="full")
        for ax, (title, _) in zip(axes[-1], costs, strict=True):
            ax.set_xlabel(title)
            ax.set_yscale("log")
        low, high = axes[0][0].get_ylim()
        if high - low < LEAST_SPAN:  # differences of a picture or two shall not fill the panel
            top = min(100.2, (low + high + LEAST_SPAN) / 2)
            axes[0][0].set_ylim(top - LEAST_SPAN, top)
        axes[0][-1].legend(frameon=False, fontsize=8)
        return plots.svg(figure)


@torch.no_grad()
def maps(bench: Bench, one: Classifier, methods: Sequence[Method]) -> Image.Image:
    """Pictures and, for each method, which of their patches are one token behind the last layer that fuses.

    A column for each picture, alone in its batch, from the one of which the last method leaves fewest tokens to the one
    of which it leaves most (ATM Fig. 7). Each token has its patches' mean colour and an outline; its number is below.
    """
    side, gap, foot = 2 * one.side, 6, 18
    model: Any = one.model
    columns: list[list[tuple[Tensor, int]]] = []  # of each, the picture and the methods' drawings, with their tokens
    for i in torch.linspace(0, bench.n - 1, SHOWN).long().tolist():
        picture = bench.data.pictures[i][0]
        shown = [(picture, 0)]
        for method in methods:
            seen: list[tuple[int, TokenMap]] = []
            if method.told is not None:
                with method.applied(model), host.watch(model) as seen:
                    model(picture.unsqueeze(0).to(next(model.parameters())))
            home = seen[-1][1].home[0].cpu() if seen else torch.arange(model.patch_embed.num_patches)
            shown.append((outlined(picture, home), int(home.max()) + 1))
        columns.append(shown)
    columns.sort(key=lambda shown: shown[-1][1])
    width, height = len(columns) * (side + gap) + gap, (1 + len(methods)) * (side + foot) + foot
    page = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column, shown in enumerate(columns):
        for line, (picture, tokens) in enumerate(shown):
            low, high = picture.amin(), picture.amax()
            pixels = ((picture - low) / (high - low).clamp_min(1e-6) * 255).byte().permute(1, 2, 0).numpy()
            x, y = gap + column * (side + gap), line * (side + foot)
            page.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
            if line:
                pen.text((x, y + side + 2), f"{methods[line - 1].label}: {tokens} tokens", "black", font)
    return page


def outlined(picture: Tensor, home: Tensor) -> Tensor:
    """The picture [3, H, W] with each group of patches in its mean colour and a line around it. home [N]: its group."""
    H = picture.shape[-1]
    across = math.isqrt(len(home))
    patch = H // across
    pixels = home.view(across, across).repeat_interleave(patch, 0).repeat_interleave(patch, 1)  # [H, H]
    flat = pixels.flatten()
    sums = torch.zeros(3, int(home.max()) + 1).index_add_(1, flat, picture[:, : len(pixels), : len(pixels)].flatten(1))
    drawn = (sums / torch.bincount(flat).clamp_min(1))[:, flat].view(3, *pixels.shape)
    edge = torch.zeros_like(pixels, dtype=torch.bool)
    edge[1:] |= pixels[1:] != pixels[:-1]
    edge[:, 1:] |= pixels[:, 1:] != pixels[:, :-1]
    return drawn.masked_fill(edge, float(picture.amin()))


if __name__ == "__main__":
    sys.exit(main())
