"""Published results: rows of an uncommitted tree are excluded, and records contain their commands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from eval import EvalError
from eval.common.schema_changes import convert
from eval.reporting import footnotes, records, results, tables
from eval.reporting.pages import RESULTS

ROOT = Path(__file__).parents[1]
SWEEP = RESULTS / "demo-sweep"  # nine of its rows were generated with uncommitted changes


@pytest.fixture(autouse=True)
def _chdir_to_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_rows_of_an_uncommitted_tree_are_not_published() -> None:
    run, images = results.read(SWEEP)
    published, published_images = results.merge_runs([SWEEP])
    assert (len(run["rows"]), len(published["rows"])) == (28, 19)
    assert "+changes" in footnotes.commits(run)
    assert "+changes" not in footnotes.commits(published)
    keys = {row["key"] for row in published["rows"]}
    assert {"baseline", "tofu-r50", "mean-r50-w8+p", "baseline-other-seeds"} <= keys
    assert not {"prune-r50+p", "mean-r75-w8+p"} & keys
    assert {image["key"] for image in published_images} == keys < {image["key"] for image in images}


def test_folder_without_committed_rows_raises() -> None:
    with pytest.raises(EvalError, match="demo-512 was generated with uncommitted changes"):
        results.merge_runs([RESULTS / "demo-512"])


def test_unpublished_results_keep_all_rows(tmp_path: Path) -> None:
    """A user's own run may have uncommitted changes."""
    shutil.copytree(SWEEP, tmp_path / "mine", ignore=lambda *_: ["README.md"])
    run, _ = results.merge_runs([tmp_path / "mine"])
    assert len(run["rows"]) == 28
    assert "`python -m eval.run --method full" in tables.markdown(run)  # the markdown includes its command


def test_rows_with_images_of_unknown_commit_are_not_committed() -> None:
    run, _ = results.read(SWEEP)
    run["provenance"]["generated"][0]["images"] -= 1
    assert results.committed_keys(run) == set()


def test_committed_tree_publishes_all_rows() -> None:
    for folder in sorted(path for path in RESULTS.iterdir() if (path / results.RESULTS).exists()):
        run, _ = results.read(folder)
        if results.committed_keys(run) is None:
            assert len(results.merge_runs([folder])[0]["rows"]) == len(run["rows"])


def test_record_commands_use_current_options_in_shell_syntax() -> None:
    record = (SWEEP / "README.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", record, flags=re.DOTALL)
    assert max(map(len, record.splitlines())) <= 120
    parsed = [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
    provenance = convert(json.loads((SWEEP / "results.json").read_text()))["provenance"]
    recorded = dict.fromkeys([*(entry["command"] for entry in provenance["generated"]), provenance["command"]])
    assert parsed == [shlex.split(command) for command in recorded]


def test_record_contains_no_exception_text() -> None:
    for file, text in records.written(RESULTS):
        assert "urlopen" not in text, file
