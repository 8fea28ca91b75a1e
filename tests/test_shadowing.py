"""No name of ours answers to an import that means somebody else's package."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "kernels", "quant", "serve")
# Names that say nothing about what is in the module.
VAGUE = {"utils", "util", "helpers", "common", "base", "misc", "manager"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_never_shadows_an_installed_package(folder: str) -> None:
    spec = PathFinder.find_spec(folder, [str(ROOT)])
    # A namespace portion: it loses to any regular package of that name.
    assert spec is not None and spec.origin is None


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_package_of_the_same_name_wins_over_the_folder(folder: str, tmp_path: Path) -> None:
    package = tmp_path / folder / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    spec = PathFinder.find_spec(folder, [str(ROOT), str(tmp_path)])
    assert spec is not None and spec.origin == str(package)


def test_a_script_started_in_a_folder_imports_no_module_of_ours_by_accident() -> None:
    taken = set(sys.stdlib_module_names) | (set(packages_distributions()) - {"qserve"})
    taken.add("kernels")  # Hugging Face's: transformers looks for it, installed or not
    ours = {
        str(path.relative_to(ROOT)): path.stem
        for folder in (*FOLDERS, "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    }
    assert {path: name for path, name in ours.items() if name in taken} == {}


def test_a_module_is_named_after_what_it_holds() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path.stem in VAGUE
    ]
    assert wrong == []
