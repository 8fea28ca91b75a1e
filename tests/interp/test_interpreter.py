"""Starts each file of interpreted tests in a process that has the interpreter switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
FILES = sorted(path for path in FOLDER.glob("test_*.py") if path != Path(__file__).resolve())


def expect_passing(*arguments: str) -> None:
    """Run tests in a process that has the interpreter; fails with what they said."""
    options = ["-q", "--no-header", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--confcutdir", str(FOLDER), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{' '.join(arguments)}:\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_interpreted_tests_pass(path: Path) -> None:
    expect_passing(str(path))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_slow_interpreted_tests_pass() -> None:
    expect_passing("-m", "slow", str(FOLDER))
