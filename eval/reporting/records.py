"""Writes README.md into every published results folder: the commands and circumstances of its figures.

`python -m eval.reporting.pages` writes them along with the tables of the pages.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tofu_sd.utils import markdown_table

from ..common.files import read_json
from . import results
from .footnotes import RECORD

WIDTH = 118
HEAD = "*Written by `python -m eval.reporting.pages`. Commands are as recorded, with the names of that commit.*"


def written(root: Path) -> Iterator[tuple[Path, str]]:
    """(file, text) of the record of each folder below `root`, and of `root`, which describes the files in it."""
    folders = sorted({file.parent for file in root.rglob("*.json")} - {root})
    for folder in folders:
        yield folder / RECORD, _folder(folder)
    lines = ["# Results", "", HEAD, "", "Folders, each with its own record:", ""]
    names = [folder.relative_to(root).as_posix() for folder in folders]
    lines += [f"- [{name}]({name}/{RECORD})" for name in names]
    for file in sorted(root.glob("*.json")):
        lines += ["", f"## {file.stem}", "", f"Figures: [{file.name}]({file.name})", "", *_single(read_json(file))]
    yield root / RECORD, _text(lines)


def _text(lines: Sequence[str]) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).rstrip()) + "\n"


def _folder(folder: Path) -> str:
    lines = [f"# {folder.name}", "", HEAD, ""]
    if (folder / results.RESULTS).exists():
        return _text([*lines, *_evaluation(results.read(folder)[0])])
    for file in sorted(folder.glob("*.json")):
        lines += [f"Figures: [{file.name}]({file.name})", "", *_single(read_json(file))]
    return _text(lines)


def _evaluation(found: dict[str, Any]) -> list[str]:
    """The record of a folder of eval.run."""
    s, provenance = found["settings"], found["provenance"]
    runs = provenance.get("generated") or [provenance]
    lines = _facts(
        {
            "Model": s["model"],
            "Images": f"{s['n']} a method" + (f", of {s['of']} prompts and seeds" if s["n"] < s["of"] else ""),
            "Prompts": f"{s['prompts']}, seeds from {s['seed']}",
            "Sampling": f"{s['steps']} steps, {s['size']} px, guidance {s['guidance']}, batch {s['batch']}",
            "Device": f"{s['dtype']} on {s['device']}",
            "Versions": f"torch {s['torch']}, diffusers {s['diffusers']}",
            "Commits of the images": _commits(run.get("commit") for run in runs),
            "Figures": "[results.json](results.json), [per_image.csv](per_image.csv), [settings.json](settings.json)",
        }
    )
    if (keys := results.committed_keys(found)) is not None:
        left = [row["key"] for row in found["rows"] if row["key"] not in keys]
        lines += [*_fill(f"Not published, because files differed from the commit: {', '.join(left)}."), ""]
    measured = ([metric["name"], _measured_by(metric)] for metric in found["metrics"])
    lines += markdown_table(["metric", "measured by"], measured, left=2)
    lines += ["", "Metrics compare with the baseline under the same seeds; intervals are 95 %.", ""]
    commands = dict.fromkeys([*(run["command"] for run in runs if "command" in run), provenance["command"]])
    return lines + _commands(commands)


def _single(found: Any) -> list[str]:
    """The record of one JSON file of another program."""
    settings, provenance = found.get("settings", {}), found.get("provenance", {})
    facts = {name: value for name, value in settings.items() if value is not None and name != "device"}
    lines = _facts(
        {
            "Settings": ", ".join(f"{name} {_plain(value)}" for name, value in facts.items()),
            "Device": settings.get("device") or found.get("device"),
            "Versions": found.get("versions") or (found.get("torch") and f"torch {found['torch']}"),
            "Commit": _commits([provenance.get("commit")]),
        }
    )
    return lines + (_commands([provenance["command"]]) if "command" in provenance else [])


def _facts(facts: dict[str, Any]) -> list[str]:
    return [line for name, value in facts.items() if value for line in _fill(f"- {name}: {value}", "  ")] + [""]


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _commits(commits: Iterable[str | None]) -> str:
    """The commits of a record; what was generated with uncommitted changes is not published."""
    texts = []
    for commit in dict.fromkeys(commit or "not recorded" for commit in commits):
        changed = commit.endswith(results.CHANGED)
        texts.append(f"{commit.removesuffix(results.CHANGED)} with uncommitted changes" if changed else commit)
    return ", ".join(texts)


def _measured_by(metric: dict[str, Any]) -> str:
    implementation: str = (
        metric["implementation"] if "skipped" not in metric else f"skipped: {_reason(metric['skipped'])}"
    )
    return implementation


def _reason(text: str) -> str:
    """Why a metric was skipped, without the text of an exception."""
    return text.partition(": <")[0]


def _fill(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _commands(commands: Iterable[str]) -> list[str]:
    return ["```bash", *(line for command in commands for line in _wrapped(shlex.split(command))), "```"]


def _wrapped(words: Sequence[str]) -> list[str]:
    """A command on lines that a shell reads as one. A long list continues at the line's beginning, after a comma."""
    lines = [""]
    for word in map(shlex.quote, words):
        for i, part in enumerate(_parts(word)):
            glue = " " if lines[-1] and i == 0 else ""
            if len(lines[-1]) + len(glue + part) > WIDTH:
                lines[-1] += f"{glue}\\"
                lines.append(part if i else f"  {part}")
            else:
                lines[-1] += glue + part
    return lines


def _parts(word: str) -> list[str]:
    """A list at its commas, unless it is quoted."""
    if "'" in word or "," not in word:
        return [word]
    first, *others = word.split(",")
    return [first, *(f",{part}" for part in others)]
