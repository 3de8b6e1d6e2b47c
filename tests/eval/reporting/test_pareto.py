"""The frontier holds what no other beats; a sweep is a run of the whole grid."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import sd15_pipe

from eval import EvalError, run, sweep
from eval import report as report_module
from eval.common import files
from eval.evaluation import prepare
from eval.metrics.score import Scores
from eval.reporting import pareto, tables
from eval.reporting import results as results_module
from eval.reporting.drawings import pareto_plot
from eval.reporting.pareto import Point

FIGURE = st.floats(0, 1.2, allow_nan=False).map(lambda x: round(x, 1))  # coarse, so that some are equal


def beats(a: Point, b: Point, sign: int) -> bool:
    """At least as good in both, better in one."""
    return (
        a.cost <= b.cost and sign * a.value <= sign * b.value and (a.cost < b.cost or sign * a.value < sign * b.value)
    )


@given(st.lists(st.tuples(FIGURE, FIGURE), min_size=1, max_size=12), st.booleans())
def test_pareto_front_is_exactly_the_undominated_points(figures: list[tuple[float, float]], lower: bool) -> None:
    points = [Point({"i": i}, cost, value, value, value) for i, (cost, value) in enumerate(figures)]
    sign = 1 if lower else -1
    kept = {p.row["i"] for p in pareto.pareto(points, lower)}
    cheaper = [p for p in points if p.cost < 1]  # what costs as much as the baseline is beaten by it
    assert kept == {p.row["i"] for p in cheaper if not any(beats(other, p, sign) for other in cheaper)}


@pytest.mark.parametrize(
    ("name", "family", "form"),
    [
        ("tofu", "tofu", "merged"),
        ("tofu@window=8", "tofu", "merged"),
        ("tome+p@window=8", "tome", "with log n (+p)"),
        ("kv:tome", "tome", "keys and values (kv:)"),
        ("kv:tome+p", "tome", "both"),
        ("deepcache:kv:tome+p", "deepcache:tome", "both"),
        ("tomesd", "tomesd", "merged"),
        ("faithful", "faithful", "with log n (+p)"),
        ("tofu@kv_only=True", "tofu", "keys and values (kv:)"),
    ],
)
def test_plot_marker_depends_on_the_method(name: str, family: str, form: str) -> None:
    assert pareto_plot.form({"method": name, "ratio": 0.5}) == form
    assert pareto_plot.family({"method": name}) == family


def test_call_of_a_method_is_shown_as_code() -> None:
    row = {"method": "kv:tome+p@window=8", "ratio": 0.75}
    assert pareto.call(row) == (
        "`apply_patch(pipe, 0.75, proportional=True, early='mean', late='mean', kv_only=True, window=8)`"
    )
    assert pareto.call({"method": "tofu", "ratio": 0.5}) == "`apply_patch(pipe, 0.5)`"
    assert pareto.call({"method": "deepcache", "ratio": None}) == "–"
    wide = pareto.call({"method": "tome+p@sx=4@sy=4", "ratio": 0.9})  # more than cells of 2 x 2 can
    assert wide == "`apply_patch(pipe, 0.9, proportional=True, early='mean', late='mean', sx=4, sy=4)`"
    assert pareto.call({"method": "tofu@since_gone=1", "ratio": 0.5}) == "–"


def test_sweep_grid_has_every_combination() -> None:
    assert sweep.grid("tofu,tome", "plain,kv+p", ["window=8"], "tomesd,todo").split(",") == [
        "tofu", "tofu@window=8", "kv:tofu+p", "kv:tofu+p@window=8",
        "tome", "tome@window=8", "kv:tome+p", "kv:tome+p@window=8", "tomesd", "todo",
    ]  # fmt: skip
    assert sweep.grid("tofu", "plain", [], "none") == "tofu"


@pytest.mark.parametrize(("part", "kind", "some", "none"), [
    ("unet", "UNet2DConditionModel", {"deepcache:tofu", "todo", "tomesd"}, {"first-block-cache"}),
    ("transformer", "FluxTransformer2DModel", {"first-block-cache:tofu"}, {"deepcache", "todo", "tomesd"}),
    ("transformer", "SD3Transformer2DModel", {"asymmetric"}, {"deepcache", "first-block-cache"}),
    ("prior", "Unknown", {"deepcache", "first-block-cache"}, set()),  # loading it says what does not fit
])  # fmt: skip
def test_sweep_adds_the_methods_that_fit_the_model(
    tmp_path: Path, part: str, kind: str, some: set[str], none: set[str]
) -> None:
    """One that does not fit would end the sweep."""
    files.write_json(tmp_path / "model_index.json", {"_class_name": "Pipeline", part: ["diffusers", kind]})
    found = set(sweep.others(str(tmp_path)))
    assert some <= found
    assert not none & found


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "own.txt").write_text("\n".join(["a fox", "a bee", "an oak", "a kite", "a pond"]))
    pipe = sd15_pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load_model", lambda *_: (pipe, None))
        grid = ["--reduction", "tofu,prune", "--form", "plain,p", "--ratio", "0.25,0.5", "--also", "todo"]
        own = ["--model", "tiny", "--prompts", str(folder / "own.txt"), "--steps", "1", "--size", "64"]
        assert sweep.main([*grid, *own, "--metrics", "psnr,ssim", "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_sweep_is_a_run_with_flops_and_a_plot(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = files.read_json(swept / "results.json")["rows"]
    assert [row["method"] for row in rows[1:]] == [*["tofu"] * 2, *["tofu+p"] * 2, *["prune"] * 2, *["prune+p"] * 2,
                                                  "todo"]  # fmt: skip
    assert all(0 < row["flops"] < rows[0]["flops"] for row in rows[1:])
    page = (swept / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert report_module.main([str(swept), "--pareto"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    costs = [float(line.split(" | ")[2]) for line in table[1:]]
    assert costs == sorted(costs)
    assert all(cost < 1 for cost in costs)


def test_pareto_front_can_be_by_time(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_module.main([str(swept), "--pareto", "--by", "time"]) == 0
    head, _, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert head.startswith("| method | call | seconds / image, relative to the baseline | speed-up |")
    spent = [(float(cells[2]), cells[3]) for cells in (row.split(" | ") for row in rows)]
    assert [cost for cost, _ in spent] == sorted(cost for cost, _ in spent)
    for cost, gain in spent:
        median, low, high = map(float, re.fullmatch(r"(.+)× \((.+)–(.+)\)", gain).groups())  # type: ignore[union-attr]
        assert low <= median <= high
        assert cost * median == pytest.approx(1, rel=0.01)


def test_pareto_names_methods_without_measured_cost(swept: Path) -> None:
    """A method without times is not one that others beat."""
    found, _ = results_module.read(swept)
    assert "Not compared" not in pareto.markdown(found, "time")
    assert "for lack of it" not in pareto_plot.svg(found)
    found["rows"][2]["speedup"] = None
    assert "Not compared, without measured time: tofu 50%." in pareto.markdown(found, "time").splitlines()
    assert "Not compared" not in pareto.markdown(found, "flops")
    assert "(1 not shown: not measured)" in pareto_plot.svg(found)


def test_pareto_front_is_empty_where_every_method_is_slower(swept: Path) -> None:
    found, _ = results_module.read(swept)
    for row in found["rows"]:
        row["flops"] = None
        row["speedup"] = {**row["speedup"], "median": 0.9}
    shown = pareto.markdown(found)
    assert "No method costs less than the baseline." in shown
    assert "apply_patch" not in shown
    assert "Pareto-optimal" in pareto_plot.svg(found)


def test_plot_shows_selected_rows(swept: Path, tmp_path: Path) -> None:
    """The baseline, of which costs are shares, need not be among them."""
    rows = ["--rows", "tofu 25%", "prune 25%"]
    assert report_module.main([str(swept), "--plot", str(tmp_path / "some.svg"), *rows]) == 0
    plot = (tmp_path / "some.svg").read_text()
    assert "tofu 25%" in plot
    assert "todo" not in plot


def test_every_part_of_a_report_names_metric_implementations(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (["--markdown"], ["--pareto"], ["--against", "tofu 25%"]):
        assert report_module.main([str(swept), *asked]) == 0
        assert "PSNR: float64, peak 255, dB" in capsys.readouterr().out


def test_report_of_many_methods_begins_with_the_pareto_plot(swept: Path) -> None:
    page = (swept / "report.html").read_text()
    assert page.index("Quality against cost") < page.index("<table")
    marked = re.findall(r'<a href="#([\w+-]+)">[^<]*</a> <span class="front">', page)
    _, _, front = pareto.best(results_module.read(swept)[0])
    assert 0 < len(marked) < 9
    assert set(marked) == {point.row["key"] for point in front}


def test_plot_markers_and_colours_are_unique() -> None:
    methods = ["tofu", "kv:tofu+p", "tome", "tomesd", "todo", "deepcache", "deepcache:tofu", "deepcache:tome"]
    rows = [{"method": method, "ratio": 0.5} for method in methods]
    looks = pareto_plot.Looks.of(rows)
    assert list(looks.colours) == ["tofu", "tome"]
    assert list(looks.marks) == ["tomesd", "todo", "deepcache", "deepcache:tofu", "deepcache:tome"]
    assert len(set(looks.marks.values())) == 5
    assert not set(looks.marks.values()) & set(pareto_plot.FORMS.values())
    markers = {repr(looks.marker(row)) for row in rows}
    assert len(markers) == len(rows)


def test_plot_is_deterministic_and_can_be_written(swept: Path, tmp_path: Path) -> None:
    found, _ = results_module.read(swept)
    assert report_module.main([str(swept), "--plot", str(tmp_path / "plot.svg")]) == 0
    assert (tmp_path / "plot.svg").read_text() == pareto_plot.svg(found)


def part(swept: Path, out: Path, keep: Callable[[dict[str, Any]], bool], gain: float = 0, **settings: Any) -> Path:
    """A folder that holds some rows of a run, as a run of those methods alone would have left it.

    gain: the speed-up of every row, if given.
    """
    found, images = results_module.read(swept)
    if gain:
        found["rows"] = [{**row, "speedup": {**row["speedup"], "median": gain}} for row in found["rows"]]
    rows = [row for row in found["rows"] if row["key"] == "baseline" or keep(row)]
    keys = {row["key"] for row in rows}
    found = {**found, "rows": rows, "settings": {**found["settings"], **settings}}
    found["provenance"] = {**found["provenance"], "command": f"draw {out.name}"}
    results_module.save(out, found, Scores(rows, [image for image in images if image["key"] in keys], []))
    return out


def test_two_runs_of_a_grid_merge_into_the_whole(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that a grid may grow: what is on the frontier is decided among all its rows, not within each run."""
    monkeypatch.setattr(results_module, "write_report", lambda out: None)  # the images are not what is asked for here
    found, images = results_module.read(swept)
    low = part(swept, tmp_path / "low", lambda row: row["ratio"] == 0.25)
    high = part(swept, tmp_path / "high", lambda row: row["ratio"] != 0.25)
    both, their_images = results_module.merge_runs([low, high])
    assert sorted(row["key"] for row in both["rows"]) == sorted(row["key"] for row in found["rows"])
    assert sorted(i["key"] + i["id"] for i in their_images) == sorted(i["key"] + i["id"] for i in images)
    front = {point.row["key"] for point in pareto.best(found)[2]}
    assert {point.row["key"] for point in pareto.best(both)[2]} == front
    for asked in (["--pareto"], ["--markdown"]):
        assert report_module.main([str(low), str(high), *asked]) == 0
        output = capsys.readouterr().out
        assert output.endswith("\n\n`draw low`\n\n`draw high`\n")
    # speed-ups are over the baseline of each run; seconds of the second are not read beside the first's
    columns = {line.split(" | ")[0]: line.split(" | ")[1:3] for line in output.splitlines() if line.startswith("| ")}
    assert columns["| tofu 25%"][1] != "–"
    assert "×" in columns["| tofu 50%"][0]
    assert columns["| tofu 50%"][1] == "–"
    assert "tofu 50%, tofu+p 50%, prune 50%, prune+p 50%, todo: seconds of another run than the baseline's" in output
    assert report_module.main([str(low), str(high), "--markdown", "--columns", "speed-up"]) == 0
    assert "seconds of another run" not in capsys.readouterr().out  # where none are to be shown
    assert report_module.main([str(low), str(high), "--against", "tofu 25%", "--rows", "tofu 25%", "todo"]) == 0
    assert "| todo |" in capsys.readouterr().out


def test_merge_prefers_measured_rows_to_skipped_ones(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a package was not there yet; and one that both skipped is content once."""
    monkeypatch.setattr(results_module, "write_report", lambda out: None)
    found, _ = results_module.read(swept)
    low = part(swept, tmp_path / "low", lambda row: row["ratio"] == 0.25)
    high = part(swept, tmp_path / "high", lambda row: row["ratio"] != 0.25)
    lacking = [{"method": name, "key": name, "ratio": None, "skipped": "no"} for name in ("todo", "gone")]
    for out, some in ((low, lacking), (high, lacking[1:])):
        rows = [*results_module.read(out)[0]["rows"], *some]
        content, images = results_module.read(out)
        results_module.save(out, {**content, "rows": rows}, Scores(rows, images, []))
    both, images = results_module.merge_runs([low, high])
    assert sorted(row["key"] for row in both["rows"]) == sorted([*(row["key"] for row in found["rows"]), "gone"])
    assert [row["key"] for row in both["rows"] if "skipped" in row] == ["gone"]
    assert any(image["key"] == "todo" for image in images)


def test_times_can_be_taken_from_another_run(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of a grid that grew were not generated beside the baseline, and say nothing of speed themselves."""
    monkeypatch.setattr(results_module, "write_report", lambda out: None)
    low = part(swept, tmp_path / "low", lambda row: row["ratio"] == 0.25, gain=2)
    high = part(swept, tmp_path / "high", lambda row: row["ratio"] != 0.25, gain=3)
    speed = part(swept, tmp_path / "speed", lambda row: row["method"] != "todo", gain=4, n=3, device="another machine")
    assert (
        report_module.main([str(low), str(high), "--times", str(speed), "--markdown", "--columns", "speed-up", "PSNR"])
        == 0
    )
    table = capsys.readouterr().out
    gains = {line.split(" | ")[0]: line.split(" | ")[1][:5] for line in table.splitlines() if "%" in line[:20]}
    assert len(gains) == 8
    assert set(gains.values()) == {"4.00×"}
    assert "| todo | – |" in table
    assert "todo: no times, it is not in the run that times are of" in table
    assert (
        "Speed-up: median of 1 batches, step by step. Ranges of speed-up and seconds: 5th to 95th percentile. "
        "All times are of another run, on another machine, of commit" in table
    )
    assert table.endswith("\n\n`draw low`\n\n`draw high`\n\n`draw speed`\n")
    assert report_module.main([str(low), str(high), "--times", str(speed), "--pareto"]) == 0
    assert "All times are of another run, on another machine, of commit" in capsys.readouterr().out
    plot_file = tmp_path / "plot.svg"
    assert report_module.main([str(low), str(high), "--times", str(speed), "--plot", str(plot_file)]) == 0
    assert plot_file.exists()
    older = part(swept, tmp_path / "older", lambda row: True, gain=5, tokenizers=None)
    assert (
        report_module.main([str(low), "--times", str(older), "--pareto"]) == 0
    )  # what it does not tell is no difference
    assert "5.00×" in capsys.readouterr().out
    other = part(swept, tmp_path / "other", lambda row: True, tokenizers="others")
    assert report_module.main([str(low), "--times", str(other), "--pareto"]) == 2
    assert "low and other cannot be compared: tokenizers is '" in capsys.readouterr().err
    other = part(swept, tmp_path / "other", lambda row: True, dtype="float16")
    assert report_module.main([str(low), "--times", str(other), "--pareto"]) == 2
    assert "low and other cannot be compared: dtype is 'float32' in one, 'float16'" in capsys.readouterr().err


def test_rows_without_interleaved_timing_are_named(swept: Path) -> None:
    """As older runs were: a shared machine is another one a turn later."""
    found, _ = results_module.read(swept)
    assert " batches, step by step. Ranges of speed-up and seconds" in tables.markdown(found)
    del found["rows"][1]["interleaved"]
    assert ", step by step but for tofu 25%, which were timed by turns. Ranges" in tables.markdown(found)
    for row in found["rows"]:
        row.pop("interleaved", None)
    assert "step by step" not in tables.markdown(found)
    found["rows"][2]["same_run"] = False
    shown = tables.markdown(found, ["speed-up", "s/image"])
    line = next(line for line in shown.splitlines() if line.startswith(f"| {tables.label(found['rows'][2])} |"))
    assert re.fullmatch(r"\| [^|]+ \| \d.*× \([^)]*\) \| – \|", line)
    assert f"{tables.label(found['rows'][2])}: seconds of another run than the baseline's are not shown" in shown


def test_number_of_timed_batches_is_reported(swept: Path) -> None:
    """A row of three batches has the narrowest spread, and looks like the best measured."""
    found, _ = results_module.read(swept)
    n = found["rows"][0]["speedup"]["n"]
    found["rows"][2]["speedup"]["n"] = n + 1
    assert (
        f"Speed-up: median of {n} batches (tofu 50% of {n + 1}), step by step. Ranges of speed-up and seconds"
        in tables.markdown(found)
    )
    few = [row for row in found["rows"] if row["ratio"] == 0.5][1:]
    for row in few:
        row["speedup"]["n"] = n - 1
    names = ", ".join(tables.label(row) for row in few)
    assert (
        f"(tofu 50% of {n + 1}; {names} of {n - 1}), step by step. Ranges of speed-up and seconds"
        in tables.markdown(found)
    )


def test_rows_without_the_baseline_have_no_times(swept: Path) -> None:
    found, _ = results_module.read(swept)
    found["rows"][1]["speedup"] = None
    (line,) = (line for line in tables.markdown(found).splitlines() if line.startswith("| tofu 25% "))
    assert line.startswith("| tofu 25% | – | – | – |")
    assert "tofu 25%: no times, the baseline was not timed beside it" in tables.markdown(found)


def test_merge_refuses_other_images(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results_module, "write_report", lambda out: None)
    low = part(swept, tmp_path / "low", lambda row: row["ratio"] == 0.25)
    other = part(swept, tmp_path / "other", lambda row: row["ratio"] != 0.25)
    found, images = results_module.read(other)
    moved = [{**image, "id": image["id"].replace("0004", "0009")} for image in images]
    results_module.save(other, found, Scores(found["rows"], moved, []))
    assert report_module.main([str(low), str(other), "--against", "tofu 25%"]) == 2
    assert "low and other are of other images: 0004, 0009" in capsys.readouterr().err


def test_merge_refuses_other_settings_or_metrics(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results_module, "write_report", lambda out: None)
    low = part(swept, tmp_path / "low", lambda row: row["ratio"] == 0.25)
    other = part(swept, tmp_path / "other", lambda row: row["ratio"] != 0.25, device="another")
    assert report_module.main([str(low), str(other), "--pareto"]) == 2
    assert "low and other cannot be compared: device is 'cpu" in capsys.readouterr().err
    fewer = part(swept, tmp_path / "fewer", lambda row: row["ratio"] != 0.25)
    found = files.read_json(fewer / "results.json")
    files.write_json(fewer / "results.json", {**found, "metrics": found["metrics"][:1]})
    assert report_module.main([str(low), str(fewer), "--pareto"]) == 2
    assert "low and fewer cannot be compared: SSIM is measured in one alone" in capsys.readouterr().err
    for asked, said in (([], "the whole report"), (["--grid", str(tmp_path / "grid.png")], "--grid")):
        assert report_module.main([str(low), str(fewer), *asked]) == 2
        assert f"{said} shows the images of one folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pareto", "--rows", "tofu 25%"], "--rows has no effect on --pareto"),  # of some it would be another one
        (["--against", "tofu 25%", "--columns", "PSNR"], "--columns has no effect on --against"),
        (["--markdown", "--first", "2"], "--first has no effect on --markdown"),
        (["--plot", "a.svg", "--by", "time"], "--by has no effect on --plot"),
        (["--against", "tofu 25%", "--times", "run"], "--times has no effect on --against"),
        (["--rows", "tofu 25%"], "--rows has no effect on the whole report"),
        (["--markdwn"], "unrecognized arguments: --markdwn"),
    ],
)
def test_report_options_without_effect_are_refused(
    swept: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_module.main([str(swept), *arguments]) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert (output.out, output.err.count("\n")) == ("", 1)


def test_methods_equal_to_the_baseline_have_a_report_without_pareto_plot(tmp_path: Path) -> None:
    """Their PSNR is infinite."""
    (tmp_path / "own.txt").write_text("a fox")
    pipe = sd15_pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load_model", lambda *_: (pipe, None))
        own = ["--model", "tiny", "--prompts", str(tmp_path / "own.txt"), "--steps", "1", "--size", "64"]
        methods = ["--method", "tofu,tome", "--ratio", "0", "--metrics", "psnr"]
        assert run.main([*own, *methods, "--out", str(tmp_path / "out")]) == 0
    assert "Quality against cost" not in (tmp_path / "out" / "report.html").read_text()


def test_pareto_needs_a_metric(swept: Path) -> None:
    found, _ = results_module.read(swept)
    with pytest.raises(EvalError, match="LPIPS, MS-SSIM or PSNR"):
        pareto.markdown({**found, "metrics": []})


def test_pareto_needs_two_methods(swept: Path) -> None:
    found, _ = results_module.read(swept)
    with pytest.raises(EvalError, match="two methods"):
        pareto_plot.svg({**found, "rows": found["rows"][:2]})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--reduction", "tofoo"], "unknown reduction 'tofoo' (did you mean 'tofu'?)"),
        (["--form", "q"], "unknown form 'q'"),
        (["--method", "tofu"], "the grid names the methods"),
        (["--with", "windows=8", "--also", "none"], "unknown option 'windows' (did you mean 'window'?)"),
        (["--also", "tomsd"], "unknown method 'tomsd' (did you mean 'tomesd'?)"),
        (["--stepps", "3"], "unrecognized arguments: --stepps"),
    ],
)
def test_invalid_input_prints_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(arguments) == 2
    output: Any = capsys.readouterr()
    assert said in output.err
    assert output.out == ""
