"""The README's code runs, its commands are those CI runs, its links lead somewhere, its options exist."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import tofu_sd
from eval import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_its_python_runs_as_it_stands(number):
    pipe = tofu_sd.demo.load()
    pipe.set_progress_bar_config(disable=True)
    names = {"pipe": pipe}
    exec(blocks("python")[number], names)
    assert tofu_sd.summary(names["pipe"]).fusion is not None  # each block ends with a patched pipeline


def test_ci_runs_its_test_command():
    ci = (ROOT / ".ci" / "run").read_text().replace(" --quiet", "").replace(" --clear", "")
    tests = next(block for block in blocks("bash") if "pytest" in block)
    for command in tests.strip().split(" && "):
        assert command in ci, command


def test_its_evaluation_commands_are_understood():
    from eval.run import parser

    commands = re.findall(r"-m eval\.run (.*)", README)
    assert len(commands) >= 3
    for command in commands:
        parser().parse_args(command.split())


PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
TABLES = re.findall(r"<!-- python -m (eval\.report .*?) -->\n(.*?)<!-- end -->", "\n".join(PAGES), re.DOTALL)


@pytest.mark.parametrize(("command", "shown"), TABLES, ids=lambda text: text.split("\n")[0])
def test_its_tables_are_what_their_commands_print(command, shown, capsys, monkeypatch):
    """No figure is written by hand, and none stays when the results change."""
    monkeypatch.chdir(ROOT)
    assert report.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == shown


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_its_table_lists_every_option():
    section = README.split("| option |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", section.replace("`help(TokenFusion)`", "")))
    assert named == {field.name for field in fields(tofu_sd.TokenFusion)}
