"""The shapes of the JSON files that programs write and read again, as JSON Schemas. That of results.json is a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import EvalError
from .files import check_shape, parse_json, read_text
from .schema_changes import convert

TEXT = {"type": "string"}
MAYBE_TEXT = {"type": ["string", "null"]}
NUMBER = {"type": "number"}
MAYBE_NUMBER = {"type": ["number", "null"]}
COUNT = {"type": "integer", "minimum": 0}
NUMBERS = {"type": "array", "items": NUMBER, "minItems": 1}


def objects(**properties: dict[str, Any]) -> dict[str, Any]:
    """An object that has all of these properties, and perhaps others."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def or_null(shape: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [{"type": "null"}, shape]}


def rows_of(row: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": row, "minItems": 1}


INTERVAL = objects(value=NUMBER, low=NUMBER, high=NUMBER)
OPEN_INTERVAL = objects(value=NUMBER, low=MAYBE_NUMBER, high=MAYBE_NUMBER)
SPREAD = objects(median=NUMBER, p5=NUMBER, p95=NUMBER)

BENCH = objects(
    settings=objects(ratio=NUMBER, rounds=COUNT, dtype=TEXT, device=TEXT, torch=TEXT),
    provenance=objects(command=TEXT, commit=MAYBE_TEXT, packages={"type": "object"}),
    rows=rows_of({
        **objects(case=TEXT, scope={"enum": ["attention", "block", "unet"]}, batch=COUNT, backend=TEXT, method=TEXT,
                  key=TEXT, compiled={"type": "boolean"}, mode=MAYBE_TEXT),
        "anyOf": [
            objects(skipped=TEXT),
            objects(p20=NUMBER, p50=NUMBER, p80=NUMBER, samples=NUMBERS, speedup=or_null(INTERVAL),
                    share=or_null(INTERVAL), scratch_bytes=MAYBE_NUMBER),
        ],
    }),
)  # fmt: skip

CLASSIFY = objects(
    settings=objects(model=TEXT, classifiers=COUNT, n=COUNT, classes=COUNT, data=TEXT, side=COUNT, batch=COUNT,
                     device=TEXT, torch=TEXT, timm=TEXT, rounds=COUNT, stress={"type": "boolean"},
                     seeds={"type": "array", "items": {"type": ["integer", "null"]}, "minItems": 1}),
    provenance=objects(command=TEXT, commit=MAYBE_TEXT),
    linearity={"type": "array", "items": NUMBERS, "minItems": 1},
    rows=rows_of(
        objects(method=TEXT, label=TEXT, r=MAYBE_NUMBER, flops=NUMBER, tokens=NUMBER, accuracy=OPEN_INTERVAL,
                moved=or_null(OPEN_INTERVAL), ahead_of_tome=or_null(OPEN_INTERVAL),
                images_per_second=or_null(SPREAD), speedup=or_null(SPREAD))
    ),
)  # fmt: skip

CONDENSATION = objects(
    settings=objects(seeds={"type": "array", "items": COUNT, "minItems": 1}, samples=COUNT, depth=COUNT, clusters=TEXT,
                     n=COUNT, classes=COUNT, device=TEXT, torch=TEXT),
    provenance=objects(command=TEXT, commit=MAYBE_TEXT),
    rows=rows_of(
        objects(variant=TEXT, tables={"type": "array", "items": TEXT}, flops=NUMBER, tokens=NUMBER,
                accuracy={**OPEN_INTERVAL, **objects(value=NUMBER, low=MAYBE_NUMBER, high=MAYBE_NUMBER,
                                                     by_seed=NUMBERS)})
    ),
)  # fmt: skip

CLASSIFIER = objects(
    architecture={"type": "object"}, seed={"type": ["integer", "null"]}, classes={"type": "array", "items": TEXT}
)


def read(path: Path, shape: dict[str, Any], version: int, writer: str, name: str) -> dict[str, Any]:
    """The results in a file. EvalError for what is none, or is of another shape or version, naming `name`.

    writer: the command that writes such a file.
    """
    try:
        found = convert(parse_json(read_text(path)))
    except OSError as error:
        raise EvalError(f"{name} holds no results of {writer}: {error.strerror}") from error
    except ValueError as error:
        raise EvalError(f"{name} holds no results of {writer}: {error}") from error
    told = found.get("schema") if isinstance(found, dict) else None
    if told != version:
        raise EvalError(f"{name} holds no results of {writer}: its schema is {told!r}, this program reads {version}")
    check_shape(found, shape, name, writer)
    whole: dict[str, Any] = found
    return whole
