"""Published results: rows of an uncommitted tree are left out, and records hold their commands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from eval import EvalError
from eval.common.schema_changes import convert
from eval.reporting import records, results, tables
from eval.reporting.pages import RESULTS

ROOT = Path(__file__).parents[1]
SWEEP = RESULTS / "demo-sweep"  # nine of its rows were generated with uncommitted changes


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_rows_of_an_uncommitted_tree_are_not_published() -> None:
    found, images = results.read(SWEEP)
    published, its_images = results.merge_runs([SWEEP])
    assert (len(found["rows"]), len(published["rows"])) == (28, 19)
    assert "+changes" in tables.commits(found)
    assert "+changes" not in tables.commits(published)
    keys = {row["key"] for row in published["rows"]}
    assert {"baseline", "tofu-r50", "mean-r50-w8+p", "baseline-other-seeds"} <= keys
    assert not {"prune-r50+p", "mean-r75-w8+p"} & keys
    assert {image["key"] for image in its_images} == keys < {image["key"] for image in images}


def test_a_folder_without_a_committed_row_is_refused() -> None:
    with pytest.raises(EvalError, match="demo-512 was generated with uncommitted changes"):
        results.merge_runs([RESULTS / "demo-512"])


def test_results_that_are_not_published_keep_all_rows(tmp_path: Path) -> None:
    """A run of one's own, while the code changes, is read as it is."""
    shutil.copytree(SWEEP, tmp_path / "mine", ignore=lambda *_: ["README.md"])
    found, _ = results.merge_runs([tmp_path / "mine"])
    assert len(found["rows"]) == 28
    assert "`python -m eval.run --method full" in tables.markdown(found)  # and shows its command


def test_rows_count_as_committed_only_if_their_images_are_accounted_for() -> None:
    found, _ = results.read(SWEEP)
    found["provenance"]["generated"][0]["images"] -= 1
    assert results.committed_keys(found) == set()


def test_the_published_rows_are_all_that_a_committed_tree_generated() -> None:
    for folder in sorted(path for path in RESULTS.iterdir() if (path / results.RESULTS).exists()):
        found, _ = results.read(folder)
        if results.committed_keys(found) is None:
            assert len(results.merge_runs([folder])[0]["rows"]) == len(found["rows"])


def test_a_shell_reads_the_commands_of_a_record_in_present_options() -> None:
    record = (SWEEP / "README.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", record, flags=re.DOTALL)
    assert max(map(len, record.splitlines())) <= 120
    read = [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
    provenance = convert(json.loads((SWEEP / "results.json").read_text()))["provenance"]
    recorded = dict.fromkeys([*(run["command"] for run in provenance["generated"]), provenance["command"]])
    assert read == [shlex.split(command) for command in recorded]


def test_a_record_holds_no_text_of_an_exception() -> None:
    for file, text in records.written(RESULTS):
        assert "urlopen" not in text, file
