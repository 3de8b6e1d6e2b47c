"""Prompts with fixed seeds. `python -m eval.prompts NAME` prints a list, one prompt on each line."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tofu_sd.demo.models import EMBEDDED, SCENES, TEXTURES, DemoModel
from tofu_sd.demo.scene_classes import PROMPT
from tofu_sd.utils import did_you_mean

from .. import EvalError
from ..common.files import parse_json, read_text

IMAGENET_HASH = "0b0f9fee7c952f25"  # start of the SHA-256 of the 1000 names, joined by newlines
IMAGENET_IMAGES = 2  # of each class
MAX_ID_BYTES = 200  # bytes; file systems allow 255 with the ending
EXAMPLE = '{"prompt": "a fox", "id": "fox", "seed": 1}'


@dataclass(frozen=True)
class Request:
    """One image to generate. `id` names its files."""

    id: str
    prompt: str
    seed: int


def load_requests(name: str, first_seed: int = 0) -> list[Request]:
    """The requests of a list.

    Args:
        name: a known list, a .txt file (a prompt on each line) or a .jsonl file ({"prompt", "id"?, "seed"?}).
        first_seed: of the first image; the next ones follow.

    Raises:
        EvalError: an unknown list, or a file that cannot be read.
    """
    if name in KNOWN:
        return KNOWN[name](first_seed)
    path = Path(name)
    if path.suffix not in (".txt", ".jsonl"):
        raise EvalError(
            f"unknown prompts {name!r}{did_you_mean(name, KNOWN)}; known: {', '.join(KNOWN)}, or a .txt or .jsonl file"
        )
    try:
        text = read_text(path)
    except OSError as error:
        raise EvalError(f"cannot read the prompts {path.name!r}: {error.strerror}") from error
    except ValueError as error:
        raise EvalError(f"cannot read the prompts {path.name!r}: {error}") from error
    # not splitlines: JSON may hold other characters that it splits at
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise EvalError(f"the prompt file {path.name!r} is empty")
    if path.suffix == ".txt":
        return [
            Request(f"{i:04d}", _text(line, f"{path.name}, line {number}"), first_seed + i)
            for i, (number, line) in enumerate(lines)
        ]
    return _unique(
        [_from_json(line, i, first_seed, f"{path.name}, line {number}") for i, (number, line) in enumerate(lines)],
        path.name,
    )


def demo(model: DemoModel, first_seed: int = 0) -> list[Request]:
    """An embedded model's classes, one image each; the first N are a mixture for any N."""
    classes = model.classes
    order = [model.stride * i % len(classes) for i in range(len(classes))]
    return [Request(f"{i:04d}", classes[i].prompt, first_seed + i) for i in order]


def imagenet1k(first_seed: int = 0) -> list[Request]:
    """Two images of each ImageNet class, each with its own seed (the list has both Cardigan and cardigan)."""
    return [
        Request(f"{i:04d}_{k}", PROMPT.format(name), first_seed + IMAGENET_IMAGES * i + k)
        for i, name in enumerate(imagenet_names())
        for k in range(IMAGENET_IMAGES)
    ]


def imagenet_names() -> list[str]:
    """The 1000 class names as torchvision lists them, read without importing it."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise EvalError("prompts 'imagenet1k' need the class names of torchvision: pip install torchvision")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / "models" / "_meta.py").read_text(encoding="utf-8"))
    found = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_IMAGENET_CATEGORIES"
    ]
    names: list[str] = ast.literal_eval(found[0]) if found else []
    names_hash = hashlib.sha256("\n".join(names).encode()).hexdigest()[: len(IMAGENET_HASH)]
    if names_hash != IMAGENET_HASH:
        raise EvalError(
            f"torchvision's ImageNet names have the hash {names_hash}, not {IMAGENET_HASH}: they have changed"
        )
    return names


KNOWN: dict[str, Callable[[int], list[Request]]] = {
    "demo": partial(demo, SCENES),
    "textures": partial(demo, TEXTURES),
    "imagenet1k": imagenet1k,
}


def default_prompts(model: str) -> str:
    """The name of the list that --prompts is for a model by default: an embedded model's own."""
    return "textures" if model in EMBEDDED and EMBEDDED[model].content == TEXTURES.content else "demo"


def repeat(requests: list[Request], per_prompt: int, of: int) -> list[Request]:
    """Every request `per_prompt` times; the list itself comes first, so that a longer list continues a shorter one.

    Each repetition adds `of`, the length of the whole list, to the seeds.
    """
    again = [
        Request(f"{request.id}_{k}", request.prompt, request.seed + k * of)
        for k in range(1, per_prompt)
        for request in requests
    ]
    return _unique([*requests, *again], f"--per-prompt {per_prompt}")


def only(requests: Sequence[Request], ids: str) -> list[Request]:
    """The requests with these ids ("0007_1"), classes ("7", all its images) or ranges of classes ("20-29").

    The class of an image is the number that its id begins with. EvalError for ids that are not in the list.
    """
    numbers = [int(found[1]) if (found := re.match(r"(\d+)(_|$)", request.id)) else None for request in requests]
    wanted: set[str] = set()
    for part in (part.strip() for part in ids.split(",")):
        ends = [int(end) for end in part.split("-")] if re.fullmatch(r"\d+(-\d+)?", part) else []
        by_id = {request.id for request in requests if request.id == part}
        if not by_id and not (ends and ends[0] <= ends[-1] and set(ends) <= set(numbers)):
            known = sorted(request.id for request in requests)
            raise EvalError(
                f"--only {part}: there is no such image; ids go from {known[0]} to {known[-1]}, and classes are the "
                "numbers that they begin with"
            )
        classes = range(ends[0], ends[-1] + 1) if ends else ()
        wanted |= by_id or {request.id for request, n in zip(requests, numbers, strict=True) if n in classes}
    return [request for request in requests if request.id in wanted]


def select(requests: list[Request], per_prompt: int, ids: str | None, limit: int | None) -> list[Request]:
    """The requests of a run.

    Args:
        requests: the whole list.
        per_prompt: images of each prompt.
        ids: of `only`; None for all.
        limit: how many prompts of these; None for all.
    """
    whole = repeat(requests, per_prompt, len(requests))
    part = whole if ids is None else only(whole, ids)
    place = {request.id: i % len(requests) for i, request in enumerate(whole)}
    first = set(sorted({place[request.id] for request in part})[:limit])
    return [request for request in part if place[request.id] in first]


def requests_hash(requests: Sequence[Request]) -> str:
    """Hash of all ids, prompts and seeds of a list."""
    text = json.dumps([(r.id, r.prompt, r.seed) for r in requests])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _from_json(line: str, i: int, first_seed: int, where: str) -> Request:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise EvalError(f"{where}: {error}; give an object such as {EXAMPLE}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise EvalError(f"{where}: not an object with a text as 'prompt', such as {EXAMPLE}")
    if extra := sorted(set(row) - {"prompt", "id", "seed"}):
        raise EvalError(f"{where}: unknown field {extra[0]!r}; known: prompt, id, seed")
    seed = row.get("seed", first_seed + i)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= 2**62:
        raise EvalError(f"{where}: the seed is {seed!r}; it must be an integer from 0 to 2**62")
    name = row.get("id", f"{i:04d}")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise EvalError(f"{where}: the id is {name!r}; it must be a text or an integer")
    request = Request(str(name), _text(row["prompt"], where), seed)
    if not re.fullmatch(r"\w[\w.-]*", request.id) or len(request.id.encode()) > MAX_ID_BYTES:
        raise EvalError(
            f"{where}: the id {request.id[:MAX_ID_BYTES]!r} cannot name a file: use letters, digits, '_', '.' and "
            f"'-', {MAX_ID_BYTES} bytes at most"
        )
    return request


def _text(prompt: str, where: str) -> str:
    """The prompt; EvalError for characters that a CSV file cannot hold: lone surrogates, a lone return, NUL."""
    if found := re.search("[\ud800-\udfff\r\0]", prompt):
        raise EvalError(f"{where}: the prompt holds {found[0]!a}, which is no character of a text")
    return prompt


def _unique(requests: list[Request], source: str) -> list[Request]:
    seen: set[str] = set()
    for request in requests:
        if request.id.casefold() in seen:  # some file systems do not distinguish A and a
            raise EvalError(f"{source}: two prompts have the id {request.id!r}")
        seen.add(request.id.casefold())
    return requests
