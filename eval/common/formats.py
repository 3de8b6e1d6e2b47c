"""JSON Schemas of the result files of commands, except results.json, whose schema is a file."""

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
    """Schema of an object with all of these properties, and possibly others."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def or_null(shape: dict[str, Any]) -> dict[str, Any]:
    """Schema of null or this shape."""
    return {"anyOf": [{"type": "null"}, shape]}


def rows_of(row: dict[str, Any]) -> dict[str, Any]:
    """Schema of a list of at least one such row."""
    return {"type": "array", "items": row, "minItems": 1}


INTERVAL = objects(value=NUMBER, low=NUMBER, high=NUMBER)
MAYBE_INTERVAL = objects(value=NUMBER, low=MAYBE_NUMBER, high=MAYBE_NUMBER)
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
        objects(method=TEXT, label=TEXT, r=MAYBE_NUMBER, flops=NUMBER, tokens=NUMBER, accuracy=MAYBE_INTERVAL,
                feature_shift=or_null(MAYBE_INTERVAL), ahead_of_tome=or_null(MAYBE_INTERVAL),
                images_per_second=or_null(SPREAD), speedup=or_null(SPREAD))
    ),
)  # fmt: skip

CONDENSATION = objects(
    settings=objects(seeds={"type": "array", "items": COUNT, "minItems": 1}, samples=COUNT, depth=COUNT, clusters=TEXT,
                     n=COUNT, classes=COUNT, device=TEXT, torch=TEXT),
    provenance=objects(command=TEXT, commit=MAYBE_TEXT),
    rows=rows_of(
        objects(variant=TEXT, tables={"type": "array", "items": TEXT}, flops=NUMBER, tokens=NUMBER,
                accuracy={**MAYBE_INTERVAL, **objects(value=NUMBER, low=MAYBE_NUMBER, high=MAYBE_NUMBER,
                                                     by_seed=NUMBERS)})
    ),
)  # fmt: skip

VALIDITY = objects(
    settings=objects(model=TEXT, n=COUNT, steps=COUNT, size=COUNT, device=TEXT, dtype=TEXT, torch=TEXT),
    provenance=objects(command=TEXT, commit=MAYBE_TEXT),
    rows=rows_of(objects(name=TEXT, measured=TEXT, required=TEXT, holds={"type": "boolean"})),
)

CLASSIFIER = objects(
    architecture={"type": "object"}, seed={"type": ["integer", "null"]}, classes={"type": "array", "items": TEXT}
)


def read(path: Path, shape: dict[str, Any], version: int, writer: str, name: str) -> dict[str, Any]:
    """Reads a result file, converted to the names of this version.

    Args:
        path: the file.
        shape: its schema.
        version: its value of `schema`, once converted.
        writer: the command that writes such a file, for messages.
        name: of the file, for messages.

    Raises:
        EvalError: it is missing, or of another shape or version.
    """
    try:
        found = convert(parse_json(read_text(path)))
    except OSError as error:
        raise EvalError(f"{name} holds no results of {writer}: {error.strerror}") from error
    except ValueError as error:
        raise EvalError(f"{name} holds no results of {writer}: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != version:
        raise EvalError(f"{name} holds no results of {writer}: its schema is {schema!r}, this program reads {version}")
    check_shape(found, shape, name, writer)
    results: dict[str, Any] = found
    return results
