"""Lines of provenance and warnings below the tables of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any


def label(row: dict[str, Any]) -> str:
    """A row's name: the method and its ratio of merged tokens; its key where `with_unique_labels` found another such
    row."""
    if row.get("label"):
        return str(row["label"])
    return row["method"] if row["ratio"] is None else f"{row['method']} {100 * row['ratio']:g}%"


def with_unique_labels(results: dict[str, Any]) -> dict[str, Any]:
    """The results, in which rows that would share a label are labelled by their keys."""
    counts = Counter(label(row) for row in results["rows"])
    rows = [{**row, "label": row["key"]} if counts[label(row)] > 1 else row for row in results["rows"]]
    return {**results, "rows": rows}


def run_header(results: dict[str, Any], short: bool | None = None) -> str:
    """One line of provenance: model, n, prompts, steps, size, guidance, dtype, device and commit.

    short: leave out seeds, batch and versions, which the README.md of a published folder holds; by default where
    there is one.
    """
    s = results["settings"]
    short = bool(records(results)) if short is None else short
    guidance = "default" if s["guidance"] is None else s["guidance"]
    sampling = f"{s['steps']} steps, {s['size']} px, guidance {guidance}"
    parts = [
        f"{s['model']}, {s['n']} images" + (f" of {s['of']}" if s["n"] < s["of"] else ""),
        f"prompts {s['prompts']}" + ("" if short else f", seeds from {s['seed']}"),
        sampling if short else f"{sampling}, batch {s['batch']}",
        f"{s['dtype']} on {s['device']}",
        *([] if short else [f"torch {s['torch']}, diffusers {s['diffusers']}"]),
        f"commit {commits(results)}",
    ]
    return " · ".join(parts)


def commits(results: dict[str, Any]) -> str:
    """The commits whose code generated the images."""
    provenance = results["provenance"]
    runs = provenance.get("generated") or [provenance]
    return ", ".join(dict.fromkeys(run.get("commit") or "unknown" for run in runs))


def commands(results: dict[str, Any]) -> str:
    """How the figures were made, for a page: links to the records of published folders, else the commands."""
    if links := records(results):
        return "\n".join(" · ".join(links[i : i + 2]) for i in range(0, len(links), 2))
    provenance = results["provenance"]
    return "\n\n".join(f"`{command}`" for command in (provenance["command"], *provenance.get("joined", [])))


RECORD = "README.md"
"""The file of a published results folder that holds its commands and circumstances."""


def records(results: dict[str, Any]) -> list[str]:
    """A link to the record of each results folder; none unless all folders are published, with a record."""
    files = [Path(folder) / RECORD for folder in results["provenance"].get("folders", [])]
    if not all(file.exists() for file in files):
        return []
    return [f"[{file.parent.name}]({file.as_posix()})" for file in files]


SECONDS = frozenset({"s/image", "s in model"})


def footnotes(results: dict[str, Any], shown: Collection[str] | None = None) -> list[str]:
    """Lines below the table. shown: the titles of its columns, where it has not all of them."""
    seconds = shown is None or not SECONDS.isdisjoint(shown)
    timed = seconds or "speed-up" in (shown or ())
    if records(results):
        return [
            *([timing(results)] if timed else []),
            *image_warnings(results),
            *batch_warnings(results),
            *_untimed(results, seconds, timed),
        ]
    lines = ["Against the baseline's images under the same seeds; intervals of the metrics: 95 %."]
    if timed:
        lines[0] += f" {timing(results)}"
    lines += measured(results["metrics"])
    lines += [f"{label(row)}: skipped: {row['skipped']}" for row in results["rows"] if "skipped" in row]
    lines += [*image_warnings(results), *batch_warnings(results)]
    lines += _untimed(results, seconds, timed)
    lines += _runtimes(results["provenance"]) if seconds else []
    lines += _set_distances(results)
    if shown is None and all(row.get("peak_bytes") is None for row in results["rows"]):
        used = results["provenance"]["process_mib"]
        whole = f"; the whole process took {used:,} MiB at most" if used else ""
        lines.append(f"Memory by method: n/a off CUDA{whole}.")
    elif (shown is None or "memory" in shown) and (held := max(row.get("held_bytes") or 0 for row in results["rows"])):
        lines.append(f"Memory: the most of any batch, beyond the {held / 2**20:,.0f} MiB that the model itself holds.")
    return lines


def _untimed(results: dict[str, Any], seconds: bool, timed: bool) -> list[str]:
    """Which rows have no times, and why."""
    lacking = (
        "it is not in the run that times are of"
        if "timing" in results["provenance"]
        else "the baseline was not timed beside it"
    )
    untimed = [label(row) for row in results["rows"] if timed and "skipped" not in row and row["speedup"] is None]
    lines = [f"{', '.join(untimed)}: no times, {lacking}"] if untimed else []
    others = [label(r) for r in results["rows"] if seconds and r.get("speedup") and r.get("same_run") is False]
    return lines + (
        [f"{', '.join(others)}: seconds of another run than the baseline's are not shown"] if others else []
    )


def measured(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """The implementation of each metric, and why others were skipped. metrics: as results.json lists them."""
    by = [f"{m['name']}: {m['implementation']}" for m in metrics if "skipped" not in m]
    return (["; ".join(by) + "."] if by else []) + [
        f"{m['name']}: skipped: {m['skipped']}" for m in metrics if "skipped" in m
    ]


def batch_warnings(results: dict[str, Any]) -> list[str]:
    """Warnings about images that differ from the baseline's by more than their method."""
    return [
        f"{label(row)}: {row['other_batch']} of {row['n']} images were generated in another batch than the "
        "baseline's, which changes the last bits, and more where a method decides for a batch at once"
        for row in results["rows"]
        if row.get("other_batch")
    ]


def image_warnings(results: dict[str, Any]) -> list[str]:
    """Warnings about images that are flat or hold NaN, whose metrics say nothing: two black ones are equal.

    The baseline's are named wherever others are compared with them.
    """
    rows = results["rows"]
    return [
        f"{label(row)}: {row[name]} of {row['n']} images {what}"
        for row in ([results["full"]] if "full" in results and results["full"] not in rows else []) + rows
        for name, what in (("flat", "are one flat colour"), ("nan", "hold NaN, saved as black"))
        if row.get(name)
    ]


def timing(results: dict[str, Any]) -> str:
    """Of how many batches the times are, whose and where. Rows of more or fewer than most are named with their own
    number."""
    numbers = {label(row): row["speedup"]["n"] for row in results["rows"] if row.get("speedup")}
    if not numbers:
        return "No times."
    usual = Counter(numbers.values()).most_common(1)[0][0]
    others = [
        f"{', '.join(name for name, own in numbers.items() if own == n)} of {n}"
        for n in sorted(set(numbers.values()) - {usual}, reverse=True)
    ]
    but = f" ({'; '.join(others)})" if others else ""
    coarse = [label(row) for row in results["rows"] if row.get("speedup") and not row.get("interleaved")]
    if coarse and len(coarse) < len(numbers):
        but += f", step by step but for {', '.join(coarse)}, which were timed by turns"
    elif not coarse:
        but += ", step by step"
    other = results["provenance"].get("timing")
    if records(results):
        of = f" on {other['device']}, commit {other['commit']}" if other else ""
        return f"Speed-up: median of {usual} batches{but}{of}; 5th to 95th percentile."
    of = f" All times are of another run, on {other['device']}, of commit {other['commit']}." if other else ""
    return f"Speed-up: median of {usual} batches{but}. Ranges of speed-up and seconds: 5th to 95th percentile.{of}"


def _runtimes(provenance: dict[str, Any]) -> list[str]:
    """A line if the images of a run were generated under several drivers; joined runs show no seconds."""
    generated = [] if "joined" in provenance else provenance.get("generated") or []
    runtimes = [run["runtime"] for run in generated if run.get("runtime")]
    several = dict.fromkeys(", ".join(f"{name} {value}" for name, value in one.items()) for one in runtimes)
    return [f"Seconds are of images generated under {'; and '.join(several)}."] if len(several) > 1 else []


FEW_FOR_KID = 1000


def _set_distances(results: dict[str, Any]) -> list[str]:
    """A Fréchet distance is biased upwards at small n; a kernel distance is not, but has a wide spread."""
    sizes = {
        name: (figure["n"], figure["features"])
        for row in results["rows"]
        for name, figure in row.get("metrics", {}).items()
        if "features" in figure
    }
    lines = [
        f"{name}: from n={n} images in {width} dimensions. It is biased upwards and comparable at this n only; its "
        "interval is its spread at this n, not where it would come to with more images."
        for name, (n, width) in sizes.items()
        if name.startswith(("FID", "FD"))
    ]
    lines += [
        f"{name}: from n={n} images; under {FEW_FOR_KID:,} its interval is rough."
        for name, (n, _) in sizes.items()
        if name.startswith(("KID", "KD")) and n < FEW_FOR_KID
    ]
    shown = {metric["name"] for metric in results["metrics"]}
    return [line for line in lines if line.partition(":")[0] in shown]
