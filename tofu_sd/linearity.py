"""Functional linearity (ToFu, WACV 2024, Eq. 8): how straight a layer carries the way from one token to another.

Where it is low, the average of two tokens comes out far from both, and pruning is the better way to fuse; where it is
near 1, averaging loses little. `python -m tofu_sd.linearity` measures it in every block of a model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .match import bipartite_soft_matching, partition
from .patch import Site, fusions, get_argument, patch_of
from .policy import TokenFusion

POINTS = 11  # N of Eq. 8
PAIRS = 256  # of each sample, at most
PROMPTS = ("a photograph of a red fox in the snow", "a city street at night, oil painting", "a bowl of fruit", "")
STEPS = 4
ROLES = ("attn", "mlp")


def functional_linearity(f: Callable[[Tensor], Tensor], x1: Tensor, x2: Tensor, points: int = POINTS) -> Tensor:
    """FL(f, x1, x2) of each pair of tokens x1, x2 [..., C]: [...], in 0..1; 1 where f is linear between the two.

    f: takes tokens [..., C] each for itself, with one more axis of `points` before the last, to [..., C']. The way from
    f(x1) to f(x2) along the line from x1 to x2 is measured in points - 1 pieces. 1 too where the way has no length.
    """
    if points < 2:
        raise ValueError(f"points is {points}; a way needs its two ends, so at least 2")
    t = torch.linspace(0, 1, points, device=x1.device, dtype=x1.dtype).unsqueeze(-1)
    # in this form equal tokens stay where they are
    ways = f(x1.unsqueeze(-2) + t * (x2 - x1).unsqueeze(-2)).float()
    direct = (ways[..., -1, :] - ways[..., 0, :]).norm(dim=-1)
    along = ways.diff(dim=-2).norm(dim=-1).sum(dim=-1)
    return torch.where(along > 0, direct / along.clamp_min(torch.finfo(along.dtype).tiny), torch.ones_like(along))


@dataclass(frozen=True)
class Linearity:
    """The mean FL of a layer over the matched pairs of one call of the model.

    block: its name. depth: its place among all blocks. role: 'attn' or 'mlp'. call: of the model, from 0. timestep: of
    the schedule; None in a classifier. pairs: how many.
    """

    block: str
    depth: int
    role: str
    call: int
    timestep: float | None
    value: float
    pairs: int


@contextmanager
def measuring(model: Any, fusion: TokenFusion | None = None, pairs: int = PAIRS) -> Iterator[list[Linearity]]:
    """`with measuring(pipe) as found: pipe(...)` measures every block's attention and feed-forward at every step.

    model: a pipeline or UNet of diffusers; ValueError for one with a patch. fusion: how tokens are matched. pairs: of
    each sample, spread evenly over those that would be fused. Attention is taken as a function of a query, among the
    keys and values of the whole map: what a token's own key adds to that is one of hundreds. Half precision is too
    coarse for ways between like tokens, so layers are run in float32 for it.
    """
    from .hosts import diffusers

    unet, _ = diffusers.unwrap(model)
    fusion = fusion or TokenFusion()
    found: list[Linearity] = []
    if patch_of(unet) is not None:
        raise ValueError(f"{type(unet).__name__} is patched: linearity is the model's own, remove_patch comes first")
    begin = _Begin()
    handles = [unet.register_forward_pre_hook(begin, with_kwargs=True)]
    for site in diffusers.find_sites(unet):
        probe = _Probe(site, fusion, pairs, begin, found)
        handles.append(site.canvas.register_forward_pre_hook(probe.see_size, with_kwargs=True))
        handles.append(site.parts["norm"].register_forward_pre_hook(probe.match))
        handles += [
            site.parts[role].register_forward_pre_hook(probe.measurer(role), with_kwargs=True)
            for role in ROLES
            if role in site.parts
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Begin:
    """Pre-hook of the model: which call it is, and of which timestep."""

    def __init__(self) -> None:
        self.call = -1
        self.timestep = float("nan")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call += 1
        timestep = get_argument(args, kwargs, 1, "timestep", "timesteps")
        self.timestep = float(torch.as_tensor(timestep).flatten()[0])


class _Probe:
    """The pairs of one block in one call, and the FL of its layers between them."""

    def __init__(self, site: Site, fusion: TokenFusion, pairs: int, begin: _Begin, found: list[Linearity]):
        self.site, self.fusion, self.pairs, self.begin, self.found = site, fusion, pairs, begin, found
        self.size = (0, 0)
        self.ends: tuple[Tensor, Tensor] | None = None
        self.busy = False

    def see_size(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h, w = get_argument(args, kwargs, 0, "hidden_states", "x").shape[-2:]
        self.size = int(h), int(w)

    @torch.no_grad()
    def match(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        (h, w), leaving = self.size, self.fusion.leaving(*self.size)
        self.ends = None
        if leaving:
            parts = partition(h, w, self.fusion.sx, self.fusion.sy, args[0].device)
            map = bipartite_soft_matching(args[0], parts, leaving)
            home = map.kept.gather(1, map.home)  # of each token, the token that stands for it
            gone = home != torch.arange(h * w, device=home.device)
            token = gone.nonzero()[:, 1].view(len(home), leaving)
            some = torch.linspace(0, leaving - 1, min(self.pairs, leaving), device=home.device).long()
            token = token[:, some]
            self.ends = token, home.gather(1, token)

    def measurer(self, role: str) -> Callable[..., None]:
        @torch.no_grad()
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = get_argument(args, kwargs, 0, "hidden_states", "x")
            if self.ends is None or self.busy or x.ndim != 3:
                return
            x = x.float()
            x1, x2 = (x.gather(1, token.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for token in self.ends)
            weights = {name: weight.float() for name, weight in module.named_parameters()}

            def layer(ways: Tensor) -> Tensor:
                tokens = ways.flatten(1, 2)  # [B, pairs * points, C]
                told = {"encoder_hidden_states": x} if role == "attn" else {}
                out: Tensor = functional_call(module, weights, (tokens,), told)
                return out.view(*ways.shape[:3], -1)

            self.busy = True  # the layer's hooks are called again
            try:
                value = functional_linearity(layer, x1, x2)
            finally:
                self.busy = False
            self.found.append(
                Linearity(self.site.name, self.site.depth, role, self.begin.call, self.begin.timestep,
                          value.mean().item(), value.numel())
            )  # fmt: skip

        return measure


def by_depth(found: Sequence[Linearity], roles: Sequence[str]) -> dict[int, float]:
    """The mean FL of each block's layers, over all calls."""
    depths = sorted({one.depth for one in found})
    values = {depth: [one.value for one in found if one.depth == depth and one.role in roles] for depth in depths}
    return {depth: mean(value) for depth, value in values.items() if value}


def best_split(linearity: Mapping[int, float]) -> int:
    """d: the depth from which on blocks average, by the FL of each block that is fused, given by its depth.

    Of a pair whose outputs lie D apart, pruning makes one wrong by D. The average comes out wrong by half its way to
    each, if it lies half-way, and ways are D / FL long: squared and summed, D² against D² / (2 FL²). So averaging is
    the better one above an FL of 1/√2, and d the depth that makes the sum over all blocks least, the lowest if many do.
    """
    depths = sorted(linearity)

    def error(d: int) -> float:
        return sum(1.0 if depth < d else 0.5 / max(linearity[depth], 1e-6) ** 2 for depth in depths)

    return min([0, *(depth + 1 for depth in depths)], key=error)


def measure_split(pipe: Any, sites: Sequence[Site], fusion: TokenFusion) -> int:
    """d for a pipeline: from the FL of the layers that `fusion` fuses, in a few steps of a few small pictures.

    ValueError for what draws no pictures from prompts alone.
    """
    what = "depth_split is 'auto', which draws a few steps from prompts and so takes a text-to-image pipeline"
    if not hasattr(pipe, "unet"):
        raise ValueError(
            f"{what}; this is a {type(pipe).__name__}: give a number, as `measuring` and `best_split` find"
        )
    from diffusers import AutoPipelineForText2Image

    try:
        drawing = AutoPipelineForText2Image.from_pipe(pipe)
    except ValueError as error:
        raise ValueError(f"{what}; {type(pipe).__name__} cannot be made one: give a number") from error
    drawing.set_progress_bar_config(disable=True)
    fused = {site.depth for site, _ in fusions(sites, replace(fusion, depth_split=0))}
    with measuring(drawing, replace(fusion, depth_split=0)) as found:
        generator = torch.Generator().manual_seed(0)
        drawing(list(PROMPTS), num_inference_steps=STEPS, generator=generator, output_type="latent")
    roles = [role for role in fusion.layers if role in ROLES]
    return best_split({d: value for d, value in by_depth(found, roles).items() if d in fused})


# --- python -m tofu_sd.linearity --------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python -m tofu_sd.linearity
      the model that comes with the package
  python -m tofu_sd.linearity --model stabilityai/stable-diffusion-2-1-base --steps 20 --out linearity.json
      another one, every measurement kept
  python -m tofu_sd.linearity --model vit_small_patch16_224.augreg_in1k --pictures imagenet/val
      a classifier of timm's (ToFu Fig. 3)
  python -m tofu_sd.linearity --table linearity.json --plot linearity.svg
      its table again, and its curve over the depth
"""
SHOWN = 64  # pictures of a classifier, at most
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TITLES = {"attn": "attention", "mlp": "feed-forward"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m tofu_sd.linearity",
        description="Functional linearity (ToFu Eq. 8) of every block of a model, on the pairs of tokens that would be "
        "fused, and the depth from which on to average.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", default="demo", help="demo, what from_pretrained takes, or a classifier of timm's (demo)")
    drawn = p.add_argument_group("of a text-to-image model")
    drawn.add_argument("--prompt", action="append", help="may be given more than once; four of its own if not")
    drawn.add_argument("--steps", type=int, help=f"of the sampling ({STEPS})")
    drawn.add_argument("--ratio", type=float, help="share of tokens that would be fused away (0.5)")
    drawn.add_argument("--seed", type=int, help="of the pictures (0)")
    shown = p.add_argument_group("of a classifier")
    shown.add_argument("--pictures", metavar="DIR", help=f"a folder to show it pictures of, {SHOWN} at most")
    p.add_argument("--out", metavar="FILE", help="keep every measurement as JSON")
    p.add_argument("--table", metavar="FILE", help="measure nothing; print the table of such a file")
    p.add_argument("--plot", metavar="FILE", help="draw it over the depth, as SVG or PNG (needs matplotlib)")
    return p


@dataclass(frozen=True)
class Curve:
    """A model's linearity, and how it was measured. fused: the depths of the blocks that are fused by default.

    prompts, steps, ratio, seed: of what a text-to-image model drew. pictures: that a classifier was shown.
    """

    model: str
    versions: str
    fused: list[int]
    measured: list[Linearity]
    prompts: list[str] = field(default_factory=list)
    steps: int = 0
    ratio: float = 0.0
    seed: int = 0
    pictures: int = 0

    @property
    def roles(self) -> list[str]:
        return [role for role in ROLES if any(one.role == role for one in self.measured)]

    @property
    def deciding(self) -> str:
        """The role of what works on tokens that a block has fused: attention, and in a classifier the MLP behind it."""
        return "mlp" if self.pictures else "attn"

    @property
    def depth_split(self) -> int:
        own = by_depth(self.measured, [self.deciding])
        return best_split({depth: own[depth] for depth in self.fused})

    @classmethod
    def read(cls, file: str) -> Curve:
        """ValueError for a file that holds none."""
        try:
            told = json.loads(Path(file).read_text(encoding="utf-8"))
            curve = cls(**{**told, "measured": [Linearity(**one) for one in told["measured"]]})
            if curve.fused and set(curve.fused).issubset(by_depth(curve.measured, [curve.deciding])):
                return curve
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise ValueError(f"{Path(file).name} holds no measurements of this program")

    def __str__(self) -> str:
        """A line for each block: the mean over the calls of each layer's FL, and from the least to the most of them."""
        roles = self.roles
        lines = [f"| depth | block | {' | '.join(TITLES[role] for role in roles)} |", "|--:|---|" + "--:|" * len(roles)]
        for depth, name in sorted({(one.depth, one.block) for one in self.measured}):
            cells = []
            for role in roles:
                values = [one.value for one in self.measured if (one.depth, one.role) == (depth, role)]
                cells.append(f"{mean(values):.4f} ({min(values):.4f}–{max(values):.4f})" if values else "–")
            mark = " \\*" if depth in self.fused and len(self.fused) < len({one.depth for one in self.measured}) else ""
            lines.append(f"| {depth}{mark} | {name.replace('.transformer_blocks', '')} | {' | '.join(cells)} |")
        split = self.depth_split
        average = "" if split else ": average everywhere."
        if self.pictures:
            how = f"{self.pictures} pictures, pairs of patch tokens that would be fused first; means over the pictures"
            fused = "layers"
        else:
            how = (
                f"{len(self.prompts)} pictures, {self.steps} steps, seed {self.seed}, pairs at a ratio of "
                f"{self.ratio:g}; means over the steps"
            )
            fused = "fused blocks"
        marked = " \\* fused by default." if any(" \\* |" in line for line in lines) else ""
        return "\n".join([
            *lines, "",
            f"{self.model}: {how}, and the least and the most; {self.versions}.{marked}",
            f"depth_split={split}, by the {TITLES[self.deciding]} of the {fused}{average}",
        ])  # fmt: skip


def measure(model: str, prompts: Sequence[str], steps: int, ratio: float, seed: int) -> Curve:
    """The curve of a text-to-image model, by its name, over a sampling of a picture of each prompt."""
    import diffusers

    from .hosts.diffusers import find_sites, unwrap

    fusion = TokenFusion(ratio, depth_split=0)
    if not ratio:
        raise ValueError("ratio is 0; pairs are measured that would be fused, so it must be above 0")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    pipe = _load(model)
    fused = [site.depth for site, _ in fusions(find_sites(unwrap(pipe)[0]), fusion)]
    with measuring(pipe, fusion) as found:
        generator = torch.Generator().manual_seed(seed)
        pipe(list(prompts), num_inference_steps=steps, generator=generator, output_type="latent")
    if not found:
        raise ValueError(f"ratio is {ratio:g}; at it no token of this size would be fused")
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return Curve(model, versions, fused, found, list(prompts), steps, ratio, seed)


def measure_classifier(name: str, folder: str) -> Curve:
    """The curve of a classifier of timm's, with its pretrained weights, over pictures spread evenly over a folder."""
    import timm
    from PIL import Image

    from .hosts import timm as host

    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in ENDINGS)
    if not files:
        raise ValueError(f"there are no pictures in {folder!r}; looked for {', '.join(ENDINGS)}")
    files = [files[i] for i in sorted({round(i) for i in torch.linspace(0, len(files) - 1, SHOWN).tolist()})]
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    found: list[Linearity] = []
    for call, file in enumerate(files):
        with Image.open(file) as image:
            shown = transform(image.convert("RGB")).unsqueeze(0)
        found += [
            Linearity(f"blocks.{depth}", depth, role, call, None, value, host.PAIRS)
            for role in ROLES
            for depth, value in enumerate(host.linearity(model, shown, role=role)[:, 0].tolist())
        ]
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    return Curve(name, versions, list(range(len(host.find_blocks(model)))), found, pictures=len(files))


def _load(model: str) -> Any:
    if model == "demo":
        from . import demo

        return demo.load()
    from diffusers import AutoPipelineForText2Image

    return AutoPipelineForText2Image.from_pretrained(model)


def plot(curve: Curve, file: str) -> None:
    """The curve over the depth (ToFu Fig. 3), a line for each layer with the range over the calls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    for role in curve.roles:
        line = by_depth(curve.measured, [role])
        ends = [[one.value for one in curve.measured if (one.depth, one.role) == (d, role)] for d in line]
        ax.plot(list(line), list(line.values()), marker="o", label=TITLES[role])
        ax.fill_between(list(line), [min(end) for end in ends], [max(end) for end in ends], alpha=0.15)
    ax.set_xlabel("depth of the block")
    ax.set_ylabel("functional linearity")
    ax.legend(frameon=False)
    figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        curve = Curve.read(options.table) if options.table else _measured(options)
        if options.out:
            Path(options.out).write_text(json.dumps(asdict(curve), indent=1) + "\n", encoding="utf-8")
        if options.plot:
            plot(curve, options.plot)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:  # timm raises RuntimeError for names
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(curve)
    return 0


def _measured(options: argparse.Namespace) -> Curve:
    """ValueError for options that say nothing of the model that is asked for."""
    drawn: dict[str, Any] = {"steps": STEPS, "ratio": 0.5, "seed": 0}
    given = [name for name in ("prompt", *drawn) if getattr(options, name) is not None]
    if options.pictures is not None:
        if given:
            raise ValueError(f"--{given[0]} is of text-to-image models, and --pictures of classifiers")
        return measure_classifier(options.model, options.pictures)
    if _of_timm(options.model):
        raise ValueError(f"{options.model} is a classifier of timm's, which has to be shown some: --pictures DIR")
    told = {name: usual if getattr(options, name) is None else getattr(options, name) for name, usual in drawn.items()}
    return measure(options.model, options.prompt or PROMPTS, **told)


def _of_timm(model: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return bool(timm.is_model(model))


if __name__ == "__main__":
    sys.exit(main())
