"""Rules of docs/design.md that no other tool checks."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for folder in ("tofu_sd", "eval", "research", "tests") for path in (ROOT / folder).rglob("*.py"))
GLOBAL_RANDOM = {
    "torch.manual_seed",
    "torch.seed",
    "numpy.random.seed",
    "np.random.seed",
    "random.seed",
    "random.random",
}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=lambda f: str(f.relative_to(ROOT)))
def test_folder_has_at_most_a_dozen_modules(folder: Path) -> None:
    """More than that cannot be looked over."""
    assert sum(path.parent == folder and path.name != "__init__.py" for path in MODULES) <= 12


def test_functions_have_at_most_60_lines() -> None:
    functions = (
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}")
        for path in MODULES
        if path.relative_to(ROOT).parts[0] != "tests"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    )
    assert not [function for function in functions if function[0] > 60]


def test_library_never_uses_the_global_random_state() -> None:
    """A user's own seed would give other images with the package than without."""
    calls = {
        f"{path.relative_to(ROOT)}: {ast.unparse(node.func)}"
        for path in MODULES
        if path.relative_to(ROOT).parts[0] == "tofu_sd"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in GLOBAL_RANDOM
    }
    assert not calls


def test_random_numbers_of_the_library_have_a_generator() -> None:
    """torch.rand and its kind without `generator` draw from the global state."""
    draws = {"torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.multinomial", "torch.normal"}
    without = {
        f"{path.relative_to(ROOT)}, line {node.lineno}"
        for path in MODULES
        if path.relative_to(ROOT).parts[0] == "tofu_sd"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in draws
        and "generator" not in {keyword.arg for keyword in node.keywords}
    }
    assert not without


def _own_imports() -> list[tuple[str, str, str]]:
    """(file, module, name) of each import of this project's packages in benchmarks, which no other check reads."""
    return [
        (str(path.relative_to(ROOT)), node.module, alias.name)
        for path in sorted((ROOT / "benchmarks").rglob("*.py"))
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ImportFrom) and not node.level and node.module
        if node.module.split(".")[0] in ("tofu_sd", "eval", "research")
        for alias in node.names
    ]


def test_benchmarks_import_what_exists() -> None:
    """benchmarks/proportional.py kept the name of a module that had moved, and failed."""
    imports = _own_imports()
    assert imports
    missing = [
        (file, module, name)
        for file, module, name in imports
        if not hasattr(importlib.import_module(module), name) and importlib.util.find_spec(f"{module}.{name}") is None
    ]
    assert not missing
