"""Converts results that earlier versions of this package wrote."""

from __future__ import annotations

import re
from typing import Any

SCHEMA = 2  # of the result files of all commands

RENAMED = {  # options of TokenFusionConfig in method names, and options of commands
    "keys_only": "kv_only",
    "share_level": "share_across_blocks",
    "share_guidance": "share_across_cfg",
    "match_every": "match_interval",
    "threshold_least": "threshold_min",
    "scale-row": "seed-baseline",
    "eval.classify": "research.classifiers.classify",
    "eval.condensation": "research.adaptivision.ablations",
}
_OLD = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, RENAMED))})(?!\w)")

BASELINE_NAMES = {  # methods and slugs of schema 1
    "full": "baseline",
    "full, other seeds": "baseline, other seeds",
    "full-other-seeds": "baseline-other-seeds",
}
METRIC_NAMES = {
    "classed as asked": "class accuracy",
    "PD-judge": "PD-demo",
    "FD-judge": "FD-demo",
    "KD-judge": "KD-demo",
}
ROW_KEYS = {
    "denoising": "denoiser_seconds",
    "beside": "interleaved",
    "of_one_run": "same_run",
    "blank": "flat",
    "undefined": "nan",
    "moved": "feature_shift",
}
FIGURE_KEYS = {"undefined": "nan"}
PROVENANCE_KEYS = {"drawn": "generated"}
RUN_KEYS = {"pictures": "images"}
RECORD_KEYS = {
    "made": "config_hash",
    "denoising": "denoiser_seconds",
    "full_denoising": "baseline_denoiser_seconds",
    "drawn_with": "batch_ids",
}


def convert(value: Any) -> Any:
    """A JSON value in the names of this version: results of any command, or the rows of a per_image.csv.

    A value that is not of an earlier version is unchanged.
    """
    value = _rename_options(value)
    if isinstance(value, list):
        return [_convert_row(row) if _is_row(row) else row for row in value]
    if isinstance(value, dict) and value.get("schema") == 1 and _has_rows(value):
        return _convert_results(value)
    return value


def convert_record(record: Any) -> Any:
    """The record of an image in the names of this version."""
    return _rename(record, RECORD_KEYS)


def convert_run(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a run in the names of this version."""
    return dict(_rename_options(metadata))


def _rename_options(value: Any) -> Any:
    """The value with the present names of options in all its strings and keys."""
    if isinstance(value, str):
        return _OLD.sub(lambda name: RENAMED[name[1]], value)
    if isinstance(value, list):
        return [_rename_options(one) for one in value]
    if isinstance(value, dict):
        return {_rename_options(key): _rename_options(one) for key, one in value.items()}
    return value


def _is_row(row: Any) -> bool:
    """Whether this is a row of a command's results: of eval.run and eval.bench, of classifiers, or of ablations."""
    kinds = ({"method", "key"}, {"method", "label"}, {"variant"})
    return isinstance(row, dict) and any(kind <= set(row) for kind in kinds)


def _has_rows(results: dict[str, Any]) -> bool:
    rows = results.get("rows")
    return isinstance(rows, list) and any(map(_is_row, rows))


def _convert_results(results: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 to schema 2."""
    new = {**results, "schema": SCHEMA, "rows": [_convert_row(row) for row in results["rows"]]}
    if isinstance(results.get("metrics"), list):
        new["metrics"] = [_convert_metric(metric) for metric in results["metrics"]]
    if isinstance(provenance := results.get("provenance"), dict):
        provenance = _rename(provenance, PROVENANCE_KEYS)
        if isinstance(runs := provenance.get("generated"), list):
            provenance["generated"] = [_rename(run, RUN_KEYS) for run in runs]
        new["provenance"] = provenance
    return new


def _convert_row(row: Any) -> Any:
    if not _is_row(row):
        return row
    row = _rename(row, {**ROW_KEYS, **METRIC_NAMES})
    for name in ("method", "key", "label"):
        if isinstance(row.get(name), str):
            row[name] = BASELINE_NAMES.get(row[name], row[name])
    if isinstance(row.get("metrics"), dict):
        metrics = _rename(row["metrics"], METRIC_NAMES)
        row["metrics"] = {name: _rename(figure, FIGURE_KEYS) for name, figure in metrics.items()}
    return row


def _convert_metric(metric: Any) -> Any:
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        return metric
    return {**metric, "name": METRIC_NAMES.get(metric["name"], metric["name"])}


def _rename(value: Any, names: dict[str, str]) -> Any:
    """A copy of an object with keys renamed, in their order; anything else unchanged."""
    return {names.get(key, key): one for key, one in value.items()} if isinstance(value, dict) else value
