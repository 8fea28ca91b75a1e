"""The documentation names things that exist, and the code says what it does."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "kernels", "quant", "serve")
DECISIONS = ROOT / "docs" / "decisions"
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
PAGE_NAME = re.compile(r"[\w./-]*\w\.md\b")
SOURCE_NAME = re.compile(r"`((?:\.ci|cli|kernels|quant|serve|tests|docs|benchmarks)/[\w./-]*\w/?)`")
# A path of somebody's machine: it means nothing to a reader and breaks everywhere else.
PRIVATE_PATH = re.compile(r"(?<![\w.\]])/(?:home|root|Users|work|mnt|media)/")
TEXT_SUFFIXES = (".py", ".md", ".cpp", ".h", ".toml", ".txt", ".in", ".yaml", ".yml", ".json", "")
NOT_OURS = {"build", "dist", "out", "__pycache__"}


def project_texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the project with its content."""
    for place, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name == ".ci" or not name.startswith(".") and name not in NOT_OURS
        ]
        for name in names:
            path = Path(place, name)
            if path.suffix in TEXT_SUFFIXES and not name.startswith("."):
                yield path.relative_to(ROOT), path.read_text(encoding="utf-8", errors="replace")


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("recipes/*.md")])


def undocumented(path: Path) -> list[str]:
    """The module, and its public classes and functions, as far as they have no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not tree.body and path.name == "__init__.py":
        return []
    wanted = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]
    missing = [node.name for node in wanted if not ast.get_docstring(node)]
    return missing if ast.get_docstring(tree) else ["the module", *missing]


@pytest.mark.parametrize("folder", [*FOLDERS, "benchmarks"])
def test_every_public_name_says_what_it_gives(folder: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): missing
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (missing := undocumented(path))
    }
    assert wrong == {}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    broken = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert broken == []


def test_a_page_named_anywhere_exists() -> None:
    known = {str(page.relative_to(ROOT)) for page in pages()} | {page.name for page in pages()}
    wrong = [
        f"{path}: {name}"
        for path, text in project_texts()
        if path.suffix in (".py", ".cpp", ".h") and path.parts[0] in FOLDERS
        for name in PAGE_NAME.findall(text)
        if name not in known and not name.startswith("README")
    ]
    assert wrong == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_file_that_a_page_names_exists(page: Path) -> None:
    named = SOURCE_NAME.findall(page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    wrong = [
        f"{path}:{number}"
        for path, text in project_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if PRIVATE_PATH.search(line)
    ]
    assert wrong == []


def test_every_page_can_be_found_from_the_index() -> None:
    linked = set(LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    named = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    lost = {name for name in named - {"index.md"} if not name.startswith("decisions/")}
    assert lost - linked == set()


def test_decisions_have_a_number_of_their_own_and_three_parts() -> None:
    found = sorted(DECISIONS.glob("[0-9]*.md"))
    numbers = [int(page.name[:4]) for page in found]
    assert len(numbers) == len(set(numbers))
    for page in found:
        text = page.read_text(encoding="utf-8")
        for part in ("## Context", "## Decision", "## Consequences"):
            assert part in text, f"{page.name} has no {part!r}"
        assert re.search(r"^Date: \d{4}-\d{2}-\d{2}$", text, re.MULTILINE), page.name


def test_the_changelog_has_an_entry_for_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert project["version"] in headings


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_up_to_date(generator: ModuleType) -> None:
    for path, render in generator.PAGES.items():
        written = path.read_text(encoding="utf-8")
        assert written == render(), f"{path.relative_to(ROOT)} is stale: run `make docs`"
