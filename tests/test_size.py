"""Budgets: lines a file and a function, parameters. Raising one is a reviewed change."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "kernels", "quant", "serve", "tests", "benchmarks", "docs")
SOURCES = (".py", ".cpp", ".h", ".hpp")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> list[Path]:
    """Every source file of ours, relative to the root."""
    return sorted(
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SOURCES
    )


def functions(path: Path) -> list[Function]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def num_parameters(function: Function) -> int:
    """Parameters without ``self`` and ``cls``; a command has one for each option: none count."""
    if any("command" in ast.unparse(decorator) for decorator in function.decorator_list):
        return 0
    given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return sum(argument.arg not in ("self", "cls") for argument in given)


def test_there_are_sources_to_measure() -> None:
    found = {path.parts[0] for path in sources()}
    assert found == set(FOLDERS)
    assert any(path.suffix == ".cpp" for path in sources())


@pytest.mark.parametrize("path", sources(), ids=str)
def test_a_file_stays_within_its_budget(path: Path) -> None:
    num_lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert num_lines < MAX_FILE_LINES, f"{path} has {num_lines} lines: split it"
    if path.suffix != ".py":
        return
    for function in functions(path):
        num_function_lines = (function.end_lineno or 0) - function.lineno + 1
        assert num_function_lines < MAX_FUNCTION_LINES, (
            f"{path}: {function.name} has {num_function_lines} lines"
        )
        if path.name != "kernel.py":
            assert num_parameters(function) <= MAX_PARAMETERS, (
                f"{path}: {function.name} has {num_parameters(function)} parameters"
            )
