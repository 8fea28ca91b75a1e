"""What is in the wheel, and that it can be found under the names users import."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "kernels", "quant", "serve")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel without its native part, built here: the rest does not depend on a compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--wheel-dir", str(folder)]
    command += ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command += ["-C", "wheel.cmake=false", "-C", f"build-dir={folder / 'build'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def shipped_files() -> set[str]:
    """What the wheel must hold of our folders: modules, typing marks, texts."""
    return {
        f"qserve/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".txt") and "csrc" not in path.parts or path.name == "py.typed"
    }


def test_the_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == shipped_files()


def test_the_only_top_level_name_is_qserve(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"qserve"}


def test_the_wheel_has_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    names = {name.partition(".dist-info/")[2] for name in wheel.namelist()}
    assert "licenses/LICENSE" in names
    (entry,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "qserve = qserve.cli.main:main" in wheel.read(entry).decode().replace(
        "=", " = "
    ).replace("  =  ", " = ")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_typed_and_bare(folder: str) -> None:
    assert (ROOT / folder / "py.typed").is_file()
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / ".typings" / "qserve" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_subfolder_with_modules_is_a_package(folder: str) -> None:
    with_modules = {path.parent for path in (ROOT / folder).rglob("*.py")} - {ROOT / folder}
    wrong = [str(sub) for sub in with_modules if not (sub / "__init__.py").is_file()]
    assert wrong == []


def test_the_installed_version_is_the_one_in_pyproject(project: dict[str, Any]) -> None:
    assert version("qserve-llm") == project["version"]


def test_every_dependency_is_pinned_in_the_tested_set(project: dict[str, Any]) -> None:
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = project["optional-dependencies"]
    wanted = {
        requirement.split(">=")[0].split("[")[0].strip().lower()
        for requirement in project["dependencies"] + extras["dev"]
    }
    assert wanted - pinned == set()
