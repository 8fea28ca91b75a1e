"""Imports go one way: kernels <- quant <-(formats and errors only)- serve <- cli."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "kernels": ("qserve.kernels",),
    "quant": ("qserve.kernels", "qserve.quant"),
    "serve": ("qserve.kernels", "qserve.quant.formats", "qserve.quant.errors", "qserve.serve"),
    "cli": ("qserve.kernels", "qserve.quant", "qserve.serve", "qserve.cli"),
}
# Heavy or optional packages, and the only modules that may import them ("*" stands for one name).
CONFINED = {
    "triton": ("kernels/*/kernel.py", "kernels/static_gate/*"),
    "transformers": ("quant/*", "serve/tokenizer.py"),
    "starlette": ("serve/*",),
    "uvicorn": ("serve/*",),
    "click": ("cli/*",),
    "rich": ("cli/*",),
}
# The edge: what a user's environment says is read here and passed down.
READS_ENVIRONMENT = ("cli/*", "kernels/native.py")


def modules(folder: str) -> list[Path]:
    """Every module of a package folder, relative to the root."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Each import statement with the full name of a module it names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node, "." * node.level + (node.module or "")


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def forbidden_imports(folder: str, source: str) -> list[str]:
    """Project modules that ``source`` imports although it lives in ``folder``."""
    return [
        name
        for _, name in imports(ast.parse(source))
        if name.startswith(".")
        or (is_within(name, "qserve") and not any(is_within(name, ok) for ok in ALLOWED[folder]))
    ]


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_is_below_it(folder: str) -> None:
    wrong = {
        str(path): found
        for path in modules(folder)
        if (found := forbidden_imports(folder, (ROOT / path).read_text()))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("quant", "from qserve.serve.engine import Engine"),
        ("serve", "from qserve.quant.awq import search"),
        ("kernels", "import qserve.quant.errors"),
        ("serve", "from qserve.cli.main import run"),
        ("quant", "from .errors import QuantError"),
    ],
)
def test_the_check_sees_an_import_that_goes_up(folder: str, line: str) -> None:
    assert forbidden_imports(folder, line) != []


@pytest.mark.parametrize("package", CONFINED)
def test_a_heavy_package_is_imported_only_where_it_belongs(package: str) -> None:
    wrong = [
        str(path)
        for folder in ALLOWED
        for path in modules(folder)
        if not matches(path, CONFINED[package])
        and any(
            is_within(name, package) for _, name in imports(ast.parse((ROOT / path).read_text()))
        )
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", ["kernels", "quant", "serve"])
def test_nothing_is_imported_inside_a_function(folder: str) -> None:
    wrong = []
    for path in modules(folder):
        tree = ast.parse((ROOT / path).read_text())
        functions = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        wrong += [f"{path}:{node.lineno}" for inner in functions for node, _ in imports(inner)]
    assert wrong == []


def test_only_the_edge_reads_the_environment() -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for folder in ALLOWED
        for path in modules(folder)
        if not matches(path, READS_ENVIRONMENT)
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert wrong == []
