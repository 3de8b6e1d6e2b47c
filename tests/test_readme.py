"""The README's code runs, its commands are those CI runs, its links lead somewhere, its options exist."""

import importlib
import re
import runpy
from dataclasses import fields
from functools import partial
from pathlib import Path

import diffusers
import pytest
import tiny

import tofu_sd
from eval import EvalError
from eval import report as report_module
from eval.evaluation import options
from eval.reporting import pages

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def names_of(code, folder, names=None):
    """The names that code leaves behind."""
    (folder / "code.py").write_text(code)
    return runpy.run_path(str(folder / "code.py"), init_globals=names)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_its_python_runs_as_it_stands(number, tmp_path):
    pipe = tofu_sd.demo.load()
    pipe.set_progress_bar_config(disable=True)
    names = {"pipe": pipe, "tofu_sd": tofu_sd}  # the first block imports it for all that follow
    names = names_of(blocks("python")[number], tmp_path, names)
    assert tofu_sd.summary(names["pipe"]).config is not None  # each block ends with a patched pipeline


DIFFUSERS = (ROOT / "docs" / "diffusers.md").read_text()


@pytest.fixture
def small_models(monkeypatch):
    """Every published model is a tiny one of its kind, on the CPU, and draws 64 pixels."""
    made = {diffusers.ControlNetModel: tiny.controlnet}
    for family, pipe, names in (("", tiny.sd15_pipe, ("", "Img2Img", "Inpaint", "ControlNet", "PAG")),
                                ("XL", tiny.sdxl_pipe, ("", "Img2Img", "Inpaint"))):  # fmt: skip
        for name in names:
            kind = getattr(diffusers, f"StableDiffusion{family}{name}Pipeline")
            made[kind] = partial(pipe, kind)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "load_ip_adapter", tiny.with_ip_adapter)
    for kind, make in made.items():
        monkeypatch.setattr(kind, "from_pretrained", lambda name, torch_dtype=None, make=make, **parts: make(**parts))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, *where, **how: pipe)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", lambda pipe: None)
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "compile_repeated_blocks", lambda unet, fullgraph: None)


@pytest.mark.parametrize("number", range(len(blocks("python", DIFFUSERS))))
def test_the_diffusers_page_runs_as_it_stands(small_models, number, tmp_path):
    code = blocks("python", DIFFUSERS)[number]
    assert "num_inference_steps=20" in code
    names = names_of(code.replace("num_inference_steps=20", "num_inference_steps=2").replace("512", "64"), tmp_path)
    assert names["image"].size[0] >= 64


def test_the_classifiers_page_runs_as_it_stands(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
    (code,) = blocks("python", (ROOT / "docs" / "classifiers.md").read_text())
    names = names_of(code, tmp_path)
    assert type(names["model"].blocks[0]).__name__ == "Block"  # the patch is gone at its end


def test_the_diffusers_page_quotes_what_is_said():
    """Messages change; whoever looks one up should find it."""
    told = re.findall(r"^\| (.*?) \|", DIFFUSERS.split("| message begins |")[1], flags=re.MULTILINE)
    source = "".join(path.read_text() for path in (ROOT / "tofu_sd").rglob("*.py"))
    assert len(told) == 4
    for message in told:
        words = [word for word in message.strip("`").replace("…", "").split() if not word[0].isdigit()]
        assert all(word in source for word in words), message


def test_ci_runs_its_test_command():
    ci = (ROOT / ".ci" / "run").read_text().replace(" --quiet", "").replace(" --clear", "")
    tests = next(block for block in blocks("bash") if "pytest" in block)
    for command in tests.strip().split(" && "):
        assert command in ci, command


@pytest.mark.parametrize(("page", "least"), [("README.md", 7), ("docs/evaluation.md", 16), ("docs/settings.md", 1)])
def test_evaluation_commands_are_understood(page, least):
    text = (ROOT / page).read_text()
    commands = re.findall(
        r"-m ((?:eval|research)\.[\w.]+)(?: ([^#`\n]*))?", re.sub(r"<!--.*?<!-- end -->", "", text, flags=re.DOTALL)
    )
    assert len(commands) >= least
    for program, arguments in commands:
        if program == "research.classifiers.classify":
            pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
        parser = options.parser() if program == "eval.run" else importlib.import_module(program).parser()
        _, others = parser.parse_known_args(arguments.replace("...", "").split())
        assert not others or program == "eval.sweep"  # whose other options are a run's
        options.parser().parse_args(others)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))])
def test_tables_are_what_their_commands_print(page, monkeypatch):
    """No figure is written by hand, and none stays when results change (`python -m eval.reporting.pages`)."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text()
    if "<!-- python -m research.classifiers.classify" in text:
        pytest.importorskip("timm", reason="timm is not installed (it needs a torchvision that fits the torch)")
    assert pages.filled(text) == text


def test_the_frontier_is_drawn_of_what_the_table_below_it_is_of(tmp_path, monkeypatch):
    """Its texts and all figures that it shows. Where ink lies may change with matplotlib."""
    monkeypatch.chdir(ROOT)
    folders = re.search(r"<!-- python -m eval\.report (.*) --frontier -->", README)[1].split()
    assert report_module.main([*folders, "--plot", str(tmp_path / "plot.svg")]) == 0
    drawn, kept = (
        re.findall(r"<(?:text|dc:description)[^>]*>([^<]+)</", path.read_text())
        for path in (tmp_path / "plot.svg", ROOT / "docs" / "frontier.svg")
    )
    assert len(kept) > 50
    assert any(re.fullmatch(r"[0-9a-f]{16}", text) for text in kept)
    assert drawn == kept


def test_a_table_is_written_anew_and_the_page_around_it_stays(monkeypatch):
    monkeypatch.setattr(report_module, "main", lambda argv: print("|", *argv, "|"))
    page = "# A\n<!-- python -m eval.report runs/x --rows 'tofu 50%' -->\nold\n<!-- end -->\nb <!-- end -->\n"
    new = page.replace("old", "| runs/x --rows tofu 50% |")
    assert pages.filled(page) == pages.filled(new) == new
    monkeypatch.setattr(report_module, "main", lambda argv: 2)
    with pytest.raises(EvalError, match=r"eval\.report runs/x"):
        pages.filled(page)


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_its_table_lists_every_option():
    section = README.split("| option |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", section.replace("`help(TokenFusion)`", "")))
    assert named == {field.name for field in fields(tofu_sd.TokenFusionConfig)}
