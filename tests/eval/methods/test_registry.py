"""Methods are registered by name, loaded from files, and never share a row."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from eval import EvalError
from eval.methods import registry
from eval.methods import registry as methods
from eval.methods.registry import parse, register_method

FILE = """
from contextlib import contextmanager
import torch
from eval.methods.registry import register_method
from tofu_sd import TokenFusionConfig
from tofu_sd.core.matching import register_matcher
from tofu_sd.core.reductions import mean, register_reduction
from tofu_sd.core.token_map import TokenMap

@register_method("zeros_out")
@contextmanager
def zeros_out(pipe):
    handle = pipe.unet.register_forward_hook(lambda module, args, out: (0 * out[0],))
    yield
    handle.remove()

@register_matcher("every_other")
def every_other(tokens, grid, config):
    batch, total, _ = tokens.shape
    kept_idx = torch.arange(len(grid.num_merged), total)
    group_idx = torch.arange(total).sub(len(grid.num_merged)).clamp_min(0)
    return TokenMap(kept_idx.expand(batch, -1), group_idx.expand(batch, -1))

@register_reduction
def halved(x, map):
    return mean(x, map) / 2

gentle = TokenFusionConfig(kv_only=True)
"""


pytestmark = pytest.mark.usefixtures("registries")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_method.py").write_text(FILE)
    return tmp_path / "my_method.py"


@pytest.mark.parametrize(("name", "slug"), [
    ("zeros_out", "zeros_out"),
    ("every_other", "tofu-r50-every_other"),
    ("every_other@kv_only=True", "kv-tofu-r50-every_other"),
    ("halved", "halved-r50"),
    ("halved@late=mean", "halved-mean-r50"),
    ("gentle", "kv-tofu-r50"),
    ("gentle@ratio=0.25", "kv-tofu-r25"),
])  # fmt: skip
def test_a_file_brings_a_method_a_matcher_a_reduction_or_a_configuration(file: Path, name: str, slug: str) -> None:
    (method,) = parse(f"my_method.py:{name}", [0.5])
    assert method.slug == slug


def test_a_file_is_loaded_once_however_its_path_is_written(file: Path) -> None:
    """Its second load would register its names again, from another file by its path."""
    (file.parent / "other").mkdir()
    paths = ("my_method.py", "other/../my_method.py", str(file))
    assert len({parse(f"{path}:every_other", [0.5])[0].slug for path in paths}) == 1


def test_a_method_from_a_file_generates(file: Path) -> None:
    pipe = tiny.sd15_pipe()
    (method,) = parse("my_method.py:every_other", [0.5])
    call = tiny.inputs(pipe.unet)
    plain = tiny.predict(pipe.unet, **call)
    with method.apply(pipe):
        assert not torch.equal(tiny.predict(pipe.unet, **call), plain)
    assert torch.equal(tiny.predict(pipe.unet, **call), plain)


def test_a_changed_file_is_another_method(file: Path) -> None:
    """Else its old images would be taken for new ones."""
    for name in ("zeros_out", "every_other", "gentle"):
        (before,) = parse(f"my_method.py:{name}", [0.5])
        file.write_text(file.read_text() + "# changed\n")
        registry._load.cache_clear()
        (after,) = parse(f"my_method.py:{name}", [0.5])
        assert before.identity != after.identity


@pytest.mark.parametrize(("name", "message"), [
    ("none.py:mine", "none.py: there is no such file"),
    ("my_method.py:mine", "my_method.py has no 'mine'; it has zeros_out, every_other, halved, gentle"),
    ("my_method.py:every_ohter", r"my_method.py has no 'every_ohter' \(did you mean 'every_other'\?\); it has"),
    ("my_method.py:bipartite", "my_method.py has no 'bipartite'; it has"),
    ("my_method.py:zeros_out@levels=2", "'zeros_out' is a whole-pipeline patch and has no @option=value"),
    ("my_method.py:tome", "my_method.py: a method named 'tome' exists already: give yours another name"),
    ("my_method.py:deepcache", "my_method.py: a method named 'deepcache' exists already: give yours another name"),
    ("my_method.py:gentle@ratoi=1", r"unknown option 'ratoi' \(did you mean 'ratio'"),
    ("my_method.py:gentle@ratio=2", "ratio is 2; it must be a number from 0 to 0.75"),
])  # fmt: skip
def test_unknown_name_in_a_method_file_is_refused(file: Path, name: str, message: str) -> None:
    with pytest.raises(EvalError, match=message) as refused:
        parse(name, [0.5])
    assert "\n" not in str(refused.value)


def test_a_file_that_fails_is_refused_in_a_line(file: Path) -> None:
    file.write_text("import nothing_of_this_name")
    with pytest.raises(EvalError, match=r"my_method\.py: ModuleNotFoundError: No module named 'nothing_of_this_name'"):
        parse("my_method.py:mine", [0.5])


REGISTER = {
    "method": "@register_method('NAME')\n@contextmanager\ndef mine(pipe):\n    yield\n",
    "matcher": "@register_matcher('NAME')\ndef mine(tokens, grid, config): ...\n",
    "reduction": "@register_reduction\ndef NAME(x, map): ...\n",
}


@pytest.mark.parametrize("name", ["tome", "tofu", "deepcache", "full", "baseline", "ideal"])
@pytest.mark.parametrize("kind", REGISTER)
def test_a_file_cannot_take_the_name_of_a_method(file: Path, kind: str, name: str) -> None:
    """Two rows of a table would have one label, and one of them was dropped."""
    file.write_text(FILE + REGISTER[kind].replace("NAME", name))
    for asked in (name, "every_other"):
        with pytest.raises(EvalError) as refused:
            parse(f"my_method.py:{asked}", [0.5])
        assert str(refused.value) == (
            f"--method my_method.py: a method named {name!r} exists already: give yours another name"
        )
        registry._load.cache_clear()


def test_a_taken_matcher_or_reduction_name_is_one_line_without_an_error_class(file: Path) -> None:
    for name, kind in (("bipartite", "matcher"), ("prune", "reduction")):
        file.write_text(FILE + REGISTER[kind].replace("NAME", name))
        registry._load.cache_clear()
        with pytest.raises(EvalError, match=rf"^--method my_method\.py: a {kind} named '{name}' is registered already"):
            parse("my_method.py:gentle", [0.5])


def test_a_file_that_registers_nothing_says_what_to_use(file: Path) -> None:
    file.write_text("x = 1")
    with pytest.raises(EvalError, match=r"my_method\.py registers nothing .*use @register_method, @register_matcher"):
        parse("my_method.py:mine", [0.5])


@pytest.mark.parametrize("name", ["tofu@matching=xx", "tofu@early=xx", "my_method.py:gentle@matching=xx"])
def test_unknown_matcher_or_reduction_says_how_to_load_one_from_a_file(file: Path, name: str) -> None:
    with pytest.raises(EvalError, match=r"'xx'.*'?(bipartite|prune)'?.*; --method FILE\.py:NAME loads one from a file"):
        parse(name, [0.5])


@pytest.mark.parametrize("names", ["faithful,tome+p@window=8", "tofu@ratio=0.5,tofu@early=prune"])
def test_two_names_of_one_method_are_refused(names: str) -> None:
    """One of their rows would be lost."""
    with pytest.raises(EvalError, match="would share the row and the folder"):
        parse(names, [0.5])


@pytest.mark.parametrize("name", ["tofu", "baseline", "tomesd"])
def test_duplicate_method_name_is_refused(name: str) -> None:
    @contextmanager
    def mine(pipe: Any) -> Iterator[Any]:
        yield pipe

    with pytest.raises(ValueError, match=f"a method named '{name}' exists already"):
        register_method(name)(mine)


@pytest.mark.parametrize("name", ["", "a:b", "a/b", "a b"])
def test_a_name_that_cannot_name_a_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="as it names a folder"):
        register_method(name)


def test_methods_are_parsed_in_order_without_duplicates():
    found = methods.parse("tofu, kv:tome+p,full,tofu", [0.25, 0.5])
    assert [(m.name, m.ratio) for m in found] == [
        ("tofu", 0.25), ("tofu", 0.5), ("kv:tome+p", 0.25), ("kv:tome+p", 0.5), ("baseline", None),
    ]  # fmt: skip
    assert len({m.slug for m in found}) == 5


def test_ratio_option_of_a_method_is_shown_as_its_ratio():
    (own,), (asked,) = (methods.parse(*args) for args in (("kv:tome+p@ratio=0.75", [0.5]), ("kv:tome+p", [0.75])))
    assert (own.name, own.ratio, own.slug) == (asked.name, asked.ratio, asked.slug)
    (windowed,) = methods.parse("tofu@window=4@ratio=0.25", [0.5])
    assert (windowed.name, windowed.ratio) == ("tofu@window=4", 0.25)


def test_missing_package_of_a_method_says_what_to_install(monkeypatch):
    monkeypatch.setattr(methods, "version", lambda name: None)
    (method,) = methods.parse("tomesd", [0.5])
    assert method.unavailable_reason == "pip install tomesd"


def test_folder_with_the_name_of_a_package_is_not_the_package(monkeypatch, tmp_path):
    """Whoever has cloned it beside the images could import that folder, which is empty to Python."""
    (tmp_path / "ghost").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("ghost")
    assert methods.MethodSpec(nullcontext, Path("a.py"), ("ghost", "ghost")).unavailable_reason == "pip install ghost"


def test_tomesd_patch_is_removed(pipe):
    pytest.importorskip("tomesd")
    (method,) = methods.parse("tomesd", [0.5])
    classes = [type(module) for module in pipe.unet.modules()]
    with method.apply(pipe):
        assert [type(module) for module in pipe.unet.modules()] != classes
    assert [type(module) for module in pipe.unet.modules()] == classes


def test_row_is_labelled_with_its_effective_ratio():
    (method,) = methods.parse("tofu@ratio=0.3", [0.5])
    assert (method.slug, method.ratio) == ("tofu-r30", 0.3)


def test_only_code_that_decides_images_changes_their_hash(monkeypatch, tmp_path):
    """A new file elsewhere in the package, such as another host's, must not make all images again."""
    package = tmp_path / "demo" / "tofu_sd"
    transformers = "hosts/diffusers_transformers/families"
    for folder in ("core", "kernels/triton", "patching", transformers, "demo"):
        (package / folder).mkdir(parents=True)
    for name in ("config", "config_fields"):
        (package / f"{name}.py").write_text("a = 1")
    (package / "core" / "matching.py").write_text("a = 1")
    monkeypatch.setattr(methods.tofu_sd, "__file__", str(package / "__init__.py"))
    before = methods.source_hash.__wrapped__()
    for other in ("demo/classes.py", "hosts/webui.py", "recipes.py"):
        (package / other).write_text("a = 1")
    assert methods.source_hash.__wrapped__() == before
    top = ("config.py", "config_fields.py")
    for own in (
        "core/matching.py",
        "kernels/triton/merge.py",
        *top,
        "hosts/diffusers_unet.py",
        f"{transformers}/flux.py",
    ):
        (package / own).write_text(own)
        after = methods.source_hash.__wrapped__()
        assert after != before
        before = after
