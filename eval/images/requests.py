"""Prompts with fixed seeds. `python -m eval.prompts NAME` prints a list, one prompt a line."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tofu_sd.demo.scene_classes import PROMPT
from tofu_sd.utils import did_you_mean

from .. import EvalError
from ..common.files import parse_json, read_text

IMAGENET_HASH = "0b0f9fee7c952f25"  # start of the SHA-256 of the 1000 names, joined by newlines
IMAGENET_IMAGES = 2  # of each class
LONGEST_ID = 200  # bytes; file systems allow 255 with the ending
EXAMPLE = '{"prompt": "a fox", "id": "fox", "seed": 1}'


@dataclass(frozen=True)
class Request:
    """One picture to be made. `id` names its files."""

    id: str
    prompt: str
    seed: int


def load(name: str, seed0: int = 0) -> list[Request]:
    """The requests of a known set, of a .txt file (a prompt a line) or a .jsonl file ({"prompt", "id"?, "seed"?})."""
    if name in KNOWN:
        return KNOWN[name](seed0)
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
    # JSON may hold what splitlines takes for the end of a line
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise EvalError(f"the prompt file {path.name!r} is empty")
    if path.suffix == ".txt":
        return [
            Request(f"{i:04d}", _text(line, f"{path.name}, line {number}"), seed0 + i)
            for i, (number, line) in enumerate(lines)
        ]
    return _unique(
        [_from_json(line, i, seed0, f"{path.name}, line {number}") for i, (number, line) in enumerate(lines)], path.name
    )


def demo(seed0: int = 0) -> list[Request]:
    """The embedded model's 96 classes, one picture each.

    Neighbours in CLASSES differ in little, so the list strides through them: any first N are a fair mixture.
    """
    from tofu_sd.demo.scene_classes import CLASSES

    order = [37 * i % len(CLASSES) for i in range(len(CLASSES))]  # 37 has no factor in common with 96
    return [Request(f"{i:04d}", CLASSES[i].prompt, seed0 + i) for i in order]


def imagenet1k(seed0: int = 0) -> list[Request]:
    """Two pictures of each ImageNet class, under seeds of their own (the list has both Cardigan and cardigan)."""
    return [
        Request(f"{i:04d}_{k}", PROMPT.format(name), seed0 + IMAGENET_IMAGES * i + k)
        for i, name in enumerate(imagenet_names())
        for k in range(IMAGENET_IMAGES)
    ]


def imagenet_names() -> list[str]:
    """The 1000 class names as torchvision lists them, read without importing it."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise EvalError("prompts 'imagenet1k' take the class names from torchvision: pip install torchvision")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / "models" / "_meta.py").read_text(encoding="utf-8"))
    found = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_IMAGENET_CATEGORIES"
    ]
    names: list[str] = ast.literal_eval(found[0]) if found else []
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[: len(IMAGENET_HASH)]
    if digest != IMAGENET_HASH:
        raise EvalError(f"torchvision's ImageNet names have the hash {digest}, not {IMAGENET_HASH}: they have changed")
    return names


KNOWN: dict[str, Callable[[int], list[Request]]] = {"demo": demo, "imagenet1k": imagenet1k}


def several(requests: list[Request], per_prompt: int, of: int) -> list[Request]:
    """Every request so many times; the first time as it was, so that a list asked for once begins a longer one.

    Seeds count on by `of`, the length of the whole list, beyond those that `load` gives it.
    """
    again = [
        Request(f"{request.id}_{k}", request.prompt, request.seed + k * of)
        for k in range(1, per_prompt)
        for request in requests
    ]
    return _unique([*requests, *again], f"--per-prompt {per_prompt}")


def only(requests: Sequence[Request], asked: str) -> list[Request]:
    """Those of a list that are asked for by id ("0007_1"), by class ("7", all its pictures) or by a range of classes.

    A picture's class is the number its id begins with. EvalError for what is not in the list.
    """
    numbers = [int(found[1]) if (found := re.match(r"(\d+)(_|$)", request.id)) else None for request in requests]
    wanted: set[str] = set()
    for part in (part.strip() for part in asked.split(",")):
        ends = [int(end) for end in part.split("-")] if re.fullmatch(r"\d+(-\d+)?", part) else []
        by_id = {request.id for request in requests if request.id == part}
        if not by_id and not (ends and ends[0] <= ends[-1] and set(ends) <= set(numbers)):
            ids = sorted(request.id for request in requests)
            raise EvalError(
                f"--only {part}: there is no such picture; the ids go from {ids[0]} to {ids[-1]}, and classes are the "
                "numbers they begin with"
            )
        classes = range(ends[0], ends[-1] + 1) if ends else ()
        wanted |= by_id or {request.id for request, n in zip(requests, numbers, strict=True) if n in classes}
    return [request for request in requests if request.id in wanted]


def chosen(requests: list[Request], per_prompt: int, asked: str | None, limit: int | None) -> list[Request]:
    """What of a list is drawn, `per_prompt` times each: all of it or what is asked for, as `only` reads it; of that the
    pictures of the first `limit` prompts.
    """  # fmt: skip
    whole = several(requests, per_prompt, len(requests))
    part = whole if asked is None else only(whole, asked)
    place = {request.id: i % len(requests) for i, request in enumerate(whole)}
    first = set(sorted({place[request.id] for request in part})[:limit])
    return [request for request in part if place[request.id] in first]


def digest(requests: Sequence[Request]) -> str:
    """Says whether two lists ask for the same pictures."""
    text = json.dumps([(r.id, r.prompt, r.seed) for r in requests])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _from_json(line: str, i: int, seed0: int, where: str) -> Request:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise EvalError(f"{where}: {error}; it takes an object such as {EXAMPLE}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise EvalError(f"{where}: not an object with a 'prompt' that is a text, such as {EXAMPLE}")
    if extra := sorted(set(row) - {"prompt", "id", "seed"}):
        raise EvalError(f"{where}: unknown field {extra[0]!r}; known: prompt, id, seed")
    seed = row.get("seed", seed0 + i)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= 2**62:
        raise EvalError(f"{where}: the seed is {seed!r}; it must be a whole number from 0 to 2**62")
    name = row.get("id", f"{i:04d}")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise EvalError(f"{where}: the id is {name!r}; it must be a text or an integer")
    request = Request(str(name), _text(row["prompt"], where), seed)
    if not re.fullmatch(r"\w[\w.-]*", request.id) or len(request.id.encode()) > LONGEST_ID:
        raise EvalError(
            f"{where}: the id {request.id[:LONGEST_ID]!r} cannot name a file: it takes letters, digits, '_', '.' and "
            f"'-', {LONGEST_ID} bytes at most"
        )
    return request


def _text(prompt: str, where: str) -> str:
    """The prompt; EvalError for characters that a table of results cannot hold: half of a pair, a lone return, NUL."""
    if found := re.search("[\ud800-\udfff\r\0]", prompt):
        raise EvalError(f"{where}: the prompt holds {found[0]!a}, which is no character of a text")
    return prompt


def _unique(requests: list[Request], source: str) -> list[Request]:
    seen: set[str] = set()
    for request in requests:
        if request.id.casefold() in seen:  # some disks take A and a for one name
            raise EvalError(f"{source}: two prompts have the id {request.id!r}")
        seen.add(request.id.casefold())
    return requests
