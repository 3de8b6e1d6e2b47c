"""Request × method -> a PNG and its record. Stopped and started again, it goes on where it was.

    OUT/settings.json           what holds for every picture in the folder
    OUT/<method's key>/<id>.png the picture, and beside it <id>.json, its record
    OUT/runs/<id>.json          the command and circumstances of each run that drew some of them

The batches are fixed by the list of requests, and the methods take turns on each: what one method's pictures met on
the machine, the others' met too. For speed that is too coarse, as a shared machine is another one a minute later: in a
few batches of each method the full model's denoiser runs beside it, step by step.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import math
import re
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard, get_type_hints

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn
from tqdm import tqdm

from tofu_sd.calibrate import synchronize

from . import EvalError
from .files import check_place, listed, png, read_json, shown, write, write_json
from .methods import FULL, Method
from .options import quiet_patches
from .prompts import Request
from .team import ALONE, Team

WARM_UP = 2  # pictures, at least, that a method draws at each size of batch before it is timed
TIMED = 10  # batches of each method that the full model's denoiser runs beside, which doubles what they take
DRAWING = 1  # to be raised when `draw` draws otherwise than before
RUNS = "runs"  # the folder of what is told of each run that drew pictures
# what a run writes beside its pictures
FILES = ("settings.json", "results.json", "per_image.csv", "report.html", "grid.png")
FOLDERS = (RUNS, "measured", "flops", "maps")
# settings that follow from others: where both differ, those say why
DERIVED = ("prompts_hash", "pipeline", "tokenizers")


@dataclass(frozen=True)
class Settings:
    """What must be the same for two pictures to be compared."""

    model: str
    pipeline: str  # classes and a hash of settings and weights
    prompts: str
    prompts_hash: str
    seed: int
    size: int
    steps: int
    guidance: float | None  # None: the pipeline's default
    batch: int
    device: str
    dtype: str
    attention: str  # the classes of the denoiser's attention processors
    torch: str
    diffusers: str
    transformers: str
    tokenizers: str | None = None  # a hash of how prompts are read; older runs do not tell it
    variant: str | None = None  # of the weights' files, as fp16; None: the plain ones


def claim(out: Path, settings: Settings) -> None:
    """Makes `out` a folder of pictures under these settings, or refuses one that holds pictures under others."""
    if refuse_others(out, settings):
        write_json(out / "settings.json", asdict(settings))


def refuse_others(out: Path, settings: Settings) -> bool:
    """EvalError for a folder that holds something else, naming what differs. True for one that holds nothing yet."""
    new = asdict(settings)
    check_place(out, "--out", folder=True)
    others = out.exists() and any(path.name[0] != "." for path in out.iterdir())  # dots: what is not whole yet
    settings_of(out)  # refuses what cannot be read
    old = read_json(out / "settings.json")  # after the look: another process may write them between the two
    if not isinstance(old, dict):
        if others:
            raise EvalError(f"--out {shown(out)}: the folder is not empty and holds no settings.json; give another")
        return True
    if name := differing(new, old):
        raise EvalError(
            f"--out {out.name}: its pictures were made with {name} {old.get(name)!r}, this run has "
            f"{new.get(name)!r}; give another folder or delete it"
        )
    return False


def differing(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The setting to name where two pictures cannot be compared; None where they can."""
    names = sorted(dict.fromkeys([*one, *other]), key=DERIVED.__contains__)
    return next((name for name in names if one.get(name) != other.get(name)), None)


def settings_of(out: Path, option: str = "--out") -> Settings | None:
    """Those of the pictures in a folder, which is an option's; None where none are told."""
    path = out / "settings.json"
    told = read_json(path)
    if path.exists() and not isinstance(told, dict):
        raise EvalError(f"{option} {out.name}: its settings.json cannot be read; put it right or give another folder")
    names = {field.name for field in fields(Settings)}
    if not isinstance(told, dict) or not told.keys() <= names:
        return None
    hints = get_type_hints(Settings)
    for name, value in told.items():
        number = isinstance(value, int) and hints[name] == float | None  # other programs write 3.0 as 3
        if isinstance(value, bool) or not (isinstance(value, hints[name]) or number):
            raise EvalError(f"{option} {out.name}: {name} in its settings.json is {value!r}; it must be {hints[name]}")
    try:
        return Settings(**told)
    except TypeError:  # of an older version, which had fewer
        return None


def identity(settings: Settings, method: Method) -> str:
    """A hash of everything but the request that decides a picture."""
    later = ("tokenizers", "variant")  # fields that older runs do not have
    decides = {name: value for name, value in asdict(settings).items() if name not in later or value is not None}
    told = json.dumps([DRAWING, decides, method.identity], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def record_of(out: Path, settings: Settings, method: Method, request: Request) -> dict[str, Any] | None:
    """The record of a finished picture; None where it is missing, damaged or was made otherwise."""
    record = read_json(out / method.key / f"{request.id}.json")
    if not _whole(record) or any(
        record.get(name) != value for name, value in _asked(settings, method, request).items()
    ):
        return None
    return record if _sha(out / method.key / f"{request.id}.png") == record.get("sha256") else None


def damaged(out: Path, method: Method, request: Request) -> bool:
    """Whether something lies where the picture should be, that is no picture with its record."""
    picture, told = (out / method.key / f"{request.id}.{ending}" for ending in ("png", "json"))
    if not picture.exists() and not told.exists():
        return False
    record = read_json(told)
    return not _whole(record) or _sha(picture) != record.get("sha256")


LONGEST = 1e9  # seconds; beyond them figures are not finite


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LONGEST


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_run(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-]+", value) is not None  # it names a file


NEEDED: dict[str, Callable[[Any], bool]] = {  # what figures come from, in every record
    "run": _is_run,
    "batch": lambda value: _is_count(value, 1),
    "timed": lambda value: isinstance(value, bool),
    "seconds": _is_seconds,
}
FURTHER: dict[str, Callable[[Any], bool]] = {  # where a record has it
    "denoising": _is_seconds,
    "full_denoising": _is_seconds,
    "peak_bytes": _is_count,
    "reserved_bytes": _is_count,
    "held_bytes": _is_count,
    "finite": lambda value: isinstance(value, bool),
    "drawn_with": lambda value: isinstance(value, list) and all(isinstance(id, str) for id in value),
}


def _whole(record: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a record says all that figures come from, in their types and ranges."""
    if not isinstance(record, dict) or not all(fits(record.get(name)) for name, fits in NEEDED.items()):
        return False
    if record.get("full_denoising") is not None and record.get("denoising") is None:
        return False
    return all(fits(record[name]) for name, fits in FURTHER.items() if record.get(name) is not None)


def runs(out: Path, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is told of the runs that drew the pictures of these records, the first run first, with how many of them."""
    counts = Counter(record["run"] for record in records)

    def told(run: str) -> dict[str, Any]:
        found = read_json(out / RUNS / f"{run}.json")
        return _readable(found) if isinstance(found, dict) else {}

    found = [{**told(run), "run": run, "pictures": n} for run, n in counts.items()]
    return sorted(found, key=lambda run: str(run.get("started", "")))


def _readable(told: dict[str, Any]) -> dict[str, Any]:
    """What is told of a run without entries of another type than a run has: the file can have been edited."""
    tables = {"runtime", "packages"}

    def fits(name: str, value: Any) -> bool:
        if name in tables:
            return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
        return value is None or isinstance(value, str)

    return {name: value for name, value in told.items() if fits(name, value)}


def _asked(settings: Settings, method: Method, request: Request) -> dict[str, Any]:
    """What the record of this picture has to say."""
    return {"prompt": request.prompt, "seed": request.seed + method.seed_shift, "made": identity(settings, method)}


def _sha(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def take_over(reference: Path, out: Path, settings: Settings, requests: Sequence[Request]) -> int:
    """Copies pictures of the full model from another run's folder: those that are what this run would draw.

    That is said by their content: their record's hash of settings, prompt and seed, and the picture's own. Returns how
    many are the other's, taken now or before.
    """
    theirs = 0
    for request in requests:
        record, own = (record_of(folder, settings, FULL, request) for folder in (reference, out))
        if record is not None and own is None:
            write(out / FULL.key / f"{request.id}.png", (reference / FULL.key / f"{request.id}.png").read_bytes())
            write_json(out / FULL.key / f"{request.id}.json", record)
            told = read_json(reference / RUNS / f"{record['run']}.json")
            if told is not None:
                write_json(out / RUNS / f"{record['run']}.json", told)
        theirs += record is not None and own in (None, record)
    return theirs


def refuse_obstacles(out: Path, methods: Sequence[Method], requests: Sequence[Request]) -> None:
    """EvalError where a folder is in the place of a file that a run writes, or a file in that of a folder.

    Else it is an error after hours, and the same one again where the run resumes.
    """
    place = f"--out {shown(out)}: the place of"
    for name in (*FOLDERS, *(method.key for method in methods)):
        check_place(out / name, place, folder=True)
    for name in FILES:
        check_place(out / name, place)
    for method in methods:
        for name in (f"{method.key}/{request.id}.{ending}" for request in requests for ending in ("png", "json")):
            if (out / name).is_dir():
                raise EvalError(f"--out {shown(out)}: {name} is a folder; remove it, a file belongs there")


def batches(requests: Sequence[Request], settings: Settings) -> list[Sequence[Request]]:
    """What is drawn at once: the same for every method, and for any number of processes."""
    return [requests[i : i + settings.batch] for i in range(0, len(requests), settings.batch)]


def generate(
    pipe: Any,
    requests: Sequence[Request],
    methods: Sequence[Method],
    settings: Settings,
    out: Path,
    team: Team = ALONE,
    repeats: int = 1,
    told: dict[str, Any] | None = None,
    quiet: bool = False,
) -> int:
    """Makes every picture of this process's share that is not there yet. Returns how many it made.

    repeats: a batch is drawn so many times, of which the fastest counts; the pictures are the same. told: of this run
    and its circumstances, to be kept beside its pictures. quiet: show no progress.
    """
    turns = [
        (batch, [m for m in methods if any(record_of(out, settings, m, request) is None for request in batch)])
        for batch in team.share(batches(requests, settings))
    ]
    turns = [(batch, due) for batch, due in turns if due]
    broken = [f"{m.key}/{r.id}.png" for batch, due in turns for m in due for r in batch if damaged(out, m, r)]
    if broken:
        print(f"damaged, drawn again: {listed(broken)}", file=sys.stderr)
    pictures, made = sum(len(batch) * len(due) for batch, due in turns), 0
    run = uuid.uuid4().hex[:12]
    beside, timed, warm, last = twin(denoiser_of(pipe)), Counter[str](), set[tuple[str, int]](), ""
    if pictures and told is not None:
        write_json(out / RUNS / f"{run}.json", told)
    with (
        quiet_patches(),
        tqdm(
            total=pictures,
            unit="img",
            disable=not pictures or quiet,
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 15,
        ) as progress,
    ):
        for batch, due in turns:
            ids = [request.id for request in batch]
            for method in due:
                progress.set_description(method.key, refresh=False)
                with method.applied(pipe):
                    if (method.key, len(batch)) not in warm:
                        for _ in range(math.ceil(WARM_UP / len(batch))):
                            draw(pipe, batch, method, settings, steps=settings.steps, beside=beside)
                        warm.add((method.key, len(batch)))
                    elif method.key != last:  # what a step after a switch lays out or fetches anew is not the method's
                        draw(pipe, batch, method, settings, steps=1, output="latent")
                    last = method.key
                    near = beside if timed[method.key] < TIMED / team.size else None
                    images, cost = draw(pipe, batch, method, settings, steps=settings.steps, beside=near)
                    for _ in range(repeats - 1):
                        again = draw(pipe, batch, method, settings, steps=settings.steps, beside=near)[1]
                        cost = fastest(cost, again)
                timed[method.key] += 1
                lacking = [r for r in batch if record_of(out, settings, method, r) is None]  # others were saved before
                for request, image in zip(batch, images, strict=True):
                    if request in lacking:
                        first = request is lacking[0]  # one time a batch
                        figures = {"run": run, "batch": len(batch), "drawn_with": ids, "timed": first, **cost}
                        _save(out, settings, method, request, image, figures)
                        made += 1
                progress.update(len(batch))
    return made


def fastest(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What is counted of two drawings of a batch: the faster, and of what ran beside them the fastest too."""
    first, second = sorted((one, other), key=lambda cost: cost["seconds"])
    if first["full_denoising"] in (None, first["denoising"]):  # it is none, or the full model's own
        return first
    return {**first, "full_denoising": min(first["full_denoising"], second["full_denoising"])}


def draw(
    pipe: Any,
    requests: Sequence[Request],
    method: Method,
    settings: Settings,
    *,
    steps: int,
    output: str = "np",
    beside: nn.Module | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The pictures, float [B, H, W, 3] in 0..1 or NaN, and what one cost: seconds, those in the denoiser, and on CUDA
    bytes beyond those held before.

    Every picture has a CPU generator of its own, so that it does not depend on its neighbours in the batch. output: as
    diffusers' output_type; 'latent' decodes nothing. beside: the full model's denoiser, called after each step of the
    method's for its time alone, which is neither in the seconds nor in peak_bytes; reserved_bytes are not told then.
    """
    device = torch.device(pipe.device)
    other = None if method is FULL else beside  # it is its own measure
    peaks: list[int] = []

    def aside(*args: Any, **kwargs: Any) -> None:
        synchronize(device)  # neither is launched while the other runs
        peaks.append(torch.cuda.max_memory_allocated(device) if cuda else 0)
        if other is not None:
            other(*args, **kwargs)
        synchronize(device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)

    generators = [torch.Generator("cpu").manual_seed(request.seed + method.seed_shift) for request in requests]
    guidance = {} if settings.guidance is None else {"guidance_scale": settings.guidance}
    cuda, held, reserved = device.type == "cuda", 0, 0
    if cuda:
        gc.collect()
        if beside is None:  # else it would be the method that asks for memory again, and the other that finds it
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    synchronize(device)
    with denoising(pipe, None if other is None else aside) as told:
        start = time.perf_counter()
        images = pipe(
            prompt=[request.prompt for request in requests],
            generator=generators,
            num_inference_steps=steps,
            height=settings.size,
            width=settings.size,
            output_type=output,
            **guidance,
        ).images
        synchronize(device)
        seconds = time.perf_counter() - start
        denoised, full_denoised = told()
        seconds -= full_denoised or 0
        if method is FULL and beside is not None:
            full_denoised = denoised
    return images, {
        "seconds": seconds / len(requests),
        "denoising": None if denoised is None else denoised / len(requests),
        "full_denoising": None if full_denoised is None else full_denoised / len(requests),
        "peak_bytes": max(*peaks, torch.cuda.max_memory_allocated(device), 0) - held if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) - reserved if cuda and beside is None else None,
        "held_bytes": held if cuda else None,
    }


def denoiser_of(pipe: Any) -> nn.Module | None:
    """What a pipeline calls in every step."""
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)


def twin(model: nn.Module | None) -> nn.Module | None:
    """A copy of a model that shares its weights, to be called while the model itself is patched."""
    if model is None:
        return None
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@contextmanager
def denoising(
    pipe: Any, beside: Callable[..., Any] | None = None
) -> Iterator[Callable[[], tuple[float | None, float | None]]]:
    """Inside, the pipeline's denoiser is timed, without waiting for a GPU; what it gives says how many seconds it ran,
    and how many `beside` did.

    beside: another denoiser, called on the same input after each step, of which the time alone is kept. To be asked
    once the device is idle. None on devices that keep no times, where `beside` is not called.
    """
    denoiser = denoiser_of(pipe)
    device = torch.device(pipe.device)
    if denoiser is None or device.type not in ("cpu", "cuda"):
        yield lambda: (None, None)
        return
    moments: list[Any] = []

    def note(*_: Any) -> None:
        if device.type == "cuda":
            with torch.cuda.device(device):  # it need not be the current one
                moments.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
                moments[-1].record(torch.cuda.current_stream(device))
        else:
            moments.append(time.perf_counter())

    def done(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        note()
        if beside is not None:
            beside(*args, **kwargs)
            note()

    def between(first: int, second: int) -> float:
        """Seconds from one moment of each step to another."""
        stride = 2 if beside is None else 3
        pairs = zip(moments[first::stride], moments[second::stride], strict=True)
        if device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        return sum(end - begin for begin, end in pairs)

    # before the method's own hooks, whose time is its own
    hooks = [
        denoiser.register_forward_pre_hook(note, prepend=True),
        denoiser.register_forward_hook(done, with_kwargs=True),
    ]
    try:
        yield lambda: (between(0, 1), None if beside is None else between(1, 2))
    finally:
        for hook in hooks:
            hook.remove()


def as_image(pixels: np.ndarray[Any, Any]) -> Image.Image:
    """A picture [H, W, 3] in 0..1 as diffusers makes one of it; NaN is black."""
    image: Image.Image = VaeImageProcessor.numpy_to_pil(np.nan_to_num(pixels))[0]
    return image


def _save(
    out: Path,
    settings: Settings,
    method: Method,
    request: Request,
    pixels: np.ndarray[Any, Any],
    figures: dict[str, Any],
) -> None:
    """The picture first, its record after it: a record says that the picture is whole."""
    content = png(as_image(pixels))
    write(out / method.key / f"{request.id}.png", content)
    write_json(
        out / method.key / f"{request.id}.json",
        {
            "id": request.id,
            **_asked(settings, method, request),
            "sha256": hashlib.sha256(content).hexdigest(),
            "finite": bool(np.isfinite(pixels).all()),
            **figures,
        },
    )
