"""Every command has a help text with examples that can be parsed."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from eval.evaluation import options as options_module

PROGRAMS = [
    "eval.run",
    "eval.sweep",
    "eval.report",
    "eval.compare",
    "eval.bench",
    "eval.prompts",
    "eval.validate",
    "eval.support",
    "eval.reporting.pages",
    "eval.speed.stand_in",
    "research.classifiers.classify",
    "research.classifiers.train",
    "research.adaptivision.ablations",
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_examples_of_help_can_be_parsed(name, capsys):
    try:
        program = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert "default: []" not in output
    examples = re.findall(rf"^  (?:python|accelerate .*) -m {re.escape(name)}( .*)?$", output, re.MULTILINE)
    assert examples
    parser = options_module.parser if name == "eval.run" else program.parser
    for example in examples:
        _, rest = parser().parse_known_args(shlex.split(example))
        options_module.parser().parse_args(rest if name == "eval.sweep" else [])  # its options are eval.run's
        assert name == "eval.sweep" or not rest


def test_every_command_has_examples():
    root = Path(__file__).parents[2]
    files = [path for folder in ("eval", "research") for path in (root / folder).rglob("*.py")]
    programs = {path for path in files if "__main__" in path.read_text() and "common.cli import" in path.read_text()}
    assert {".".join(path.relative_to(root).with_suffix("").parts) for path in programs} == set(PROGRAMS)
