"""Pages: code runs, commands parse, tables and records are current, links resolve."""

import importlib
import json
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import diffusers
import pytest
import tiny
import tiny_pipelines

import tofu_sd
from eval import EvalError
from eval import report as report_module
from eval.evaluation import options
from eval.reporting import pages, records

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [str(page) for page in pages.pages_of(ROOT)]
GENERATED = re.compile(r"<!-- python.*?<!-- end -->", re.DOTALL)


def code_blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def run_code(code, folder, names=None):
    """Runs code and returns its global variables."""
    (folder / "code.py").write_text(code)
    return runpy.run_path(str(folder / "code.py"), init_globals=names)


@pytest.mark.parametrize("number", range(len(code_blocks("python"))))
def test_readme_python_runs_unchanged(number, tmp_path):
    pipe = tofu_sd.demo.load()
    pipe.set_progress_bar_config(disable=True)
    names = {"pipe": pipe, "tofu_sd": tofu_sd}  # the first block imports tofu_sd for all others
    names = run_code(code_blocks("python")[number], tmp_path, names)
    assert tofu_sd.summary(names["pipe"]).config is not None  # each block ends with a patched pipeline


DIFFUSERS = (ROOT / "docs" / "diffusers.md").read_text()


@pytest.fixture
def tiny_models(monkeypatch):
    """Replaces every published model by a tiny one of the same class, on the CPU, that generates 64 px."""
    constructors = {diffusers.ControlNetModel: tiny.controlnet}
    for family, pipe, names in (("", tiny.sd15_pipe, ("", "Img2Img", "Inpaint", "ControlNet", "PAG")),
                                ("XL", tiny.sdxl_pipe, ("", "Img2Img", "Inpaint"))):  # fmt: skip
        for name in names:
            kind = getattr(diffusers, f"StableDiffusion{family}{name}Pipeline")
            constructors[kind] = partial(pipe, kind)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "load_ip_adapter", tiny.with_ip_adapter)
    for kind, make in constructors.items():
        monkeypatch.setattr(kind, "from_pretrained", lambda name, torch_dtype=None, make=make, **parts: make(**parts))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, *where, **how: pipe)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", lambda pipe: None)
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "compile_repeated_blocks", lambda unet, fullgraph: None)


@pytest.fixture
def tiny_transformer_pipes(monkeypatch):
    """The same for diffusion transformers. Their texts are noise, as most of their tokenizers are megabytes."""
    for kind, (make, texts) in tiny_pipelines.PIPELINES.items():
        monkeypatch.setattr(kind, "from_pretrained", lambda name, torch_dtype=None, make=make: make())
        if texts is not None:
            monkeypatch.setattr(kind, "encode_prompt", lambda *_, texts=texts, **__: texts)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, *where, **how: pipe)


@pytest.mark.parametrize("number", range(len(code_blocks("python", DIFFUSERS))))
def test_diffusers_page_python_runs(tiny_models, number, tmp_path):
    code = code_blocks("python", DIFFUSERS)[number]
    assert "num_inference_steps=20" in code
    names = run_code(code.replace("num_inference_steps=20", "num_inference_steps=2").replace("512", "64"), tmp_path)
    assert names["image"].size[0] >= 64


TRANSFORMERS = (ROOT / "docs" / "tables" / "transformers.md").read_text()


@pytest.mark.parametrize("number", range(len(code_blocks("python", TRANSFORMERS))))
def test_transformers_page_python_runs(tiny_transformer_pipes, number, tmp_path):
    code = code_blocks("python", TRANSFORMERS)[number]
    assert "num_inference_steps=20" in code
    names = run_code(code.replace("num_inference_steps=20", "num_inference_steps=2").replace("1024", "128"), tmp_path)
    assert names["image"].size == (128, 128)
    names["tofu_sd"].remove_patch(names["pipe"])  # raises for a pipeline that has no transformer


def test_classifiers_page_python_runs_unchanged(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
    (code,) = code_blocks("python", (ROOT / "docs" / "classifiers.md").read_text())
    names = run_code(code, tmp_path)
    assert type(names["model"].blocks[0]).__name__ == "Block"  # the example removes the patch at its end


def test_diffusers_page_quotes_messages_of_the_package():
    """Users who search for a message find it on the page, so it must match the source."""
    messages = re.findall(r"^\| (.*?) \|", DIFFUSERS.split("| message begins |")[1], flags=re.MULTILINE)
    source = "".join(path.read_text() for path in (ROOT / "tofu_sd").rglob("*.py"))
    assert len(messages) == 5
    for message in messages:
        words = [word for word in message.strip("`").replace("…", "").split() if not word[0].isdigit()]
        assert all(word in source for word in words), message


def test_ci_runs_the_test_command_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text().replace(" --quiet", "").replace(" --clear", "")
    tests = next(block for block in code_blocks("bash") if "pytest" in block)
    for command in tests.strip().split(" && "):
        assert command in ci, command


@pytest.mark.parametrize(
    ("page", "min_commands"),
    [
        ("README.md", 5),
        ("docs/add_a_method.md", 3),
        ("docs/classifiers.md", 5),
        ("docs/evaluation.md", 14),
        ("docs/performance.md", 4),
        ("docs/settings.md", 1),
        ("CONTRIBUTING.md", 3),
    ],
)
def test_commands_of_pages_parse(page, min_commands):
    text = GENERATED.sub("", (ROOT / page).read_text())
    commands = re.findall(r"-m ((?:eval|research)\.[\w.]+)(?: ([^#`\n]*))?", text)
    assert len(commands) >= min_commands
    for program, arguments in commands:
        if program == "research.classifiers.classify":
            pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
        parser = options.parser() if program == "eval.run" else importlib.import_module(program).parser()
        words = arguments.replace("...", "").split()
        needs_folder = program in ("eval.report", "eval.compare") and not words
        _, unknown = parser.parse_known_args(["a", "b"] if needs_folder else words)
        assert not unknown or program == "eval.sweep"  # eval.sweep passes other options to eval.run
        options.parser().parse_args(unknown)


# features of transformers take a minute, and are compared in tests/eval/families, which run early
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/tables/transformers.md"])
def test_tables_equal_the_output_of_their_commands(page, monkeypatch):
    """Every number is generated, and changes with the results (`python -m eval.reporting.pages`)."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text()
    if "<!-- python -m research.classifiers.classify" in text:
        pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
    assert pages.filled(text, pages.to_root(Path(page))) == text
    assert len(pages.TABLE.findall(text)) == text.count("<!-- python")  # every table has a known command


def test_result_records_are_current(monkeypatch):
    monkeypatch.chdir(ROOT)
    expected = dict(records.written(pages.RESULTS))
    assert set(expected) >= {folder / "README.md" for folder in pages.RESULTS.iterdir() if folder.is_dir()}
    for file, text in expected.items():
        assert file.read_text() == text, file


def test_option_table_equals_the_output_of_its_module():
    output = subprocess.run(
        [sys.executable, "-m", "tofu_sd.config"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    page = (ROOT / "docs" / "tables" / "options.md").read_text()
    assert f"<!-- python -m tofu_sd.config -->\n{output}<!-- end -->" in page
    options_in_table = set(re.findall(r"^\| `(\w+)`", page, flags=re.MULTILINE))
    assert options_in_table == {field.name for field in fields(tofu_sd.TokenFusionConfig)}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_page_has_short_lines_and_plain_words(page):
    """Lines fit a screen; no exception text, no number of an uncommitted tree, no banned word."""
    text = (ROOT / page).read_text()
    long = [line for line in text.splitlines() if len(line) > 200 and not line.startswith(("|", "<!-- python"))]
    assert not long
    assert not re.search(r"\w\+changes|urlopen|Errno|Traceback", text)
    assert not re.search(r"\b(told|alike|anew|take_stock|leave_alone|sighting)\b", text, flags=re.IGNORECASE)


PROGRAMS = (
    "eval.run", "eval.sweep", "eval.bench", "eval.compare", "eval.report", "eval.prompts", "eval.validate",
    "eval.support", "eval.speed.stand_in", "research.classifiers.classify", "research.classifiers.train",
    "research.adaptivision.ablations",
)  # fmt: skip
OTHER_OPTIONS = {"--num_processes", "--no-deps"}  # of accelerate and pip


@pytest.mark.parametrize("page", [page for page in PAGES if "tables" not in page])
def test_options_named_in_text_exist(page):
    """A renamed option may stay in prose, where no command is parsed."""
    pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
    parsers = [options.parser(), *(importlib.import_module(name).parser() for name in PROGRAMS[1:])]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    text = re.sub(
        r"```.*?```|^    .*?$", "", GENERATED.sub("", (ROOT / page).read_text()), flags=re.DOTALL | re.MULTILINE
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(re.findall(r"`([^`]+)`", text))))
    assert not named - known - OTHER_OPTIONS


def test_pages_are_below_size_limits():
    """README and pages stay short enough to be read completely."""
    assert len(README.encode()) <= 8192
    assert README.count("\n") <= 120
    assert sum(len(page.read_bytes()) for page in (ROOT / "docs").glob("*.md")) <= 61_440


def test_readme_speedups_equal_the_benchmarks():
    """The README table by hardware is manual; its numbers equal results of committed trees."""

    def speedups(name, scope, method):
        bench = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert not bench["provenance"]["commit"].endswith("+changes")
        rows = [row for row in bench["rows"] if (row["scope"], row["method"]) == (scope, method)]
        return [f"{row['speedup']['value']:.2f}" for row in rows]

    rows = [line.split(" | ") for line in README.splitlines() if line.startswith(("| CPU", "| same CPU"))]
    step, attention = rows
    expected = [speedups("bench-cpu-unet-options", "unet", name)[0] for name in ("ideal", "tofu", "faithful")]
    expected += speedups("bench-cpu-unet", "unet", "deepcache")
    assert [re.sub("[×*]", "", cell) for cell in step[1:5]] == expected
    for cell, method in zip(attention[1:3], ("ideal", "tofu"), strict=True):
        values = speedups("bench-cpu-sizes", "attention", method)
        assert cell == f"{min(values)}–{max(values)}×"
    gpu_rows = [line for line in README.splitlines() if line.startswith("| ") and "H200" in line]
    assert len(gpu_rows) == 2
    assert not re.search(r"\d×", "".join(gpu_rows))  # H200 results are of an uncommitted tree


def test_pareto_plot_shows_the_data_of_the_table(tmp_path, monkeypatch):
    """Compares the texts and numbers of the plot; coordinates may change with matplotlib."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "tables" / "quality.md").read_text()
    folders = re.search(r"<!-- python -m eval\.report (.*) --pareto -->", page)[1].split()
    assert report_module.main([*folders, "--plot", str(tmp_path / "plot.svg")]) == 0
    plotted, published = (
        re.findall(r"<(?:text|dc:description)[^>]*>([^<]+)</", path.read_text())
        for path in (tmp_path / "plot.svg", ROOT / "docs" / "pareto.svg")
    )
    assert len(published) > 50
    assert any(re.fullmatch(r"[0-9a-f]{16}", text) for text in published)
    assert plotted == published


def test_table_is_rewritten_and_its_page_stays_unchanged(monkeypatch):
    monkeypatch.setattr(report_module, "main", lambda argv: print("|", *argv, "|"))
    page = "# A\n<!-- python -m eval.report runs/x --rows 'tofu 50%' -->\nold\n<!-- end -->\nb <!-- end -->\n"
    new = page.replace("old", "| runs/x --rows tofu 50% |")
    assert pages.filled(page) == pages.filled(new) == new
    monkeypatch.setattr(report_module, "main", lambda argv: 2)
    with pytest.raises(EvalError, match=r"eval\.report runs/x"):
        pages.filled(page)


def test_table_links_are_relative_to_the_page(monkeypatch):
    monkeypatch.setattr(report_module, "main", lambda argv: print("[x](benchmarks/results/x/README.md)"))
    page = "<!-- python -m eval.report x -->\n<!-- end -->\n"
    assert "](benchmarks/" in pages.filled(page, pages.to_root(Path("README.md")))
    assert "](../../benchmarks/" in pages.filled(page, pages.to_root(Path("docs/tables/quality.md")))


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_resolve(page):
    text = (ROOT / page).read_text()
    for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", text):
        if target.startswith("https://"):
            continue
        file = ((ROOT / page).parent / target) if target else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            assert anchor[1:] in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], anchor
