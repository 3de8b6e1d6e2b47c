"""Writes and reads results.json and per_image.csv; makes report.html and grid.png from them and the images.

`python -m eval.report OUT` writes the report again. --markdown prints the table for a page, --against ROW the
difference of each method to that row, --grid draws some of the images.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import EvalError
from ..common import formats
from ..common.files import check_exists, listed, parse_json, png, read_text, to_json, write
from ..common.schema_changes import SCHEMA, convert
from ..images.settings import Settings
from ..methods.method import BASELINE, OTHER_SEEDS
from ..methods.registry import parse
from ..metrics.score import Scores
from . import spreadsheet
from .drawings.pictures import GRID_ROWS, grid
from .footnotes import RECORD, commits, with_unique_labels
from .html import TIMES, html

RESULTS, PER_IMAGE = "results.json", "per_image.csv"
FIELDS = ("method", "key", "id", "prompt", "seed", "seconds")  # of the table, before the metrics
AGAIN = "the same command of eval.run writes it again"


def results(
    settings: Settings, scores: Scores, metrics: list[dict[str, Any]], provenance: dict[str, Any], of: int
) -> dict[str, Any]:
    """What results.json holds. of: how many images the whole list of prompts asks for."""
    n = next(row["n"] for row in scores.rows if "n" in row)
    return {
        "schema": SCHEMA,
        "settings": {**asdict(settings), "n": n, "of": of},
        "metrics": metrics,
        "rows": scores.rows,
        "provenance": provenance,
    }


def save(out: Path, report: dict[str, Any], scores: Scores) -> dict[str, Any]:
    """Writes the figures, then the report made from them; returns what results.json holds.

    results.json is written last and holds the hash of the table, so that an interrupted write is noticed.
    """
    names = [metric["name"] for metric in report["metrics"] if metric.get("per_image")]
    content = spreadsheet.to_csv([*FIELDS, *names], scores.images)
    report = {**report, "per_image_sha256": spreadsheet.digest(content)}
    write(out / PER_IMAGE, content)
    write(out / RESULTS, to_json(report))
    write_report(out)
    return report


def write_report(out: Path) -> None:
    """report.html and grid.png from the files in `out`."""
    report, images = read(out)
    write(out / "grid.png", png(grid(out, report, images, GRID_ROWS)))
    write(out / "report.html", html(out, report, images))


def read(out: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """(results.json, the rows of per_image.csv). EvalError where they are not there, or not of one run."""
    check_exists(out)
    if not (out / RESULTS).exists():
        raise EvalError(f"{out.name} holds no {RESULTS}: python -m eval.run --out {out.name} writes one")
    try:
        report = formats.read(out / RESULTS, _schema(), SCHEMA, "eval.run", f"{out.name}/{RESULTS}")
    except EvalError as error:
        raise EvalError(f"{error}: {AGAIN}") from error
    rows = [row for row in report["rows"] if "skipped" not in row]
    if not any(row["key"] == BASELINE.slug for row in rows):
        raise EvalError(f"{out.name}/{RESULTS} is damaged: it has no row of the baseline: {AGAIN}")
    for figure in (figure for row in rows for figure in row["metrics"].values()):
        ends = [figure["low"] is None, figure["high"] is None]
        if ends[0] != ends[1] or (figure["value"] is None and not all(ends)):
            raise EvalError(f"{out.name}/{RESULTS} is damaged: it has one end of an interval: {AGAIN}")
    images = _images(out, report)
    ids = {row["key"]: sorted(image["id"] for image in images if image["key"] == row["key"]) for row in rows}
    if other := [key for key, own in ids.items() if own != ids[BASELINE.slug] or not own]:
        raise EvalError(f"{out.name}: {PER_IMAGE} lacks images of {listed(other)}, which {RESULTS} has: {AGAIN}")
    return with_unique_labels(report), images


def _images(out: Path, report: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of per_image.csv. EvalError where it is not the table of these results."""
    try:
        content = read_text(out / PER_IMAGE)
        rows, digest = convert(spreadsheet.from_csv(content)), spreadsheet.digest(content)
    except FileNotFoundError as error:
        raise EvalError(f"{out.name} has lost its {PER_IMAGE}: {AGAIN}") from error
    except OSError as error:
        raise EvalError(f"cannot read {out.name}/{PER_IMAGE}: {error.strerror}") from error
    except ValueError as error:
        raise EvalError(f"{out.name}/{PER_IMAGE} cannot be read: {error}: {AGAIN}") from error
    if report.get("per_image_sha256") not in (None, digest):  # older ones do not name it
        raise EvalError(f"{out.name}: {RESULTS} and {PER_IMAGE} are of two runs, or the table was edited: {AGAIN}")
    numbers = [metric["name"] for metric in report["metrics"] if metric.get("per_image")]
    lacking = [name for name in (*FIELDS, *numbers) if rows and name not in rows[0]]
    if not rows or lacking:
        raise EvalError(f"{out.name}/{PER_IMAGE} has no {f'column {lacking[0]!r}' if lacking else 'rows'}: {AGAIN}")
    for number, row in enumerate(rows, start=2):
        for name in numbers:
            if row[name] and not _is_number(row[name]):
                raise EvalError(f"{out.name}/{PER_IMAGE}, row {number}: {name} is {row[name]!r}, no number: {AGAIN}")
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = parse_json(read_text(Path(__file__).parent / "results.schema.json"))
    return schema


def check_comparable(a: Path, first: dict[str, Any], b: Path, second: dict[str, Any], names: Sequence[str]) -> None:
    """EvalError where the figures of two runs must not stand side by side: settings of these names, or how a metric is
    measured, differ."""
    cannot = f"{a.name} and {b.name} cannot be compared"
    for name in names:
        ours, theirs = (report["settings"].get(name) for report in (first, second))
        untold = name == "tokenizers" and None in (ours, theirs)  # by an older run
        if ours != theirs and not untold:
            raise EvalError(f"{cannot}: {name} is {ours!r} in one, {theirs!r} in the other")
    measured = {m["name"]: m["implementation"] for m in first["metrics"] if "skipped" not in m}
    for metric in second["metrics"]:
        mine = measured.get(metric["name"])
        if "skipped" not in metric and mine is not None and mine != metric["implementation"]:
            raise EvalError(
                f"{cannot}: {metric['name']} is measured by {mine} in one, by {metric['implementation']} in the other; "
                "measure one of them again with --metrics-only"
            )


def merge_runs(outs: Sequence[Path]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Joins the rows of several runs with the same settings; where two have a method, the first one's row counts.

    A row keeps the speed-up over the baseline of its own run.

    Raises:
        EvalError: settings, images or metrics differ.
    """
    report, images = committed(outs[0], *read(outs[0]))
    for out in outs[1:]:
        other, its_images = committed(out, *read(out))
        check_comparable(outs[0], report, out, other, list(report["settings"]))
        ids, others = ({image["id"] for image in some} for some in (images, its_images))
        if ids != others:
            raise EvalError(f"{outs[0].name} and {out.name} are of other images: {listed(sorted(ids ^ others))}")
        if (mine := _measured(report)) != (its := _measured(other)):
            raise EvalError(
                f"{outs[0].name} and {out.name} cannot be compared: {', '.join(sorted(mine ^ its))} is measured in "
                "one alone; measure the other again with --metrics-only"
            )
        keys = {row["key"] for row in report["rows"] if "skipped" not in row}
        own = {row["key"] for row in other["rows"] if "skipped" not in row}
        more = [{**row, "same_run": False} for row in other["rows"] if row["key"] in own - keys]
        record, other_record = report["provenance"], other["provenance"]
        tokenizers = [
            name for run in (report, other) if (name := run["settings"].get("tokenizers"))
        ]  # older runs name none
        report = {
            **report,
            "settings": {**report["settings"], "tokenizers": tokenizers[0] if tokenizers else None},
            "rows": [
                *(row for row in report["rows"] if row["key"] in keys or row["key"] not in own),
                *more,
            ],
            "provenance": {
                **record,
                "generated": [
                    *(record.get("generated") or [record]),
                    *(other_record.get("generated") or [other_record]),
                ],
                "joined": [*record.get("joined", []), other_record["command"]],
            },
        }
        images += [image for image in its_images if image["key"] not in keys]
    report["provenance"] = {**report["provenance"], "folders": [str(out) for out in outs]}
    return with_unique_labels(report), images


CHANGED = "+changes"
"""What a commit ends with where files differed from it (`provenance.git_commit`)."""


def committed(
    out: Path, report: dict[str, Any], images: list[dict[str, str]]
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Of a published folder, which has a README.md: only the rows whose images a committed tree generated.

    Results of any other folder are unchanged.

    Raises:
        EvalError: no row of a published folder is of a committed tree.
    """
    keys = committed_keys(report)
    if not (out / RECORD).exists() or keys is None:
        return report, images
    rows = [row for row in report["rows"] if row["key"] in keys]
    if not any(row["key"] == BASELINE.slug for row in rows):
        raise EvalError(f"{out.name} was generated with uncommitted changes: measure it again from a commit")
    provenance = report["provenance"]
    runs = [run for run in provenance["generated"] if not str(run.get("commit")).endswith(CHANGED)]
    report = {**report, "rows": rows, "provenance": {**provenance, "generated": runs}}
    return report, [image for image in images if image["key"] in keys]


def committed_keys(report: dict[str, Any]) -> set[str] | None:
    """The rows whose images a committed tree generated; None where that is all of them.

    A run names its methods in its command. The rows of the committed runs count only if they are as many as these runs
    have generated images.
    """
    provenance = report["provenance"]
    runs = provenance.get("generated") or [provenance]
    clean = [run for run in runs if not str(run.get("commit")).endswith(CHANGED)]
    if len(clean) == len(runs):
        return None
    keys = set().union(*(_keys_of(run["command"]) for run in clean))
    generated = sum(run.get("images", 0) for run in clean)
    return keys if generated == len(keys) * report["settings"]["n"] else set()


def _keys_of(command: str) -> set[str]:
    """The rows that a command of eval.run asks for."""
    words = shlex.split(command)
    given = dict(pairwise(words))
    ratios = [float(ratio) for ratio in given.get("--ratio", "0.5").split(",")]
    keys = {BASELINE.slug, *(method.slug for method in parse(given["--method"], ratios))}
    return keys | ({OTHER_SEEDS.slug} if "--seed-baseline" in words else set())


def with_times(report: dict[str, Any], out: Path, times: Path) -> dict[str, Any]:
    """Returns the results of `out` with the times of another run, in which all methods were timed side by side.

    The other run may be on another machine and of fewer images. A row that it did not time has no times.

    Raises:
        EvalError: settings differ.
    """
    other, _ = read(times)
    check_comparable(
        out, report, times, other, [name for name in report["settings"] if name not in ("n", "of", "device")]
    )
    timed = {row["key"]: row for row in other["rows"]}
    rows = [
        row if "skipped" in row else {**row, **dict.fromkeys(TIMES), **_times(timed.get(row["key"], {}))}
        for row in report["rows"]
    ]
    record = report["provenance"]
    joined = [*record.get("joined", []), other["provenance"]["command"]]
    timing = {"commit": commits(other), "device": other["settings"]["device"]}
    folders = [*record.get("folders", []), str(times)]
    return {**report, "rows": rows, "provenance": {**record, "joined": joined, "timing": timing, "folders": folders}}


def _times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in TIMES if name in row}


def _measured(report: dict[str, Any]) -> set[str]:
    return {metric["name"] for metric in report["metrics"] if "skipped" not in metric}
