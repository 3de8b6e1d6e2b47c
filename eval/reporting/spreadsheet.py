"""CSV that spreadsheets open without running it, and that is read again after they saved it."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FORMULA = re.compile(r"'*[=+\-@\t\r]")  # what a cell begins with that a spreadsheet runs, or one that was made safe
NEGATIVE = re.compile(r"-(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|-inf", re.IGNORECASE)


def to_csv(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table with a line of names. Texts that a spreadsheet would take for formulas begin with an apostrophe."""
    return "".join(map(_line, [names, *([safe(row.get(name, "")) for name in names] for row in rows)]))


def _line(cells: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)  # it quotes cells with characters of the line's end alone
    return text.getvalue().removesuffix("\r\n") + "\n"


def from_csv(text: str) -> list[dict[str, str]]:
    """The rows of such a table, as they were given. ValueError for what is no table."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names, *rows = list(lines)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"it is no table of comma-separated values ({error})") from error
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} cells and the first row {len(names)}; save it with commas")
    return [{name: plain(cell) for name, cell in zip(names, row, strict=True)} for row in rows]


def safe(value: Any) -> Any:
    """A cell that no spreadsheet runs: with an apostrophe before what begins as a formula does."""
    harmless = not isinstance(value, str) or not FORMULA.match(value) or NEGATIVE.fullmatch(value)
    return value if harmless else f"'{value}"


def plain(cell: str) -> str:
    """The text of which `safe` made a cell."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def digest(text: str) -> str:
    """The SHA-256 of what a table holds, whatever quotes it was saved with."""
    rows = csv.reader(io.StringIO(text, newline=""))
    return hashlib.sha256("".join(map(_line, rows)).encode()).hexdigest()
