"""`python -m eval.compare FIRST SECOND`: two runs side by side, each against its own baseline.

What decides the images must be the same in both (model, dtype, prompts, seeds, size, steps, guidance, number).
Differences in machine or versions are named instead. Times are compared only on one machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import EvalError
from ..common.files import listed
from ..images.output_dir import DERIVED
from ..methods.method import BASELINE
from . import results
from .footnotes import batch_warnings, commits, image_warnings, label, measured
from .tables import gained, paired_difference, short, spent

SAME = (
    *("model", "variant", "prompts", "seed", "size", "steps", "guidance", "dtype", "batch", "attention", "n"),
    *DERIVED,
)
ENVIRONMENT = ("device", "torch", "diffusers", "transformers")
Images = list[dict[str, str]]


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Args:
        differences: settings and versions that differ, with both values.
        rows: for each method of both runs and each figure: both values and their difference.
        metrics: the implementation of each metric.
        warnings: about images of either run that are flat or NaN, or of other batches than the baseline's.
    """

    differences: dict[str, tuple[Any, Any]]
    rows: list[dict[str, str]]
    metrics: list[str]
    warnings: list[str]


def compare(a: Path, b: Path) -> Comparison:
    """Compares two runs.

    Args:
        a: the folder of a run.
        b: the folder of another.

    Raises:
        EvalError: the runs cannot be compared; the message names what differs.
    """
    (first, first_images), (second, second_images) = results.read(a), results.read(b)
    results.check_comparable(a, first, b, second, SAME)
    differences = _differences(first, second)
    environment = {*ENVIRONMENT, *_of_generating_runs(first, "runtime"), *_of_generating_runs(second, "runtime")}
    same_environment = not differences.keys() & environment
    by_name = {m["name"]: m for m in first["metrics"] if "skipped" not in m}
    shared = [by_name[m["name"]] for m in second["metrics"] if m["name"] in by_name and "skipped" not in m]
    other_rows = {row["key"]: row for row in second["rows"] if "skipped" not in row}
    rows = []
    for row in first["rows"]:
        if "skipped" in row or row["key"] == BASELINE.slug or row["key"] not in other_rows:
            continue
        other = other_rows[row["key"]]
        rows += [{"method": label(row), **times} for times in _time_rows(row, other, same_environment)]
        own = {image["id"]: image for image in first_images if image["key"] == row["key"]}
        theirs = {image["id"]: image for image in second_images if image["key"] == row["key"]}
        _check_same_images((a, own), (b, theirs))
        rows += [_metric_row(row, other, metric, own, list(theirs.values())) for metric in shared]
    if not rows:
        raise EvalError(f"{a.name} and {b.name} have no method in common")
    warnings = [
        f"{out.name}: {line}"
        for out, run in ((a, first), (b, second))
        for line in (*image_warnings(run), *batch_warnings(run))
    ]
    return Comparison(differences, rows, measured(shared), warnings)


def _differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs in the environments of two runs."""
    settings = [{name: run["settings"][name] for name in ENVIRONMENT} for run in (first, second)]
    runtimes = [_of_generating_runs(run, "runtime") for run in (first, second)]
    packages = [
        {name: version for name, version in _of_generating_runs(run, "packages").items() if name not in ENVIRONMENT}
        for run in (first, second)
    ]
    code = [{"commit": commits(run)} for run in (first, second)]
    return {name: pair for one, other in (settings, runtimes, packages, code) for name, pair in _differing(one, other)}


def _of_generating_runs(results: dict[str, Any], part: str) -> dict[str, str]:
    """The runtime or packages of the runs that generated the images; another machine may have measured them."""
    runs = results["provenance"].get("generated") or [results["provenance"]]
    names = dict.fromkeys(name for run in runs for name in run.get(part, {}))
    return {name: ", ".join(sorted({run.get(part, {}).get(name, "none") for run in runs})) for name in names}


def _differing(a: dict[str, str], b: dict[str, str]) -> list[tuple[str, tuple[Any, Any]]]:
    names = dict.fromkeys([*a, *b])
    return [(name, (a.get(name), b.get(name))) for name in names if a.get(name) != b.get(name)]


def _check_same_images(a: tuple[Path, dict[str, Any]], b: tuple[Path, dict[str, Any]]) -> None:
    for (_, one), (other_dir, other) in ((a, b), (b, a)):
        if missing := sorted(one.keys() - other.keys()):
            raise EvalError(
                f"{a[0].name} and {b[0].name} cannot be compared: {other_dir.name} has no image {listed(missing)}"
            )


def _metric_row(
    a: dict[str, Any], b: dict[str, Any], metric: dict[str, Any], a_images: dict[str, Any], b_images: Images
) -> dict[str, str]:
    return {
        "method": label(a),
        "figure": metric["name"],
        "a": short(a["metrics"].get(metric["name"]), metric["digits"]),
        "b": short(b["metrics"].get(metric["name"]), metric["digits"]),
        "b - a": paired_difference(b_images, a_images, metric) if metric["per_image"] else "–",
    }


def _time_rows(a: dict[str, Any], b: dict[str, Any], same_environment: bool) -> list[dict[str, str]]:
    """Medians and percentiles of both runs. Their difference is also the machine's, so there is no b - a."""
    return [
        {"figure": name, "a": text(a), "b": text(b) if same_environment else "n/a: other environment", "b - a": "–"}
        for name, text in (("speed-up", gained), ("s/image", spent))
    ]
